"""The benchmark of growth reads memory and slopes right: the lengths of the rows in blocks, linear 1, quadratic 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.native import native_lm
from specdec.nn.gpt import GPT

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import growth


@pytest.fixture
def model() -> tuple[CachedLM, int]:
    """A tiny model and the bytes it keeps of a token; heads of 16, which need no padding."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    lm = native_lm(GPT(config).eval())
    if not isinstance(lm, CpuLM):
        pytest.skip("blocks need the compiled pass, and this machine has no C compiler")
    per_token = growth.token_bytes(config, torch.float32)
    assert per_token == 2 * 2 * 2 * 16 * 4
    return lm, per_token


def test_memory_is_the_sum_of_lengths_in_blocks(model: tuple[CachedLM, int]) -> None:
    lm, per_token = model
    growth.settle(lm, [100, 64, 1, 130])
    assert lm.lengths == [100, 64, 1, 130]
    assert growth.held_bytes(lm) == per_token * (128 + 64 + 64 + 192)
    growth.settle(lm, [129, 20, 1, 130])  # one grows, one begins anew
    assert growth.held_bytes(lm) == per_token * (192 + 64 + 64 + 192)
    lm.copy(0, 1)  # shares two blocks, which count once
    assert growth.held_bytes(lm) == per_token * (192 + 64 + 64 + 192)


def test_cells_hold_what_they_need(
    model: tuple[CachedLM, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "PASSES", 2)
    lm, per_token = model
    wanted = list(growth.plan([256, 128], [2, 1], most_tokens=400))
    assert wanted == [[128], [256], [128, 128], [128, 64], [256, 64]]  # [256, 256] is too much
    cells = [growth.measure(lm, lengths, per_token) for lengths in wanted]
    for cell, lengths in zip(cells, wanted, strict=True):
        assert cell.live_tokens == sum(lengths) + 5 * len(lengths)  # three warm passes and two, a token each
        assert (cell.batch, cell.ragged) == (len(lengths), 64 in lengths)
        assert cell.exact_bytes == per_token * cell.live_tokens < cell.rounded_bytes == cell.held_bytes
    assert (cells[-1].held_bytes, cells[-1].rectangle_bytes) == (per_token * (320 + 128), per_token * 2 * 261)
    growth.draw(cells, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_slopes_of_made_up_numbers() -> None:
    live = [256.0, 512.0, 1024.0, 2048.0]
    assert growth.exponent(live, [3 * x for x in live]) == pytest.approx(1)
    assert growth.exponent(live, [0.1 * x * x for x in live]) == pytest.approx(2)
    assert growth.exponent(live, [7.0] * 4) == pytest.approx(0)


def test_the_line_through_made_up_cells() -> None:
    made_up = [
        growth.Cell(1, n, False, n, {growth.STEP: 2 + 0.01 * n, growth.VERIFY: n * n}, {}, 0, 0, 0, 0)
        for n in (100, 200, 400)
    ]
    step, verify = growth.fits(made_up)
    assert (step["us_per_live_token"], step["fixed_ms"]) == (pytest.approx(10), pytest.approx(2))
    assert step["exponent"] < 1 and verify["exponent"] == pytest.approx(2)
