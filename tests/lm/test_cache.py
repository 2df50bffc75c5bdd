"""The ragged cache: every row's keys and values at its own places, zeros everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.lm.cache import RaggedCache

HEADS, SIZE = 2, 3


def cache() -> RaggedCache:
    return RaggedCache(torch.float32, torch.device("cpu"))


def states(rows: int, tokens: int, seed: int, heads: int = HEADS, size: int = SIZE) -> Tensor:
    return torch.randn(rows, heads, tokens, size, generator=torch.Generator().manual_seed(seed))


def read(found: RaggedCache, lengths: list[int], tokens: int, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """One pass over one layer; what it stored."""
    new = states(len(lengths), tokens, seed), states(len(lengths), tokens, seed + 100)
    found.begin(lengths, tokens, first)
    found.update(0, *new)
    return new


def test_new_tokens_go_behind_each_rows_own() -> None:
    found = cache()
    old = read(found, [0, 0, 0], 5, seed=0)
    new = states(2, 2, 1), states(2, 2, 2)
    found.begin([3, 1], 2, 1)
    assert found.positions.tolist() == [[3, 4], [1, 2]]
    for stored, before, added in zip(found.update(0, *new), old, new, strict=True):
        assert stored.shape == (2, HEADS, 5, SIZE)
        assert torch.equal(stored[0], torch.cat([before[1, :, :3], added[0]], dim=1))
        assert torch.equal(stored[1, :, :3], torch.cat([before[2, :, :1], added[1]], dim=1))
    assert torch.equal(found.layers[0][0][0], old[0][0])  # row 0 took no part


def test_a_token_sees_what_is_before_it_and_itself() -> None:
    found = cache()
    found.begin([2, 0], 2, 0)
    assert found.live == 4
    assert found.visible.int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]]
    assert torch.equal(found.bias == 0, found.visible)
    assert torch.equal(found.bias == -torch.inf, ~found.visible)
    first = found.bias
    assert found.bias is first  # made once for all layers ...
    found.begin([0, 0], 2, 0)
    assert found.bias is not first  # ... of one pass


def test_layers_and_their_keys_and_values_may_have_any_shape() -> None:
    found = cache()
    found.begin([0, 0], 2, 0)
    for layer, heads in enumerate((1, 4, 4)):
        keys, values = states(2, 2, layer, heads, 5), states(2, 2, layer, heads, 7)
        stored = found.update(layer, keys, values)
        assert torch.equal(stored[0], keys) and torch.equal(stored[1], values)


@pytest.mark.parametrize(("rows", "capacity"), [(2, 9), (5, 3), (5, 9), (1, 1)])
def test_growing_keeps_what_is_stored_and_adds_zeros(rows: int, capacity: int) -> None:
    found = cache()
    found.reserve(2, 3)
    stored = read(found, [0, 0], 3, seed=0)
    found.reserve(rows, capacity)
    for buffer, expected in zip(found.layers[0], stored, strict=True):
        assert buffer.shape == (max(rows, 2), HEADS, max(capacity, 3), SIZE)
        assert torch.equal(buffer[:2, :, :3], expected)
        assert buffer.count_nonzero() == expected.count_nonzero()
    read(found, [3, 3], 2, seed=1)  # grows by itself, too
    assert torch.equal(found.layers[0][0][:2, :, :3], stored[0])


def test_a_copy_holds_nothing_of_its_place_before() -> None:
    found = cache()
    stored = read(found, [0, 0], 4, seed=0)
    found.layers[0][0][1] = torch.nan
    found.copy(0, 1, 3)
    assert torch.equal(found.layers[0][0][1, :, :3], stored[0][0, :, :3])
    assert not found.layers[0][0][1, :, 3:].any()
    assert torch.equal(found.layers[0][1][0], stored[1][0])


def test_wiping_zeroes_the_rows_and_no_other() -> None:
    found = cache()
    stored = read(found, [0, 0, 0], 4, seed=0)
    found.layers[0][1][1] = torch.nan
    found.wipe(1, 2)
    for buffer, before in zip(found.layers[0], stored, strict=True):
        assert not buffer[1].any()
        assert torch.equal(buffer[0], before[0]) and torch.equal(buffer[2], before[2])
