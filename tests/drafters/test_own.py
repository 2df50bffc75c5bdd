"""A target that drafts for itself: cheaper ways over its own cache, and never another text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec import ConfigError, Engine
from specdec.drafters import own
from specdec.drafters.own import SelfDrafter, spared_layers
from specdec.lm.cpu import CpuLM
from specdec.lm.native import NativeLM
from specdec.lm.paged import BLOCK
from specdec.lm.view import CpuView
from specdec.nn.gpt import GPT
from toys import tiny_gpt

LONG = [[1, 2, 3], [7, 8, 9, 10] * 60, [11], [5, 4, 3] * 30]
WAYS: dict[str, dict[str, Any]] = {
    "all": {"in_bytes": False, "window": None},
    "bytes": {"window": None},
    "window": {"in_bytes": False, "window": 64},
    "layers": {"in_bytes": False, "window": None, "layers": [0, 2]},
    "default": {},
}


def model(dtype: torch.dtype = torch.float32) -> GPT:
    return tiny_gpt(0, context=1024, layers=3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_text_is_that_of_plain_decoding(dtype: torch.dtype, settings: dict[str, Any], batch: int) -> None:
    prompts, wanted = LONG[:batch], {"max_new_tokens": [40, 150, 7, 90][:batch], "max_batch_size": 3, **settings}
    plain = Engine(CpuLM(model(dtype))).generate(prompts, **wanted)
    lengths = {}
    for name, way in WAYS.items():
        target = CpuLM(model(dtype))
        found = Engine(target, SelfDrafter(target, **way)).generate(prompts, num_draft_tokens=4, **wanted)
        assert found.token_ids == plain.token_ids, name
        lengths[name] = found.stats.acceptance_rate
    assert lengths["all"] == 1 and lengths["bytes"] > 0.7 and 0 < lengths["layers"] < 0.9


@torch.inference_mode()
def test_a_window_sees_the_first_block_and_the_latest_ones() -> None:
    """Against attention over exactly those tokens: the keys in between do not count, whatever they are."""
    target = CpuLM(model())
    text = [(7 * i) % 61 for i in range(6 * BLOCK + 10)]
    target.reserve(1, 1000)
    target.fill([text])
    view = CpuView(target, window=BLOCK)
    view.reserve(1, 1000)
    seen = view.append(torch.tensor([[3, 4]]))
    view.release()
    for block in target.cache.rows[0][1:5]:
        block.zero_()
    torch.testing.assert_close(view.append(torch.tensor([[3, 4]])), seen)
    view.release()
    target.cache.rows[0][5].zero_()  # the negative control: this one is within the window
    assert (view.append(torch.tensor([[3, 4]])) - seen).abs().max() > 1e-3


def test_a_short_text_is_seen_whole() -> None:
    target = CpuLM(model())
    target.reserve(1, 200)
    target.fill([[1, 2, 3] * 20])
    view = CpuView(target, window=BLOCK)
    view.reserve(1, 200)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(view.append(tokens), target.append(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_weights_in_127_steps(dtype: torch.dtype) -> None:
    """Logits of the view are those of a model whose weights are rounded so."""
    rounded = model(dtype)
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    for name, weight in rounded.named_parameters():
        if name.split(".")[-2] in names:
            scale = weight.float().abs().amax(1, keepdim=True) / 63
            weight.data = ((weight.float() / scale).round() * scale).to(
                dtype if dtype == torch.float32 else torch.float32
            )
    target, text = CpuLM(model(dtype)), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    target.reserve(1, 60)
    view = CpuView(target, in_bytes=True)
    view.reserve(1, 60)
    found = view.append(text)[0]
    rounded = rounded.float()
    expected = rounded.lm_head(rounded(text))[0]
    exact = model(dtype).float()
    error = (found - expected).abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 0.35)
    if dtype == torch.float32:  # the negative control: the rounding is large enough to be seen
        assert (exact.lm_head(exact(text))[0] - expected).abs().max() > 20 * error


def test_layers_are_spared_where_they_do_nothing() -> None:
    """Two of five layers add nothing to the residual stream, and are found."""
    useless = tiny_gpt(1, layers=5)
    for layer in (1, 3):
        useless.layers[layer].self_attn.o_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
        useless.layers[layer].mlp.down_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
    target = CpuLM(useless)
    kept = spared_layers(target, [(7 * i) % 61 for i in range(112)])
    assert set(kept) <= {0, 2, 4} and not any(target.lengths)


def test_what_cannot_draft_for_itself_is_said() -> None:
    with pytest.raises(ConfigError, match="compiled"):
        SelfDrafter(NativeLM(model()))
    target = CpuLM(model())
    for layers in ([], [3], [1, 0], [0, 0]):
        with pytest.raises(ConfigError, match="rising order"):
            SelfDrafter(target, layers=layers)
    with pytest.raises(ConfigError, match="window"):
        SelfDrafter(target, window=0)
    with pytest.raises(ConfigError, match="at least"):
        spared_layers(target, [1, 2])


def test_gain_is_leviathans() -> None:
    assert own._gain(1.0, 0.0) == own.LONGEST_DRAFT + 1 and own._gain(0.0, 0.5) == 1.0
