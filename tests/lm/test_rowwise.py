"""Models that one pass for all rows would read wrongly: row by row every row gets the logits that it gets alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from ragged import Checked, random_walk
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    JambaConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
)

from specdec import Engine, admission
from specdec.drafters.model import ModelDrafter
from specdec.errors import FallbackWarning, ModelError
from specdec.lm import hf, probe, rowwise
from specdec.lm.hf import HFLM, hf_lm
from specdec.lm.rowwise import RowwiseLM
from toys import noisy

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=6),
    "mamba": lambda: MambaConfig(**SHAPE, state_size=4),
    "mamba 2": lambda: Mamba2Config(**SHAPE, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=8),
    "jamba": lambda: JambaConfig(**SHAPE, attn_layer_offset=1, attn_layer_period=2, num_experts=2, mamba_d_state=4),
    "qwen 3 next": lambda: Qwen3NextConfig(
        **SHAPE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "gpt neo": lambda: GPTNeoConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=40,
        initializer_range=0.3,
    ),
    "rwkv": lambda: RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}
RECURRENT = ["mamba 2", "qwen 3 next", "mamba", "jamba"]
SINGLE = ["mamba", "jamba"]  # go on from a state with single tokens only


@pytest.fixture(autouse=True)
def nothing_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_exact", set())
    monkeypatch.setattr(hf, "_said", set())


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama 4":
        moe = {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8, "no_rope_layers": [0, 1]}
        model = Llama4ForCausalLM(Llama4TextConfig(**{**SHAPE, **moe, "attention_chunk_size": 8}))
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    return model.eval().requires_grad_(False)


def checked(name: str, *options: str) -> Checked:
    model = build(name)
    reference = copy.deepcopy(model)
    lm = RowwiseLM(model, *options, *(["token by token"] if name in SINGLE and not options else []))
    lm.context = 40  # rows of the walk end there
    return Checked(lm, lambda text: reference(torch.tensor([text]), use_cache=False).logits[0], tolerance=1e-4)


@pytest.mark.parametrize("name", [*CONFIGS, "llama 4"])
def test_rows_get_the_logits_that_they_get_alone(name: str) -> None:
    found = checked(name)
    assert found.lm.mechanism == ("token by token" if name in SINGLE else "row by row")
    for seed in range(2):
        random_walk(found, steps=40, seed=seed)
        found.free(0)


@pytest.mark.parametrize("options", [(), ("whole rows",)])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_slot_may_forget_what_it_has_committed(name: str, options: tuple[str, ...]) -> None:
    found = checked(name, *options)
    found.reserve(2, 30)
    found.fill([[1, 2, 3, 4, 5], [6, 7]])
    for left in (4, 2, 0):
        found.copy(0, 0, left)
        found.append(torch.arange(8 + left, 14 + left).view(2, 3))
        found.keep([2, 1])
    found.append(torch.arange(6).view(2, 3))


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt neo"])
def test_without_a_cache_too(name: str) -> None:
    found = checked(name, "whole rows")
    assert found.lm.mechanism == "whole rows"
    random_walk(found, steps=40, seed=3)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_snapshot_is_not_left_behind_forever(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "MOST_BEHIND", 3)
    monkeypatch.setattr(rowwise, "FILL_TOKENS", 2 if name not in SINGLE else 99)
    found = checked(name)
    found.reserve(1, 40)
    for step in range(12):
        found.append(torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(step)))
        found.keep([step % 4])
        assert found.lm._rows[0].behind <= 3 + 3


def test_a_pass_costs_one_pass_and_a_cache_that_can_be_cropped_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked("llama")
    found.reserve(1, 40)
    found.fill([[1, 2, 3]])
    read: list[int] = []
    model = found.lm.model
    model.register_forward_pre_hook(lambda m, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    monkeypatch.setattr(rowwise, "clone", None)
    for _ in range(3):
        found.append(torch.tensor([[5, 6, 7]]))
        found.keep([1])
    assert read == [3, 3, 3]


def test_tokens_kept_of_a_recurrent_row_are_read_at_the_front_of_the_next_pass() -> None:
    found = checked("mamba 2")
    found.reserve(1, 40)
    found.fill([[1, 2, 3]])
    read: list[int] = []
    model = found.lm.model
    model.register_forward_pre_hook(lambda m, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    for kept in (1, 2, 3, 0):
        found.append(torch.tensor([[5, 6, 7]]))
        found.keep([kept])
    assert read == [3, 1 + 3, 3 + 3, 3]


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


@pytest.mark.parametrize("name", RECURRENT)
def test_the_engine_gives_transformers_text(name: str) -> None:
    model = build(name)
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    with pytest.warns(FallbackWarning, match="token by token" if name in SINGLE else "row by row"):
        target = hf_lm(model)
    for drafter in (None, ModelDrafter(hf_lm(noisy(model, 0.01))), ModelDrafter(hf_lm(model))):
        assert Engine(target, drafter).generate(PROMPTS, max_new_tokens=20).token_ids == expected


def test_samples_share_a_prompt_of_a_recurrent_model() -> None:
    engine = Engine(hf_lm(build("mamba 2")))
    shared = engine.generate([PROMPTS[0]], n=3, temperature=1.0, seed=5, max_new_tokens=12, max_batch_size=2)
    alone = [
        engine.generate([PROMPTS[0]], temperature=1.0, seed=5 + j, max_new_tokens=12).token_ids[0] for j in range(3)
    ]
    assert shared.token_ids == alone


@pytest.mark.parametrize("name", ["mamba 2", "gpt neo"])
def test_prompts_are_read_in_parts_beside_rows_that_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in (("PREFILL_TOKENS", 4), ("FILL_TOKENS", 6), ("PASS_TOKENS", 1)):
        monkeypatch.setattr(admission, constant, value)
    model = build(name)
    prompts = [list(range(5, 35)), [12], list(range(40, 57)), [13, 14, 15]]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    engine = Engine(RowwiseLM(model), ModelDrafter(RowwiseLM(noisy(model, 0.01))))
    for size in (2, 4, 8):
        output = engine.generate(prompts, max_new_tokens=8, max_batch_size=size, n=2)
        assert output.token_ids == [text for text in expected for _ in range(2)]


def test_without_a_cache_no_prompt_is_read_for_nothing() -> None:
    found = checked("llama", "whole rows")
    found.reserve(1, 40)
    found.lm.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass whose result nobody keeps"))
    found.fill([[1, 2, 3]])
    assert found.lm.lengths == [3]


def test_the_fastest_exact_way_is_taken_and_others_are_said_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(hf_lm(build("llama")), HFLM) and hf_lm(build("llama")).mechanism == "ragged"
    with pytest.warns(FallbackWarning, match="Mamba2ForCausalLM is decoded row by row.*linear_attention") as caught:
        assert hf_lm(build("mamba 2")).mechanism == "row by row"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_lm(build("mamba 2"))


class CachesWrongly(LlamaForCausalLM):
    """Exact as long as no cache is used."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            input_ids = (input_ids + 1) % 61
        return super().forward(input_ids, past_key_values=past_key_values, **given)


