"""Checkpoints load whole or not at all, and a pair of models shares a vocabulary or is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec
from specdec import CheckpointError, ConfigError, ModelError, SpecDecError, VocabularyError, drafting
from specdec.checkpoints import load_gpt
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.vocabularies import VocabularyDrafter
from specdec.lm.cpu import CpuLM
from specdec.lm.hf import HFLM
from specdec.nn.gpt import GPT, state_to_hf
from specdec.training.checkpoint import save_pretrained
from toys import native, noisy, tiny_gpt

VOCAB = 64
LENGTH_BYTES = 8  # a safetensors file: the header's length, the header (JSON), the weights


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[-1])


WORDS = [f"w{i}" for i in range(VOCAB)]


def save(model: GPT, directory: Path, words: list[str] | None = WORDS) -> Path:
    """``model`` as a Hugging Face checkpoint, with a tokenizer of ``words``."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    save_file(state_to_hf(model), directory / "model.safetensors", metadata={"format": "pt"})
    if words is not None:
        make_tokenizer(words).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return tiny_gpt(0, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def saved(gpt: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def refuse(kind: type[SpecDecError], pattern: str, target: Any, **settings: Any) -> None:
    with pytest.raises(SpecDecError, match=pattern) as caught:
        specdec.load(target, **settings)
    assert type(caught.value) is kind


# --- What loads


def test_a_checkpoint_runs_as_the_model_it_was_saved_from(gpt: GPT, saved: Path) -> None:
    expected = specdec.Engine(native(gpt)).generate([[1, 2, 3]], max_new_tokens=20).token_ids
    for target in (saved, str(saved), gpt, native(gpt)):
        for draft in (None, saved, str(saved), gpt, native(gpt), "suffix", SuffixDrafter()):
            found = specdec.load(target, draft=draft, device="cpu")
            assert isinstance(found.target, CpuLM) and found.target.dtype == torch.float32
            assert found.generate([[1, 2, 3]], max_new_tokens=20).token_ids == expected
    assert specdec.generate(saved, [[1, 2, 3]], draft=saved, max_new_tokens=20).token_ids == expected
    assert specdec.generate(saved, "w1 w2 w3", max_new_tokens=20).token_ids == expected


def test_sharded_weights_load(gpt: GPT, copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, copied / file)
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    found = specdec.load(copied).generate([[1]], max_new_tokens=9)
    assert found.token_ids == specdec.load(gpt).generate([[1]], max_new_tokens=9).token_ids
    (copied / "model-00002-of-00003.safetensors").unlink()
    refuse(CheckpointError, "lacks model-00002-of-00003.safetensors", copied)
    for damaged in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(damaged)
        refuse(CheckpointError, "index.json", copied)


def test_a_tied_head_loads(tmp_path: Path) -> None:
    model = tiny_gpt(0, vocab_size=VOCAB)
    tied = LlamaConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": True})
    model = GPT(tied).eval().requires_grad_(False)
    directory = save(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    expected = specdec.load(model).generate([[1]], max_new_tokens=9).token_ids
    assert specdec.load(directory).generate([[1]], max_new_tokens=9).token_ids == expected


def test_dtypes_are_the_checkpoints_own_or_those_asked_for(gpt: GPT, saved: Path, tmp_path: Path) -> None:
    half = tiny_gpt(0, vocab_size=VOCAB).to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    directory = save(half, tmp_path / "half")
    assert specdec.load(directory).target.dtype == torch.bfloat16
    assert specdec.load(directory, dtype="float32").target.dtype == torch.float32
    assert specdec.load(saved).target.dtype == torch.float32
    assert specdec.load(saved, dtype="float16").target.dtype == torch.float16
    assert next(gpt.parameters()).dtype == torch.float32


def test_a_model_without_a_tokenizer_takes_token_ids(gpt: GPT, tmp_path: Path) -> None:
    found = specdec.load(save(gpt, tmp_path / "bare", words=None))
    assert found.tokenizer is None and found.limits.vocab_size == VOCAB
    assert found.generate([[1]], max_new_tokens=3).texts is None
    given = specdec.load(tmp_path / "bare", tokenizer=make_tokenizer(WORDS))
    assert given.generate("w1", max_new_tokens=3).texts is not None


def test_a_tokenizer_may_be_named(gpt: GPT, saved: Path, tmp_path: Path) -> None:
    make_tokenizer(WORDS).save_pretrained(tmp_path / "alone")
    for given in (saved, str(saved), tmp_path / "alone", make_tokenizer(WORDS)):
        engine = specdec.load(gpt, draft=tiny_gpt(1, vocab_size=VOCAB), tokenizer=given, draft_tokenizer=given)
        assert engine.generate("w1", max_new_tokens=3).texts is not None and type(engine.drafter) is ModelDrafter
    for setting in ("tokenizer", "draft_tokenizer"):
        refuse(ConfigError, f"{setting} must be a transformers tokenizer, .*got 3", gpt, draft=gpt, **{setting: 3})
        refuse(CheckpointError, f"{setting}=.*holds no tokenizer", gpt, draft=gpt, **{setting: tmp_path})
        refuse(CheckpointError, "no checkpoint at", gpt, draft=gpt, **{setting: "./nowhere"})


def test_ends_of_text_come_from_the_generation_config_or_the_config(copied: Path) -> None:
    assert specdec.load(copied).limits.eos_ids == frozenset()
    rewrite_config(copied, eos_token_id=5)
    assert specdec.load(copied).limits.eos_ids == {5}
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(copied)
    assert specdec.load(copied).limits.eos_ids == {7, 9}


# --- Families

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"]),
}
OURS: dict[str, Callable[[], Any]] = {
    "Llama with biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "Mistral": lambda: MistralConfig(**SHAPE, sliding_window=128),
    "Qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "Qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
}
WINDOWED: dict[str, Callable[[], Any]] = {
    "Mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "Qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "Qwen3": lambda: Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]


def save_theirs(config: Any, directory: Path) -> PreTrainedModel:
    """A random model of transformers, saved by it, no weight of which can be left out unnoticed."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(directory)
    return model


def check_texts(engine: specdec.Engine, model: PreTrainedModel) -> None:
    """The greedy texts of ragged prompts in one batch are those that ``generate`` gives each alone."""
    expected = []
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        whole = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=40, pad_token_id=0
        )
        expected.append(whole[0, len(prompt) :].tolist())
    for k in (0, 3):
        assert engine.generate(PROMPTS, max_new_tokens=40, num_draft_tokens=k).token_ids == expected


@pytest.mark.parametrize("family", OURS)
def test_a_familys_checkpoint_runs_on_our_decoder(family: str, tmp_path: Path) -> None:
    model = save_theirs(OURS[family](), tmp_path)
    for draft in (tmp_path, "suffix"):
        engine = specdec.load(tmp_path, draft=draft, device="cpu")
        assert type(engine.target) is type(specdec.load(tiny_gpt(), device="cpu").target)
        check_texts(engine, model)
    assert isinstance(specdec.load(model).target, HFLM)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_smaller_than_the_context_is_left_to_transformers(family: str, tmp_path: Path) -> None:
    model = save_theirs(WINDOWED[family](), tmp_path)
    engine = specdec.load(tmp_path, draft="suffix", device="cpu")
    assert isinstance(engine.target, HFLM)
    check_texts(engine, model)


@pytest.mark.parametrize("family", OURS)
def test_what_was_loaded_is_saved_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = save_theirs(OURS[family](), tmp_path / "theirs")
    save_pretrained(load_gpt(tmp_path / "theirs", model.config), make_tokenizer(WORDS), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / place / "model.safetensors") for place in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(model) and back.config.architectures == [type(model).__name__]
    text = torch.tensor([PROMPTS[2]])
    assert torch.equal(back(text).logits, model(text).logits)


# --- What does not


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        refuse(CheckpointError, "nowhere|a/b/c", place)
    refuse(CheckpointError, "no config.json", tmp_path)


def test_a_hub_id_offline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(CheckpointError, "'nobody/nothing' is neither a local directory nor a hub model", "nobody/nothing")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": 3}', "\x00"]
)
def test_a_damaged_config_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    refuse(CheckpointError, "config.json", copied)


def test_a_config_with_impossible_values_is_refused(copied: Path) -> None:
    for changes in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}):
        shutil.copy(copied / "config.json", copied / "kept")
        rewrite_config(copied, **changes)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            specdec.load(copied)
        shutil.copy(copied / "kept", copied / "config.json")


def test_a_damaged_tokenizer_is_refused(copied: Path) -> None:
    for content in ("", "{", "{}", "[]"):
        (copied / "tokenizer.json").write_text(content)
        refuse(CheckpointError, r"tokenizer\.json", copied)


def test_missing_weights_are_refused_and_nothing_is_unpickled(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    refuse(CheckpointError, r"lacks model\.safetensors.*nothing is unpickled", copied)


def test_truncated_weights_are_refused_at_every_length(copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refuse(CheckpointError, "model.safetensors is damaged or cut short", copied)


def test_a_flipped_byte_in_the_header_is_refused_or_harmless(gpt: GPT, copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    header = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES], "little")
    refused = 0
    places = [*range(LENGTH_BYTES), *range(LENGTH_BYTES, header, 17)]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            found = load_gpt(copied, gpt.config).state_dict()
        except CheckpointError:
            refused += 1
        else:  # the metadata or the padding
            assert all(torch.equal(weight, found[name]) for name, weight in gpt.state_dict().items())
    assert refused > 0.9 * len(places)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda s: s.pop("model.norm.weight"), "norm.weight"),
        (lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"), "layers.1.self_attn"),
        (lambda s: s.pop("lm_head.weight"), "lm_head.weight"),
        (lambda s: s.update({"model.embed_tokens.weight": torch.zeros(VOCAB + 1, 32)}), "embed_tokens.weight"),
        (lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 32)}), "layers.0.self_attn"),
        (lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 31)}), "weights that its config"),
        (lambda s: s.update({"model.layers.2.input_layernorm.weight": torch.zeros(32)}), "layers.2.input_layernorm"),
        (lambda s: s.clear(), "weight"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_refused(copied: Path, change: Any, pattern: str) -> None:
    rewrite(copied, change)
    refuse(CheckpointError, pattern, copied)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(gpt: GPT, saved: Path, copied: Path, value: float) -> None:
    rewrite(copied, lambda state: state["model.layers.1.mlp.down_proj.weight"][3, 4].fill_(value))
    refuse(ModelError, r"layers\.1\.mlp\.down_proj\.weight.*NaN or infinity", copied)
    refuse(ModelError, "NaN or infinity", saved, draft=copied)
    broken = tiny_gpt(0)
    broken.norm.weight[2] = value
    refuse(ModelError, r"norm\.weight", broken)


def test_huge_finite_weights_are_not_taken_for_infinite(gpt: GPT) -> None:
    model = tiny_gpt(0)
    model.norm.weight[:] = 3e38  # their sum is infinite
    specdec.load(model)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"dtype": "int4"}, "'auto' or one of float32, bfloat16, float16, int8, got 'int4'"),
        ({"dtype": None}, "dtype must be 'auto'.*got None"),
        ({"device": "tpu"}, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "meta"}, "device must be 'auto', 'cpu' or 'cuda', got 'meta'"),
        ({"device": None}, "device must be 'auto'.*got None"),
        ({"draft": 3}, "draft must be.*suffix.*got 3"),
        ({"draft": object()}, "draft must be.*got <object"),
        ({"draft": torch.nn.Linear(2, 2)}, "got Linear"),
    ],
)
def test_unknown_dtypes_devices_and_drafters_are_refused(saved: Path, settings: Any, pattern: str) -> None:
    refuse(ConfigError, pattern, saved, **settings)


class Half:
    """Two of the five methods."""

    propose = SuffixDrafter.propose
    observe = SuffixDrafter.observe
    free = None


@pytest.mark.usefixtures("registry")
def test_a_drafter_that_is_not_whole_is_refused(gpt: GPT) -> None:
    refuse(ConfigError, "got the class SuffixDrafter; pass an object of it: SuffixDrafter", gpt, draft=SuffixDrafter)
    for draft in (Half(), [gpt, Half()]):
        refuse(ConfigError, "Half lacks reserve, copy, free; add", gpt, draft=draft)
    for made in (Half(), None, SuffixDrafter):
        specdec.register_drafter("mine", lambda target, made=made: made)  # type: ignore[misc]
        refuse(ConfigError, "what 'mine' stands for must", gpt, draft="mine")


def test_an_encoder_decoder_drafts_for_nothing_else(gpt: GPT) -> None:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    draft = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).eval()
    refuse(ConfigError, "draft is an encoder-decoder and the target is not", gpt, draft=draft)


def test_things_that_are_no_model_are_refused() -> None:
    for thing in (None, 3, object(), torch.nn.Linear(2, 2), torch.zeros(2)):
        refuse(ConfigError, f"a model must be.*got {type(thing).__name__}", thing)


def test_a_gpu_that_is_not_there_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(ConfigError, "no GPU", saved, device="cuda")


def test_settings_are_refused_before_a_model_loads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown argument 'max_tokens'; did you mean 'max_new_tokens'"):
        specdec.generate(tmp_path / "nowhere", "hello", max_tokens=3)


# --- Vocabularies


def test_a_draft_with_other_strings_is_not_taken_for_one_with_the_same(gpt: GPT, saved: Path, tmp_path: Path) -> None:
    # CASES 69, 70: the same size, two words exchanged, in the tokenizer and in the weights
    order = [*range(10), 11, 10, *range(12, VOCAB)]
    mixed = copy.deepcopy(gpt)
    for module in (mixed.embed_tokens, mixed.lm_head):
        module.weight.copy_(module.weight[order])
    draft = save(mixed, tmp_path / "draft", [WORDS[i] for i in order])
    plain = specdec.load(saved).generate([[1, 10, 11]], max_new_tokens=40)
    found = specdec.load(saved, draft=draft)
    assert isinstance(found.drafter, VocabularyDrafter)
    output = found.generate([[1, 10, 11]], max_new_tokens=40, num_draft_tokens=4)
    assert output.token_ids == plain.token_ids and output.stats.acceptance_rate == 1
    assert {10, 11} & set(output.token_ids[0])
    fewer = specdec.load(saved, draft=save(gpt, tmp_path / "fewer", WORDS[:60]))
    assert isinstance(fewer.drafter, VocabularyDrafter)
    assert fewer.generate([[1, 10, 11]], max_new_tokens=40, num_draft_tokens=4).token_ids == plain.token_ids


def test_a_draft_of_another_size_without_tokenizers_is_refused(gpt: GPT, saved: Path) -> None:
    refuse(VocabularyError, "64 entries and the draft's 72", gpt, draft=tiny_gpt(1, vocab_size=72))
    refuse(VocabularyError, "64 entries and the draft's 72", saved, draft=native(tiny_gpt(1, vocab_size=72)))


@pytest.mark.parametrize(("ours", "theirs"), [(64, 72), (72, 64), (72, 80), (72, 72)])
def test_padding_of_the_head_is_never_generated(ours: int, theirs: int, tmp_path: Path) -> None:
    # CASES 18, 71: 60 tokens, heads rounded up differently; the padding's logits are the largest
    models = [tiny_gpt(0, vocab_size=ours), tiny_gpt(0, vocab_size=theirs)]
    common = tiny_gpt(0, vocab_size=80)
    for model in models:
        for mine, full in ((model.embed_tokens, common.embed_tokens), (model.lm_head, common.lm_head)):
            mine.weight.copy_(full.weight[: len(mine.weight)])
        model.layers.load_state_dict(common.layers.state_dict())
        model.lm_head.weight[60:] *= 30
    target, draft = (save(model, tmp_path / name, WORDS[:60]) for model, name in zip(models, "td", strict=True))
    prompts = [[i, i + 1] for i in range(8)]
    plain = specdec.load(target, draft=None).generate(prompts, max_new_tokens=40, logprobs=True)
    found = specdec.load(target, draft=draft)
    assert found.limits.vocab_size == 60 and isinstance(found.drafter, ModelDrafter)
    for rule in ("block", "rejection", "coupled"):
        output = found.generate(prompts, max_new_tokens=40, rule=rule, logprobs=True, num_draft_tokens=4)
        assert output.token_ids == plain.token_ids and output.stats.acceptance_rate == 1
        sampled = found.generate(prompts, max_new_tokens=40, rule=rule, temperature=1.5, seed=0)
        assert max(map(max, sampled.token_ids)) < 60
    with pytest.raises(specdec.PromptError, match="token id 60; the model knows 0 to 59"):
        found.generate([[60]])


def test_a_lookup_drafter_needs_no_vocabulary_check_and_is_the_default(saved: Path) -> None:
    found = specdec.load(saved, draft="suffix")
    assert isinstance(found.drafter, SuffixDrafter) and isinstance(specdec.load(saved).drafter, SuffixDrafter)
    assert specdec.load(saved, draft="suffix").drafter is not found.drafter
    assert specdec.load(saved, draft=None).drafter is None
    assert specdec.generate(saved, [[1, 2, 1]], max_new_tokens=9).stats.num_draft_tokens > 0
    assert specdec.generate(saved, [[1, 2, 1]], max_new_tokens=9, draft=None).stats.num_draft_tokens == 0


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for name in ("NAMES", "KINDS"):
        monkeypatch.setattr(drafting, name, dict(getattr(drafting, name)))


@pytest.mark.usefixtures("registry")
def test_a_drafter_can_be_registered_by_a_name(gpt: GPT, saved: Path) -> None:
    made = []
    specdec.register_drafter("mine", lambda target: made.append(target) or SuffixDrafter(factor=2))
    engines = [specdec.load(target, draft="mine") for target in (saved, gpt)]
    assert made == [engine.target for engine in engines]
    assert [engine.drafter.factor for engine in engines if isinstance(engine.drafter, SuffixDrafter)] == [2, 2]
    assert isinstance(specdec.load(saved, draft=[saved, "mine"]).drafter, HybridDrafter)
    specdec.register_drafter("mine", lambda target: SuffixDrafter(factor=3))  # a notebook's cell, run again
    assert getattr(specdec.load(saved, draft="mine").drafter, "factor") == 3  # noqa: B009
    for name in ("", "Mine", "a/b", ".x", 3, None, "é"):
        with pytest.raises(ConfigError, match="name must be lower-case letters"):
            specdec.register_drafter(name, SuffixDrafter)  # type: ignore[arg-type]
    for name in ("suffix", "tuned"):
        with pytest.raises(ConfigError, match=f"'{name}' is the name of specdec's own"):
            specdec.register_drafter(name, lambda target: SuffixDrafter())
    with pytest.raises(ConfigError, match="factory of 'other' must be callable.*got 3"):
        specdec.register_drafter("other", 3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("key", ["specdec_drafter", "speculators_model_type"])
def test_a_folder_says_which_kind_of_drafter_it_holds(key: str, gpt: GPT, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: "new"}))
    refuse(CheckpointError, "drafter of kind 'new'; known are", saved, draft=tmp_path)
    asked = []
    drafting.KINDS["new"] = lambda folder, target: asked.append((folder, target)) or SuffixDrafter()  # type: ignore[func-returns-value]
    for target in (saved, gpt, native(gpt)):
        engine = specdec.load(target, draft=str(tmp_path))
        folder, given = asked.pop()
        assert folder == tmp_path and given.lm is engine.target and given.vocab_size == VOCAB
        assert isinstance(given.model, GPT) is (target is not engine.target)
    for damaged in ("{", "[]"):
        (tmp_path / "config.json").write_text(damaged)
        refuse(CheckpointError, "config.json cannot be read", saved, draft=tmp_path)


def test_a_name_that_is_not_known_is_refused_with_those_that_are(saved: Path) -> None:
    refuse(CheckpointError, "(?s)'sufix' is neither.*Drafters that go by a name: .*suffix", saved, draft="sufix")
    refuse(CheckpointError, "(?s)'ngram' is neither.*Drafters that go by a name: .*suffix", saved, draft="ngram")


def test_a_model_and_a_lookup_make_a_hybrid(saved: Path) -> None:
    for draft in (["suffix", saved], (str(saved), SuffixDrafter())):
        found = specdec.load(saved, draft=draft)
        assert isinstance(found.drafter, HybridDrafter) and isinstance(found.drafter.model, ModelDrafter)
    for wrong in ([], ["suffix"], ["suffix", "suffix"], [saved, saved], [saved, "suffix", "suffix"], [None, "suffix"]):
        refuse(ConfigError, 'a list of drafters must be one model and "suffix"', saved, draft=wrong)


def test_the_users_objects_are_left_as_they_are(gpt: GPT) -> None:
    # CASES 62
    draft = noisy(gpt)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    specdec.load(gpt, draft=draft).generate([[1]], max_new_tokens=5)
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())
