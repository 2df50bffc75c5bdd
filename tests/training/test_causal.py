"""Attention for training on CPU: torch's own, forward and backward, for every length and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.nn.causal import causal_attention


def inputs(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, n, length, 16) for n in (heads, groups, groups, heads)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def run(ours: bool, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    queries, keys, values, gradient = tensors
    leaves = [x.clone().requires_grad_() for x in (queries, keys, values)]
    if ours:
        mixed = causal_attention(*leaves)
        assert type(mixed.grad_fn).__name__ == "_BlockwiseAttentionBackward"
    else:
        mixed = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, gradient)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_it_is_torchs_attention(length: int, heads: int, groups: int) -> None:
    tensors = inputs(length, heads, groups, torch.float32)
    for found, expected in zip(run(True, tensors), run(False, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_about_as_exact_as_torchs() -> None:
    tensors = inputs(300, 4, 2, torch.bfloat16)
    exact = run(False, [x.float() for x in tensors])
    ours, theirs = (
        [float((x.float() - y).norm() / y.norm()) for x, y in zip(run(which, tensors), exact, strict=True)]
        for which in (True, False)
    )
    assert all(own < 3 * other + 1e-3 for own, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_dropout_and_inference_are_torchs() -> None:
    queries, keys, values, _ = inputs(40, 4, 2, torch.float32)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    assert torch.equal(causal_attention(queries, keys, values), expected)
    torch.manual_seed(0)
    dropped = causal_attention(queries.requires_grad_(), keys, values, 0.5)
    assert not torch.allclose(dropped, expected, atol=0.01)
