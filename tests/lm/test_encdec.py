"""Encoder-decoders: the encoder reads the prompt once, the decoder speculates, and the text is transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation.utils import GenerationMixin

import specdec
from specdec import Engine, admission
from specdec.drafters.model import ModelDrafter
from specdec.errors import PromptError
from specdec.lm.base import CachedLM
from specdec.lm.encdec import EncoderDecoderLM
from specdec.lm.hf import hf_lm
from toys import native, noisy, tiny_gpt

pytestmark = pytest.mark.filterwarnings("ignore::specdec.errors.FallbackWarning")

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13]]
NEW = 16
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
}


def t5(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    heads = {"d_kv": 8, "num_heads": 4, "num_layers": 2, "initializer_factor": 3.0}
    special = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_ff=64, **heads, **special)).eval()


def bart(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(BartConfig(**SMALL, max_position_embeddings=40, forced_eos_token_id=None))
    model.generation_config.forced_bos_token_id = 7
    model.generation_config.forced_eos_token_id = 9
    return model.eval()


def whisper(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = WhisperConfig(**SMALL, num_mel_bins=8, max_source_positions=10, max_target_positions=40)
    model = WhisperForConditionalGeneration(config)
    model.generation_config.begin_suppress_tokens = None
    return model.eval()


SOUNDS = {"input_features": torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))}
MODELS = {"t5": t5, "bart": bart, "whisper": whisper}


def prompts(name: str) -> Any:
    return SOUNDS if name == "whisper" else PROMPTS


def expected(name: str, model: PreTrainedModel, new: int = NEW) -> list[list[int]]:
    sources: list[dict[str, Any]] = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    if name == "whisper":
        sources = [{"input_features": sound[None]} for sound in SOUNDS["input_features"]]
    # Whisper's own ``generate`` cuts sounds into pieces; the mixin's is the decoding of one.
    whole = [GenerationMixin.generate(model, **source, max_new_tokens=new, do_sample=False) for source in sources]
    return [text[0, 1:].tolist() for text in whole]


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_transformers(name: str) -> None:
    model = MODELS[name]()
    texts = expected(name, model)
    for draft in (None, "suffix", noisy(model, 0.02), model, tiny_gpt(3)):
        for rows in (1, 2, 3):
            output = specdec.generate(
                model, prompts(name), draft=draft, max_new_tokens=NEW, max_batch_size=rows, num_draft_tokens=4
            )
            assert output.token_ids == texts
        if draft is model:
            assert output.stats.acceptance_rate == 1


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_plain_sampling(name: str) -> None:
    model = MODELS[name]()
    settings = {"temperature": 1.0, "n": 2, "seed": 3, "max_new_tokens": NEW, "rule": "coupled", "max_batch_size": 4}
    plain = specdec.generate(model, prompts(name), **settings)
    assert len(set(map(tuple, plain.token_ids))) >= 5
    drafted = specdec.generate(model, prompts(name), draft=noisy(model, 0.02), **settings)
    assert drafted.token_ids == plain.token_ids and drafted.stats.num_accepted_tokens > 0


def test_the_encoder_runs_once_per_row() -> None:
    model = t5()
    runs: list[int] = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    target = hf_lm(model)
    runs.clear()
    Engine(target).generate(PROMPTS, max_new_tokens=NEW)
    assert len(runs) == 3
    runs.clear()
    Engine(target).generate(PROMPTS, max_new_tokens=NEW, n=2)  # samples share it
    assert len(runs) == 3


def test_what_the_encoder_has_read_may_be_given() -> None:
    model = bart()
    with torch.no_grad():
        sources = [{"encoder_outputs": model.get_encoder()(torch.tensor([prompt]))} for prompt in PROMPTS]
    assert specdec.generate(model, sources, max_new_tokens=NEW).token_ids == expected("bart", model)
    sources = [{"encoder_outputs": source["encoder_outputs"].last_hidden_state} for source in sources]
    assert specdec.generate(model, sources, max_new_tokens=NEW).token_ids == expected("bart", model)


def test_padding_of_the_encoder_is_dropped_at_the_door() -> None:
    model = t5()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in PROMPTS])
    for given in ({"prompts": ids, "attention_mask": mask}, {"prompts": {"input_ids": ids, "attention_mask": mask}}):
        assert specdec.generate(model, max_new_tokens=NEW, **given).token_ids == expected("t5", model)


def test_the_decoder_may_begin_with_tokens_of_the_callers() -> None:
    model = whisper()
    begin = torch.tensor([[1, 20, 21]] * 3)
    output = specdec.generate(model, {**SOUNDS, "decoder_input_ids": begin}, max_new_tokens=NEW)
    whole = GenerationMixin.generate(model, **SOUNDS, decoder_input_ids=begin, max_new_tokens=NEW, do_sample=False)
    assert output.token_ids == whole[:, 3:].tolist()


def test_begins_are_read_in_parts_and_sources_move_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in (("PREFILL_TOKENS", 4), ("FILL_TOKENS", 6), ("PASS_TOKENS", 1)):
        monkeypatch.setattr(admission, constant, value)
    model = whisper()
    begins = [torch.tensor([[1, *range(20, 20 + length)]]) for length in (22, 2, 12)]
    rows = [
        {"input_features": sound[None], "decoder_input_ids": begin}
        for sound, begin in zip(SOUNDS["input_features"], begins, strict=True)
    ]
    texts = [
        GenerationMixin.generate(model, **row, max_new_tokens=NEW, do_sample=False)[
            0, row["decoder_input_ids"].shape[1] :
        ]
        for row in rows
    ]
    for draft, size in ((None, 3), (noisy(model, 0.02), 2), (model, 6)):
        output = specdec.generate(
            model, rows, draft=draft, max_new_tokens=NEW, max_batch_size=size, n=2, num_draft_tokens=3
        )
        assert output.token_ids == [text.tolist() for text in texts for _ in range(2)]


def test_a_directory_is_loaded_with_its_encoder(tmp_path: Path) -> None:
    for name in ("bart", "whisper"):
        model = MODELS[name]()
        model.save_pretrained(tmp_path / name)  # without a tokenizer, and none is made up
        output = specdec.generate(tmp_path / name, prompts(name), max_new_tokens=NEW)
        assert output.token_ids == expected(name, model)


# --- The contract


def entered() -> EncoderDecoderLM:
    lm = hf_lm(t5())
    assert isinstance(lm, EncoderDecoderLM) and lm.encodes and lm.mechanism == "row by row"
    lm.reserve(2, 10)
    for slot, prompt in enumerate(PROMPTS[:2]):
        lm.enter(slot, {"input_ids": torch.tensor([prompt])})
    return lm


def test_a_source_moves_with_its_row() -> None:
    lm = entered()
    tokens = torch.tensor([[0, 5, 6], [0, 5, 6]])
    logits = lm.append(tokens)
    assert not torch.allclose(logits[0], logits[1])
    lm.keep([2, 3])
    lm.copy(1, 0)
    lm.free(1)
    assert lm.lengths == [3, 0]
    lm.forget(0)
    torch.testing.assert_close(lm.append(tokens[:1])[0], logits[1])
    with pytest.raises(PromptError, match="given none"):
        lm.append(tokens[:1], first=1)


@pytest.mark.parametrize("lm", [lambda: native(tiny_gpt()), lambda: hf_lm(tiny_llama())])
def test_models_without_an_encoder_have_no_use_for_a_source(lm: Any) -> None:
    found: CachedLM = lm()
    found.reserve(1, 4)
    found.enter(0, None)
    with pytest.raises(PromptError, match="no encoder"):
        found.enter(0, {"input_ids": torch.tensor([[1]])})


def tiny_llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[99]], "prompt 0 has token id 99"),
        ({"input_features": torch.zeros(2, 8, 20), "attention_mask": torch.ones(3, 1)}, "one entry per row"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], "tensors are \\[1, ...\\]; input_ids is \\[2, 3\\]"),
    ],
)
def test_bad_sources_are_said_at_the_door(given: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        specdec.generate(t5(), given, max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("t5", {}, "reads a source"),
        ("t5", {"input_ids": torch.tensor([[4, 10**6]])}, "prompt 1 has token id 1000000"),
        ("t5", {"input_ids": torch.empty(1, 0, dtype=torch.long)}, "prompt 1 is empty"),
        ("whisper", {"input_features": torch.zeros(1, 3, 20)}, r"cannot encode input_features: \[1, 3, 20\]"),
    ],
)
def test_a_bad_source_fails_alone(name: str, bad: dict[str, Tensor], message: str) -> None:
    model = MODELS[name]()
    given = prompts(name)
    good = (
        [{key: value[i : i + 1] for key, value in given.items()} for i in range(2)]
        if isinstance(given, dict)
        else [{"input_ids": torch.tensor([own])} for own in given[:2]]
    )
    output = specdec.generate(model, [good[0], bad, good[1]], max_new_tokens=NEW, on_error="return")
    assert output.token_ids == [expected(name, model)[0], [], expected(name, model)[1]]
    with pytest.raises(PromptError, match=message):
        raise output.errors[1] or AssertionError("no error")


def test_a_source_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(PromptError, match="reads a source: a dict of tensors.*input_ids"):
        entered().enter(0, [1, 2, 3])


def test_several_drafters_of_one_target_do_not_share_sources() -> None:
    model = t5()
    target = hf_lm(model)
    for drafter in (ModelDrafter(hf_lm(model)), ModelDrafter(hf_lm(noisy(model, 0.01)))):
        assert Engine(target, drafter).generate(PROMPTS, max_new_tokens=NEW).token_ids == expected("t5", model)