class HasNoCache(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, **given: Any) -> Any:
        return super().forward(input_ids, use_cache=False)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **given: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


class RemembersByItself(LlamaForCausalLM):
    """Keeps what it has read in a module."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        output = super().forward(input_ids, **given)
        self.latest = output.logits[:, -1]
        return output


class SeesTheFuture(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        output = super().forward(input_ids, past_key_values=past_key_values, **given)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


def test_a_model_without_a_cache_is_read_whole() -> None:
    torch.manual_seed(0)
    model = HasNoCache(LlamaConfig(**SHAPE)).eval()
    with pytest.warns(FallbackWarning, match="whole rows"):
        assert hf_lm(model).mechanism == "whole rows"


def test_a_model_that_generates_otherwise_than_it_reads_is_refused() -> None:
    torch.manual_seed(0)
    model = CachesWrongly(LlamaConfig(**SHAPE)).eval()
    with pytest.raises(ModelError, match="whole rows: transformers' generate.*says something else"):
        hf_lm(model)


def test_a_model_that_keeps_rows_in_its_modules_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="keeps what it has read in .latest and not in a cache"):
        hf_lm(RemembersByItself(LlamaConfig(**SHAPE)).eval())


def test_a_model_that_no_way_runs_exactly_is_refused_with_every_reason() -> None:
    torch.manual_seed(0)
    model = SeesTheFuture(LlamaConfig(**SHAPE)).eval()
    with pytest.raises(ModelError, match="ragged: .*differ by .*row by row: .*differ by.*whole rows: .*differ by"):
        hf_lm(model)
