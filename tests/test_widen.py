"""A widened checkpoint computes what its source computes, at a larger model's cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import specdec
from specdec import ConfigError
from specdec.widen import Width, widen, widen_state

WIDTH = Width(hidden_size=192, intermediate_size=320)
TOLERANCE = 1e-4  # of the logits' spread, in float32


def logits(model: torch.nn.Module, vocab_size: int) -> Tensor:
    tokens = torch.randint(vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: Tensor = model.eval()(tokens).logits
    return found


def difference(model: torch.nn.Module, wide: torch.nn.Module, vocab_size: int) -> float:
    """The largest difference of logits, in units of their standard deviation."""
    ours, theirs = logits(model, vocab_size), logits(wide, vocab_size)
    return float((ours - theirs).abs().max() / ours.std())


def test_a_widened_checkpoint_computes_the_same(tiny_pair: Path, tmp_path: Path) -> None:
    source = tiny_pair / "target"
    parameters = widen(source, tmp_path / "wide", WIDTH, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert parameters == wide.num_parameters() > 2 * model.num_parameters()
    assert difference(model, wide, model.config.vocab_size) <= TOLERANCE
    text = "def main("
    assert AutoTokenizer.from_pretrained(tmp_path / "wide")(text) == AutoTokenizer.from_pretrained(source)(text)
    ours, theirs = (
        specdec.generate(path, text, max_new_tokens=24, dtype="float32") for path in (source, tmp_path / "wide")
    )
    assert ours.token_ids == theirs.token_ids


def random_llama(*, heads: int, groups: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups, initializer_range=0.3, tie_word_embeddings=tied, rms_norm_eps=1e-2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    return model


def widened(model: LlamaForCausalLM, width: Width, *, rescale_norms: bool = True) -> LlamaForCausalLM:
    config = width.of(model.config)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    wide = LlamaForCausalLM(config)
    wide.load_state_dict(widen_state(state, model.config, config, rescale_norms=rescale_norms), strict=False)
    wide.tie_weights()
    return wide


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [
        (4, 2, Width(96, 80)),
        (4, 2, Width(112, 48)),
        (4, 4, Width(64, 48, num_attention_heads=8, num_key_value_heads=4)),
        (4, 1, Width(32, 200, num_attention_heads=12, num_key_value_heads=2)),
        (2, 2, Width(48, 48, num_attention_heads=9, num_key_value_heads=3)),
    ],
)
def test_any_grouping_of_heads_can_be_widened(heads: int, groups: int, width: Width, tied: bool) -> None:
    model = random_llama(heads=heads, groups=groups, tied=tied)
    wide = widened(model, width)
    assert wide.num_parameters() > model.num_parameters()
    assert difference(model, wide, 50) <= TOLERANCE


def test_the_comparison_sees_a_wrong_widening() -> None:
    model = random_llama(heads=4, groups=2, tied=False)
    width = Width(96, 80)
    assert difference(model, widened(model, width, rescale_norms=False), 50) > 100 * TOLERANCE
    same_epsilon = widened(model, width)
    for module in same_epsilon.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps
    assert difference(model, same_epsilon, 50) > TOLERANCE
    leaking = widened(model, width)
    with torch.no_grad():
        leaking.model.layers[0].self_attn.o_proj.weight[:32, -1] = 1.0  # what an added head says comes through
    assert difference(model, leaking, 50) > TOLERANCE


def test_added_weights_are_not_zeros_that_a_backend_could_skip(tiny_pair: Path, tmp_path: Path) -> None:
    widen(tiny_pair / "target", tmp_path, WIDTH)
    state = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert all(
        bool((tensor != 0).any(1).all())
        for name, tensor in state.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"))
    )


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (Width(16, 48), "hidden_size must be at least the source's 32, got 16"),
        (Width(64, 8), "intermediate_size"),
        (Width(64, 48, num_attention_heads=6, num_key_value_heads=4), "multiple of num_key_value_heads"),
        (Width(64, 48, num_attention_heads=4, num_key_value_heads=4), "at least 2 times as many"),
    ],
)
def test_sizes_that_cannot_be_say_so(width: Width, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        width.of(random_llama(heads=4, groups=2, tied=False).config)


def test_the_command_writes_a_checkpoint(tiny_pair: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specdec.widen", tiny_pair / "target", tmp_path / "wide", "--hidden-size=128"]
    done = subprocess.run([*command, "--intermediate-size=256"], capture_output=True, text=True, check=True)
    assert str(tmp_path / "wide") in done.stdout
    config = LlamaConfig.from_pretrained(tmp_path / "wide")
    assert (config.hidden_size, config.intermediate_size) == (128, 256)
    failed = subprocess.run([*command, "--intermediate-size=1"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "intermediate_size must be at least" in failed.stderr
