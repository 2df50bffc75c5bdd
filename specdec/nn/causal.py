"""Causal self-attention for training on CPU: blocks of queries against all keys before them, as matrix products.

torch's fused CPU kernel computes at a fraction of what oneDNN's products reach, in bfloat16 above all. Here a block of
queries is one batched product with its keys. Attention weights of long rows are computed again for the backward pass, so
that memory does not grow with the square of the length (as in FlashAttention, Dao et al. 2022).

Shapes: B rows, H query heads, G key/value heads, R = H / G, T tokens, D head size, N = B * G.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_KEPT = 1024  # tokens of rows whose weights are kept: 1.3 MB per head in bfloat16 at most
_BLOCK = 128  # queries at a time: half of what is above the diagonal of longer ones would be computed for nothing


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of queries [B, H, T, D] over keys and values [B, G, T, D]; [B, H, T, D].

    On CPU, when gradients are wanted and nothing is dropped, it is ours; else torch's.
    """
    if queries.device.type == "cpu" and not dropout and torch.is_grad_enabled() and queries.requires_grad:
        mixed: Tensor = _BlockwiseAttention.apply(queries, keys, values)
        return mixed
    gqa = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True, enable_gqa=gqa)


class _BlockwiseAttention(torch.autograd.Function):
    """Query heads of a group are stacked along T, so that keys and values are never repeated."""

    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, heads, length, size = queries.shape
        groups = keys.shape[1]
        ctx.shape = queries.shape  # type: ignore[attr-defined]
        queries = (queries * size**-0.5).reshape(rows * groups, heads // groups, length, size)
        keys, values = (x.reshape(rows * groups, length, size) for x in (keys, values))
        ctx.save_for_backward(queries, keys, values)
        mixed = torch.empty_like(queries)
        ctx.kept = []  # type: ignore[attr-defined]
        for begin, end in _blocks(length):
            weights = _weights(queries, keys, begin, end)
            if length <= _KEPT:
                ctx.kept.append(weights)  # type: ignore[attr-defined]
            mixed[:, :, begin:end] = (weights @ values[:, :end]).view(mixed[:, :, begin:end].shape)
        return mixed.view(rows, heads, length, size)

    @staticmethod
    def backward(ctx: FunctionCtx, *output_gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, heads, length, size = ctx.shape  # type: ignore[attr-defined]
        mixed_gradient = output_gradients[0].reshape(queries.shape)
        query_gradient = torch.empty_like(queries)
        key_gradient, value_gradient = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        kept = iter(ctx.kept)  # type: ignore[attr-defined]
        for begin, end in _blocks(length):
            weights = next(kept) if length <= _KEPT else _weights(queries, keys, begin, end)
            gradient = mixed_gradient[:, :, begin:end].flatten(1, 2)
            value_gradient[:, :end] += weights.transpose(1, 2) @ gradient
            weight_gradient = gradient @ values[:, :end].transpose(1, 2)
            scores = torch._softmax_backward_data(weight_gradient, weights, -1, weights.dtype)
            query_gradient[:, :, begin:end] = (scores @ keys[:, :end]).view(query_gradient[:, :, begin:end].shape)
            key_gradient[:, :end] += scores.transpose(1, 2) @ queries[:, :, begin:end].flatten(1, 2)
        shape = (rows, -1, length, size)
        return (
            query_gradient.mul_(size**-0.5).view(rows, heads, length, size),
            key_gradient.to(keys.dtype).view(shape),
            value_gradient.to(values.dtype).view(shape),
        )


def _weights(queries: Tensor, keys: Tensor, begin: int, end: int) -> Tensor:
    """Attention weights [N, R * (end - begin), end] of a block of queries [N, R, T, D]."""
    block = queries[:, :, begin:end]
    scores = block.flatten(1, 2) @ keys[:, :end].transpose(1, 2)
    later = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
    scores.view(*block.shape[:3], end)[..., begin:].masked_fill_(later, float("-inf"))
    return scores.softmax(-1)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK))
