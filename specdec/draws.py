"""Draws and verdicts on CPU without torch's many small operations: draws.c, compiled when first needed.

Every function returns None where torch must do it: another device or dtype, no compiler, or a decision so close that the
order in which torch adds up could matter. What they do return is what torch would; see draws.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specdec.compiled import compiled

MOST = 64  # draft tokens of a row, as in draws.c
SOURCES = tuple(Path(__file__).parent / name for name in ("draws.c", "nn/vectors.h"))
RULES = {"rejection": 0, "block": 1, "coupled": 2}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none. Products and sums must be rounded as torch rounds them."""
    found = compiled(*SOURCES, flags=("-ffp-contract=off",), purpose="sampling")
    if found is not None:
        found.uniforms.argtypes = [*[c_int64] * 2, *[c_void_p] * 3]
        found.draw.argtypes = [*[c_int64] * 2, c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 2, c_void_p]
        found.largest.argtypes = [*[c_int64] * 2, c_void_p, c_int64, c_void_p]
        found.greedy.argtypes = [*[c_int64] * 2, *[c_void_p] * 4]
        found.verdict.argtypes = [*[c_int64] * 4, *[c_void_p] * 7]
        found.draw.restype = found.verdict.restype = c_int64
    return found


class _Drafting(Structure):
    """As in draws.c."""

    _fields_ = [*((name, c_int64) for name in ("count", "races")),
                *((name, c_void_p) for name in ("temperatures", "seeds", "text_lengths", "laws"))]  # fmt: skip


class Drawing:
    """How a draft model draws what it goes on with: of the softmax of its logits / temperature, row by row.

    temperatures (float32), seeds and text_lengths [B], on the processor; the laws go into ``laws`` [B, K, V].
    ``coupled``: with the noise of the target's draws. Where ``laws`` are on the processor too, ``function`` and ``asked``
    are addresses of a ``Choose`` of nn/cpu.c and of what it wants to know; None elsewhere.
    """

    def __init__(
        self, temperatures: Sequence[float], seeds: Tensor, text_lengths: Tensor, laws: Tensor, *, coupled: bool
    ) -> None:
        self.temperatures = torch.tensor(temperatures, dtype=torch.float32)
        self.seeds, self.text_lengths, self.laws, self.coupled = (
            seeds.contiguous(),
            text_lengths.contiguous(),
            laws,
            coupled,
        )
        self.function: int | None = None
        self.asked: int | None = None
        if laws.is_cpu and (compiled := library()) is not None:
            given = self.temperatures, self.seeds, self.text_lengths, laws
            self._described = _Drafting(laws.shape[1], coupled, *(part.data_ptr() for part in given))
            self.function = ctypes.cast(compiled.choose_drawn, c_void_p).value
            self.asked = ctypes.addressof(self._described)


def uniforms(seeds: Tensor, text_lengths: Tensor, count: int) -> Tensor | None:
    """Uniforms [2, B, count] of rows with ``seeds`` and ``text_lengths`` [B]: those that accept, and those that draft."""
    if not seeds.is_cpu or (compiled := library()) is None:
        return None
    seeds, text_lengths = seeds.contiguous(), text_lengths.contiguous()
    rows = seeds.shape[0]
    out = torch.empty(2, rows, count, dtype=torch.float64)
    compiled.uniforms(rows, count, seeds.data_ptr(), text_lengths.data_ptr(), out.data_ptr())
    return out


def draw(laws: Tensor, seeds: Tensor, text_lengths: Tensor, place: int, *, coupled: bool) -> Tensor | None:
    """Tokens [B, 1], number ``place`` of those drafted in a step, drawn from their laws [B, 1, V]."""
    if not laws.is_cpu or laws.dtype != torch.float32 or laws.stride(2) != 1 or (compiled := library()) is None:
        return None
    seeds, text_lengths = seeds.contiguous(), text_lengths.contiguous()
    rows, _, vocab_size = laws.shape
    tokens = torch.empty(rows, 1, dtype=torch.long)
    pointers = seeds.data_ptr(), text_lengths.data_ptr(), place, coupled, tokens.data_ptr()
    is_sure = compiled.draw(rows, vocab_size, laws.data_ptr(), laws.stride(0), *pointers)
    return tokens if is_sure else None


def verdict(
    rule: str,
    target_probs: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    probs: Tensor | None,
    seeds: Tensor,
    text_lengths: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Accepted [B] and next_token [B] of a rule; arguments as those of a ``Draft``."""
    rows, positions, vocab_size = target_probs.shape
    if not target_probs.is_cpu or target_probs.dtype != torch.float32 or (compiled := library()) is None:
        return None
    if tokens.shape != (rows, positions - 1) or not (tokens.is_cpu and tokens.dtype == lengths.dtype == torch.long):
        return None
    if probs is not None and (probs.shape != (*tokens.shape, vocab_size) or probs.dtype != torch.float32):
        return None
    given = [target_probs.contiguous(), None if probs is None else probs.contiguous()]
    given += [part.contiguous() for part in (tokens, lengths, seeds, text_lengths)]
    found = torch.empty(2, rows, dtype=torch.long)
    pointers = [0 if part is None else part.data_ptr() for part in (*given, found)]
    is_sure = compiled.verdict(RULES[rule], rows, positions - 1, vocab_size, *pointers)
    return (found[0], found[1]) if is_sure else None


def largest(logits: Tensor) -> Tensor | None:
    """Tokens [B, T] of the largest of logits [B, T, V]; -1 where that is NaN or infinite."""
    if not logits.is_cpu or logits.dtype != torch.float32 or (compiled := library()) is None:
        return None
    rows, positions, vocab_size = logits.shape
    stride = logits.stride(1)
    if logits.stride(2) != 1 or logits.stride(0) != positions * stride:
        return None
    tokens = torch.empty(rows, positions, dtype=torch.long)
    compiled.largest(rows * positions, vocab_size, logits.data_ptr(), stride, tokens.data_ptr())
    return tokens


def greedy(tokens: Tensor, lengths: Tensor, largest: Tensor) -> tuple[Tensor, Tensor] | None:
    """Accepted [B] and next_token [B] where the target's laws give ``largest`` [B, K + 1] with certainty."""
    if not (largest.is_cpu and tokens.is_cpu) or (compiled := library()) is None:
        return None
    tokens, lengths, largest = tokens.contiguous(), lengths.contiguous(), largest.contiguous()
    rows, drafted = tokens.shape
    found = torch.empty(2, rows, dtype=torch.long)
    pointers = [part.data_ptr() for part in (largest, tokens, lengths, found)]
    compiled.greedy(rows, drafted, *pointers)
    return found[0], found[1]
