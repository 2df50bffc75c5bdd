"""What training does between a block's products on CPU, forward and backward: train.c, compiled when first needed.

torch runs these as many small operations, each of which reads and writes everything; here they are one each. Every
function returns None where torch must do it: no compiler, another device or dtype, no gradients wanted, odd sizes.

Shapes: B rows, T tokens, N = B * T, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from specdec.nn.compiled import compiled

LANES, TOGETHER = 16, 64  # as in vectors.h and train.c
WORTH_A_THREAD = 2**14  # numbers, some tens of microseconds


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for models of ``dtype``; None where there are none."""
    found = compiled("train.c", dtype=dtype, purpose="training")
    if found is not None:
        found.wide.restype = found.attention_scratch.restype = c_int64
    return found


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """The compiled functions for ``x``, when it is to be trained with; None where torch does it."""
    trained = x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()
    return None if not trained or torch.compiler.is_compiling() else library(x.dtype)


def _pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())


def _threads(numbers: int) -> c_int64:
    return c_int64(min(torch.get_num_threads(), 1 + numbers // WORTH_A_THREAD))


class RMSNorm(nn.RMSNorm):
    """torch's, in one pass each way where it is trained on CPU."""

    def forward(self, x: Tensor) -> Tensor:
        size, weight = x.shape[-1], self.weight
        kernels = None if size % LANES or weight.dtype != x.dtype or self.eps is None else library_for(x)
        if kernels is None:
            return super().forward(x)
        normed: Tensor = _Norm.apply(x, weight, self.eps, kernels)
        return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ctypes.CDLL) -> Tensor:
        x, size = x.contiguous(), x.shape[-1]
        tokens, normed = x.numel() // size, torch.empty_like(x)
        scales = torch.empty(tokens, dtype=torch.float32)
        kernels.norm_forward(
            c_int64(tokens), c_int64(size), c_float(eps), _pointer(x), _pointer(weight), _pointer(normed),
            _pointer(scales), _threads(x.numel()),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scales)
        ctx.kernels = kernels
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        gradient, size = gradient.contiguous(), x.shape[-1]
        tokens, found = len(scales), torch.empty_like(x)
        parts = torch.empty(-(-tokens // TOGETHER), size, dtype=torch.float32)
        ctx.kernels.norm_backward(
            c_int64(tokens), c_int64(size), _pointer(x), _pointer(weight), _pointer(scales), _pointer(gradient),
            _pointer(found), _pointer(parts), _threads(x.numel()),
        )  # fmt: skip
        return found, parts.sum(0).to(weight.dtype), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., I] of gate and up, one after the other, [..., 2 I]."""
    kernels = None if gate_up.shape[-1] % (2 * LANES) else library_for(gate_up)
    if kernels is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gated: Tensor = _SwiGLU.apply(gate_up, kernels)
    return gated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernels: ctypes.CDLL) -> Tensor:
        gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
        gated = gate_up.new_empty(*gate_up.shape[:-1], size)
        tokens = c_int64(gated.numel() // size)
        kernels.swiglu_forward(tokens, c_int64(size), _pointer(gate_up), _pointer(gated), _threads(gated.numel()))
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gradient, found, size = gradient.contiguous(), torch.empty_like(gate_up), gate_up.shape[-1] // 2
        ctx.kernels.swiglu_backward(
            c_int64(gradient.numel() // size), c_int64(size), _pointer(gate_up), _pointer(gradient), _pointer(found),
            _threads(gradient.numel()),
        )  # fmt: skip
        return found, None


def losses_and_gradients(logits: list[Tensor], labels: Tensor, weight: float, scale: float) -> Tensor | None:
    """Losses [1 or 2, N] of the logits [N, V] of target and draft, which become their gradients times ``scale``.

    ``weight`` is that of the divergence in the draft's loss; see training/objective.py, which calls this.
    """
    alike = logits[0].device.type == "cpu" and logits[0].dtype == logits[-1].dtype
    kernels = library(logits[0].dtype) if alike else None
    if kernels is None:
        return None
    (tokens, vocabulary), labels = logits[0].shape, labels.contiguous()
    found = torch.empty(len(logits), tokens, dtype=torch.float32)
    kernels.losses(
        c_int64(tokens), c_int64(vocabulary), _pointer(labels), c_float(weight), c_float(scale),
        _pointer(logits[0]), _pointer(logits[1] if len(logits) > 1 else None), _pointer(found),
        _threads(logits[0].numel()),
    )  # fmt: skip
    return found


class Attention(Structure):
    """One call of train.c's attention; see there."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "heads", "groups", "size", "documents", "longest")),
        *((name, c_void_p) for name in ("begins", "cosines", "sines")),
        ("angles", c_int64),
        *((name, c_void_p) for name in ("qkv", "mixed", "logs", "mixed_gradient", "key_parts", "value_parts")),
        *((name, c_void_p) for name in ("gradient", "scratch")),
        *((name, c_int64) for name in ("scratch_size", "threads")),
    ]


def attention(qkv: Tensor, groups: int, rope: tuple[Tensor, Tensor], sizes: list[int] | None) -> Tensor | None:
    """Causal attention [B, T, H, D] of queries, keys and values [B, T, H + 2 G, D] that are not turned yet.

    ``rope`` are cosines and sines [1 or B, T, 1, D]; ``sizes`` are the tokens of every document, row after row, or None
    where every row is one.
    """
    kernels = None if qkv.shape[-1] % (2 * LANES) else library_for(qkv)
    if kernels is None or not kernels.wide() or rope[0].dtype != qkv.dtype:
        return None
    mixed: Tensor = _Attention.apply(qkv, groups, *rope, sizes or [qkv.shape[1]] * len(qkv), kernels)
    return mixed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, groups: int, cosines: Tensor, sines: Tensor, sizes: list[int], kernels: ctypes.CDLL
    ) -> Tensor:
        qkv = qkv.contiguous()
        rows, length, heads, size = qkv.shape
        heads -= 2 * groups
        mixed = qkv.new_empty(rows, length, heads, size)
        logs = torch.empty(heads, rows * length, dtype=torch.float32)
        begins = F.pad(torch.tensor(sizes).cumsum(0), (1, 0))
        saved = qkv, mixed, logs, begins, cosines.contiguous(), sines.contiguous()
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.longest, ctx.kernels = groups, max(sizes), kernels
        described, _scratch = _described(ctx, *saved)
        kernels.attention_forward(ctypes.byref(described))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, mixed, *_ = ctx.saved_tensors
        gradient, found = gradient.contiguous(), torch.empty_like(qkv)
        key_parts, value_parts = (torch.empty(mixed.shape, dtype=torch.float32) for _ in range(2))
        described, _scratch = _described(ctx, *ctx.saved_tensors)
        described.mixed_gradient, described.gradient = gradient.data_ptr(), found.data_ptr()
        described.key_parts, described.value_parts = key_parts.data_ptr(), value_parts.data_ptr()
        ctx.kernels.attention_backward(ctypes.byref(described))
        return found, *(None,) * 5


def _described(
    ctx: Any, qkv: Tensor, mixed: Tensor, logs: Tensor, begins: Tensor, cosines: Tensor, sines: Tensor
) -> tuple[Attention, Tensor]:
    """What train.c reads, and the scratch that must live as long."""
    _, tokens = logs.shape
    heads, size = mixed.shape[-2:]
    found = Attention(
        tokens, heads, ctx.groups, size, len(begins) - 1, ctx.longest, begins.data_ptr(), cosines.data_ptr(),
        sines.data_ptr(), cosines.numel() // size, qkv.data_ptr(), mixed.data_ptr(), logs.data_ptr(),
    )  # fmt: skip
    found.threads = _threads(qkv.numel()).value
    found.scratch_size = ctx.kernels.attention_scratch(ctypes.byref(found))
    scratch = torch.empty(found.threads * found.scratch_size, dtype=torch.uint8)
    found.scratch = scratch.data_ptr()
    return found, scratch
