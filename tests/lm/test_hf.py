"""Hugging Face models: nothing of them changes, they can be used meanwhile, and those that would be wrong are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ragged import Checked, random_walk
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specdec import Engine
from specdec.drafters.model import ModelDrafter
from specdec.errors import ModelError
from specdec.lm import hf, probe
from specdec.lm.hf import HFLM

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


@pytest.fixture(autouse=True)
def nothing_admitted_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_exact", set())


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, **changes})).eval()


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**shape, **special, **changes})).eval()


def mistral(seed: int = 0, **changes: Any) -> MistralForCausalLM:
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_key_value_heads": 2, "sliding_window": 6}
    return MistralForCausalLM(MistralConfig(**{**shape, **changes})).eval()


def checked(model: PreTrainedModel) -> Checked:
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    return Checked(HFLM(model), lambda text: reference(torch.tensor([text]), use_cache=False).logits[0])


def greedy(model: PreTrainedModel, new: int = 12) -> list[list[int]]:
    """transformers' own text after every prompt, in one left-padded batch with its own cache."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, width:].tolist()


# --- Nothing of the model changes


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All that a user could notice."""
    return copy.deepcopy(
        {
            "weights": dict(model.state_dict()),
            "buffers": dict(model.named_buffers()),
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "training": {name: module.training for name, module in model.named_modules()},
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("training", [False, True, "in part"])
@pytest.mark.parametrize("make", [llama, gpt2, mistral])
def test_the_model_is_left_as_it_was(make: Any, training: bool | str) -> None:
    model = make(attention_dropout=0.5) if make is not gpt2 else make(attn_pdrop=0.5, resid_pdrop=0.5)
    reference = copy.deepcopy(model).requires_grad_(False)
    model.train(training is True)
    if training == "in part":
        next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].train()
    before = snapshot(model)
    found = Checked(HFLM(model), lambda text: reference(torch.tensor([text]), use_cache=False).logits[0])
    random_walk(found, steps=12, seed=0)
    assert same(snapshot(model), before)

    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()  # it can still be trained
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_snapshot_notices_changes() -> None:
    model = llama()
    before = snapshot(model)
    model.config.use_cache = False
    assert not same(snapshot(model), before)
    model.config.use_cache = True
    assert same(snapshot(model), before)
    model.model.layers[0].mlp.train()
    assert not same(snapshot(model), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, mistral])
def test_transformers_generates_as_before_while_we_decode(make: Any, attention: str) -> None:
    untouched = greedy(make(attn_implementation=attention))
    model = make(attn_implementation=attention)
    found = checked(model)
    assert greedy(model) == untouched
    found.reserve(2, 20)
    found.fill([[1, 2, 3], [4]])
    assert greedy(model) == untouched
    found.append(torch.tensor([[5, 6], [7, 8]]))
    assert greedy(model) == untouched  # between a draft and its verdict
    found.keep([1, 2])
    found.append(torch.tensor([[5, 6], [7, 8]]))


def test_several_caches_of_one_model_do_not_meet() -> None:
    model = llama()
    ours, theirs = checked(model), checked(model)
    for step in range(6):
        for one, rows in ((ours, 2), (theirs, 3)):
            one.reserve(rows, 30)
            one.append(torch.randint(61, (rows, 3), generator=torch.Generator().manual_seed(step)))
        ours.keep([step % 4, 3])
        theirs.keep([3, 0, step % 3])


def test_mask_builders_are_wrapped_once() -> None:
    HFLM(llama())
    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in hf.ATTENTION}
    HFLM(llama(1))
    HFLM(gpt2())
    for name, builder in before.items():
        assert isinstance(builder, hf._RaggedMasks) and not isinstance(builder.builder, hf._RaggedMasks)
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is builder


@pytest.mark.parametrize("make", [llama, gpt2, mistral])
def test_the_engine_gives_transformers_text(make: Any) -> None:
    target, draft = make(), make()
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    expected = greedy(target, 30)
    for drafter in (None, ModelDrafter(HFLM(draft)), ModelDrafter(HFLM(target))):
        output = Engine(HFLM(target), drafter).generate(PROMPTS, max_new_tokens=30)
        assert output.token_ids == expected
        assert drafter is None or output.stats.num_accepted_tokens > 0


# --- What a pass costs


def test_reading_a_prompt_computes_one_column_of_logits() -> None:
    model = llama()
    lm = HFLM(model)
    lm.reserve(2, 20)
    widths = []
    head = lm.model.get_submodule("lm_head")
    handle = head.register_forward_hook(lambda module, inputs, logits: widths.append(logits.shape[1]))
    lm.fill([[1, 2, 3, 4, 5], [6, 7]])
    lm.append(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    handle.remove()
    assert widths == [1, 3]


def test_the_probe_runs_once_per_kind_of_model(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []
    difference = probe._difference
    monkeypatch.setattr(
        probe, "_difference", lambda lm, model, *others: probed.append(model) or difference(lm, model, *others)
    )
    model = llama()
    for again in (model, llama(1)):
        HFLM(again)
    assert probed == [model]
    for other in (llama(rms_norm_eps=1e-3), llama().double(), llama(attn_implementation="eager"), gpt2()):
        HFLM(other)
        assert probed[-1] is other
    lm = HFLM(gpt2(2))
    assert lm.lengths == [] and lm.forward_seconds == 0 and not lm.cache.layers


def test_the_probe_spends_no_randomness() -> None:
    model = llama()
    before = torch.get_rng_state()
    HFLM(model)
    assert torch.equal(torch.get_rng_state(), before)


# --- What is refused


class ForgetsPositions(LlamaForCausalLM):
    """Counts positions as it likes."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        return super().forward(input_ids, past_key_values=past_key_values, **given)


