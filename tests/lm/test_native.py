"""Our GPT is Hugging Face's Llama and its kin: same weights, same logits, with and without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ragged import Checked, random_walk
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from specdec.errors import ModelError
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.hf import HFLM
from specdec.lm.native import NativeLM
from specdec.nn.gpt import GPT, state_from_hf, state_to_hf
from toys import tiny_gpt

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one head per group": {"num_key_value_heads": 4},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "other base and epsilon": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rms_norm_eps": 1e-2,
    },
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "Mistral": {"kind": MistralConfig, "sliding_window": None},
    "Mistral with a window of its context": {"kind": MistralConfig, "sliding_window": 64, "head_dim": 16},
    "Mistral with fields that it never reads": {"kind": MistralConfig, "attention_bias": True, "mlp_bias": True},
    "Qwen2": {"kind": Qwen2Config},
    "Qwen2, tied": {"kind": Qwen2Config, "tie_word_embeddings": True},
    "Qwen3": {"kind": Qwen3Config, "head_dim": 16, "rms_norm_eps": 1e-2},
    "Qwen3, tied, with biases": {
        "kind": Qwen3Config,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}


class ChangedConfig(LlamaConfig):
    """Somebody's architecture that began as a Llama."""


def config(kind: type[PreTrainedConfig] = LlamaConfig, **changes: Any) -> PreTrainedConfig:
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return kind(**{**shape, **changes})


def pair(changes: dict[str, Any]) -> tuple[PreTrainedModel, GPT]:
    """The same random weights in both."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config(**changes)).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.add_(torch.randn_like(weight) * 0.3)
    ours = GPT(theirs.config).eval().requires_grad_(False)
    ours.load_state_dict(state_from_hf(theirs.state_dict(), theirs.config))
    return theirs, ours


def tokens(rows: int, width: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(61, (rows, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str) -> None:
    theirs, ours = pair(VARIANTS[variant])
    text = tokens(2, 40)
    expected = theirs(text, use_cache=False).logits
    torch.testing.assert_close(ours.lm_head(ours(text)), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))

    for lm in (NativeLM(ours), CpuLM(ours), HFLM(theirs)):
        checked = Checked(lm, lambda row: theirs(torch.tensor([row]), use_cache=False).logits[0], tolerance=1e-5)
        random_walk(checked, steps=12, seed=1)


def test_scaled_frequencies_matter_here() -> None:
    """Otherwise the variants above would prove nothing."""
    logits = []
    for variant in ("plain", "linear rope", "llama3 rope", "other base and epsilon"):
        torch.manual_seed(0)
        logits.append(LlamaForCausalLM(config(**VARIANTS[variant])).eval()(tokens(1, 40)).logits)
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [
        ("attention biases", {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"}),
        ("mlp biases", {"gate_proj.bias", "up_proj.bias", "down_proj.bias"}),
        ("Qwen2", {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
        ("Qwen3", {"q_norm.weight", "k_norm.weight"}),
    ],
)
def test_the_weights_that_not_all_families_have_matter_here(variant: str, kinds: set[str]) -> None:
    theirs, ours = pair(VARIANTS[variant])
    before = ours.lm_head(ours(tokens(1, 40)))
    state = theirs.state_dict()
    plain = {name.partition("layers.0.")[2] for name in LlamaForCausalLM(config()).state_dict()}
    found = [name for name in state if "layers.0." in name and name.partition("layers.0.")[2] not in plain]
    assert {".".join(name.split(".")[-2:]) for name in found} == kinds
    for name in found:
        ours.load_state_dict(state_from_hf({**state, name: torch.zeros_like(state[name])}, theirs.config))
        assert (ours.lm_head(ours(tokens(1, 40))) - before).abs().max() > 0.1, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_convert_both_ways(variant: str) -> None:
    theirs, ours = pair(VARIANTS[variant])
    converted = state_to_hf(ours)
    tied = theirs.config.tie_word_embeddings
    expected = {name: w for name, w in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) and converted[name].is_contiguous() for name in expected)

    back = state_from_hf(converted, theirs.config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in ours.state_dict().items())
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"kind": Qwen3MoeConfig},
            "Qwen3MoeConfig: it is none of LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config",
        ),
        ({"kind": ChangedConfig}, "ChangedConfig: it is none of"),
        ({"kind": MistralConfig, "sliding_window": 63}, "sliding window of 63"),
        ({"kind": Qwen2Config, "use_sliding_window": True, "sliding_window": 9}, "sliding window of 9"),
        ({"kind": Qwen3Config, "use_sliding_window": True, "max_window_layers": 1}, "full_attention"),
        ({"kind": Qwen2Config, "quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        GPT(config(**changes))


@pytest.mark.parametrize("way", [NativeLM, CpuLM])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_the_given_model_is_left_alone(changes: dict[str, Any], way: type[CachedLM]) -> None:
    _, model = pair(changes)
    model.train()
    before = copy.deepcopy(model.state_dict())
    lm = way(model)
    lm.reserve(1, 8)
    lm.fill([[1, 2, 3]])
    lm.append(tokens(1, 2))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith(("proj", "head")))
    model.requires_grad_(True)
    model.lm_head(model(tokens(1, 4))).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("variant", ["attention biases", "mlp biases", "Qwen2", "Qwen3"])
def test_a_new_model_begins_as_transformers_begins_it(variant: str) -> None:
    for name, weight in GPT(config(**VARIANTS[variant])).state_dict().items():
        if name.endswith("bias") or "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name


def test_dropout_acts_in_training_only() -> None:
    model = GPT(config(), dropout=0.5)
    text = tokens(1, 8)
    assert not torch.equal(model(text), model(text))
    checked = Checked(NativeLM(model), lambda row: model.eval().lm_head(model(torch.tensor([row])))[0].detach())
    random_walk(checked, steps=10, seed=0)


@pytest.mark.parametrize("variant", ["llama3 rope", "Qwen2", "Qwen3"])
def test_bfloat16_is_as_near_to_float32_as_transformers(variant: str) -> None:
    theirs, ours = pair(VARIANTS[variant])
    exact = ours.lm_head(ours(tokens(1, 60)))
    coarse = NativeLM(copy.deepcopy(ours).bfloat16()).model
    reference = copy.deepcopy(theirs).to(torch.bfloat16)
    error = (coarse.lm_head(coarse(tokens(1, 60))).float() - exact).square().mean().sqrt()
    usual = (reference(tokens(1, 60)).logits.float() - exact).square().mean().sqrt()
    assert error < 1.5 * usual


def test_the_cache_is_as_wide_as_the_model_and_no_wider() -> None:
    lm = NativeLM(tiny_gpt(0, context=64))
    lm.reserve(3, 10)
    lm.fill([[1, 2], [3], [4]])
    assert [tuple(buffer.shape) for buffer in lm.cache.layers[1]] == [(3, 2, 10, 8)] * 2