class IgnoresMasks(LlamaForCausalLM):
    """Brings its own mask, as models older than the mask builders do: correct with a cache of equal rows."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        given.pop("attention_mask", None)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = seen + input_ids.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool).tril()[seen:].expand(len(input_ids), 1, -1, -1)
        return super().forward(
            input_ids, position_ids=position_ids, past_key_values=past_key_values, attention_mask=mask, **given
        )


class KeepsItsOwnCache(LlamaForCausalLM):
    """Ignores the cache that it is given."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids, **{**given, "use_cache": False})


class Raises(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        if past_key_values is not None:
            raise NotImplementedError("no cache like this one")
        return super().forward(input_ids, **given)


def other(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    small = {**SHAPE, "num_key_value_heads": 2}
    if kind in BROKEN:
        return BROKEN[kind](LlamaConfig(**small))
    if kind.startswith("gpt neo"):  # masks of its own for windows
        config = GPTNeoConfig(
            vocab_size=61,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=int(kind.removeprefix("gpt neo, window ")),
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        return GPTNeoForCausalLM(config)
    if kind == "llama 4":
        moe = {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8, "no_rope_layers": [0, 1]}
        return Llama4ForCausalLM(Llama4TextConfig(**{**small, **moe}))
    if kind == "roberta":  # positions begin behind the padding id
        return RobertaForCausalLM(RobertaConfig(**SHAPE, is_decoder=True))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
    if kind == "bart":
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForConditionalGeneration(BartConfig(vocab_size=61, d_model=32, **layers))
    assert kind == "no head"
    return LlamaModel(LlamaConfig(**small))


BROKEN: dict[str, type[LlamaForCausalLM]] = {
    "positions": ForgetsPositions,
    "masks": IgnoresMasks,
    "cache": KeepsItsOwnCache,
    "raises": Raises,
}
REASONS = {
    "positions": "logits of ragged passes differ by",
    "masks": "logits of ragged passes differ by",
    "cache": "RuntimeError",
    "raises": "NotImplementedError: no cache like this one",
    "gpt neo, window 4": "logits of ragged passes differ by",
    "gpt neo, window 32": "config has window_size of 32 and its masks have no window",  # longer than the probe
    "llama 4": "depend on the length of its cache",  # scales attention from token 8192 on, wherever a row's own is
    "mamba": "linear_attention.*keep a state",
    "bart": "encoder-decoder",
    "no head": "no language-model head",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_model_that_would_be_wrong_is_refused(kind: str) -> None:
    model = other(kind).eval()
    for _ in range(2):  # a refusal is not forgotten, and not taken for an admission
        with pytest.raises(ModelError, match=REASONS[kind]) as caught:
            HFLM(model)
        assert type(model).__name__ in str(caught.value)


@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize("kind", ["positions", "masks"])
def test_the_probe_sees_through_untrained_weights(kind: str, scale: float) -> None:
    """transformers' usual initialisation makes positions nearly invisible."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="differ by"):
        HFLM(BROKEN[kind](LlamaConfig(**{**SHAPE, "initializer_range": scale})).eval())


def test_recurrent_layers_among_others_are_refused() -> None:
    model = llama()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention keep a state that cannot forget"):
        HFLM(model)


def test_a_model_that_says_it_keeps_a_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(ModelError, match="recurrent keep a state"):
        HFLM(model)


def test_attention_without_a_mask_of_pairs_is_refused() -> None:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2.*sdpa, eager"):
        HFLM(model)


def test_weights_that_are_not_finite_are_refused_and_not_remembered() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="nan"):
        HFLM(model)
    HFLM(llama())


# --- Families with ways of their own


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_alibi_follows_the_rows(family: str) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bloom":
        found = checked(BloomForCausalLM(BloomConfig(**shape, initializer_range=0.3)))
        assert found.lm.context == probe.UNBOUNDED
    else:  # sizes a mask by the length that the cache reports
        found = checked(FalconForCausalLM(FalconConfig(**shape, alibi=True, initializer_range=0.3)))
    found.reserve(3, 30)
    found.fill([[1, 2, 3, 4, 5, 6, 7], [8], [9, 10]])
    for step in range(4):
        found.append(torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(step)))
        found.keep([step, 4, 1])


def test_a_window_that_is_never_reached_is_none() -> None:
    random_walk(checked(other("gpt neo, window 64")), steps=20, seed=0)


def test_positions_are_those_of_transformers_generate() -> None:
    """Those of a RoBERTa begin behind the padding id when it counts them itself, and at 0 in ``generate``."""
    model = other("roberta").eval()
    assert Engine(HFLM(model)).generate(PROMPTS, max_new_tokens=12).token_ids == greedy(model)


def test_rope_that_depends_on_the_batch_ends_the_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **{**SHAPE, "eos_token_id": 2},
        rope_parameters={**rope, "original_max_position_embeddings": 24},
        original_max_position_embeddings=24,
    )
    torch.manual_seed(0)
    found = checked(Phi3ForCausalLM(config))
    assert found.lm.context == 24
    random_walk(found, steps=20, seed=0)


def test_bfloat16_models_are_admitted() -> None:
    lm = HFLM(llama().to(torch.bfloat16))
    lm.reserve(1, 8)
    assert lm.append(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert lm.cache.layers[0][0].dtype == torch.bfloat16
