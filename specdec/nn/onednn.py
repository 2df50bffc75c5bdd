"""The products of a compiled pass by oneDNN, where that is faster: passes of many tokens on processors with matrix units."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from specdec.machine import single_threaded
from specdec.nn.cpu import (
    ATTEND,
    DOWN,
    EMBED,
    FINAL,
    GATE_UP,
    NOTE,
    QKV,
    CpuModel,
    Linear,
    Pass,
    blocks_of,
    pack,
    pad,
    pair,
    product,
)  # fmt: skip
from specdec.nn.gpt import GPT
from specdec.nn.packed import PackedLinear, can_pack

TRIED_TOKENS = (8, 16, 32, 64, 128)  # of passes that oneDNN is tried with
LEAST_TIMED = 2**17  # numbers in a weight; with smaller ones calls cost more than products
CLEARLY_FASTER = 1.25  # how much faster oneDNN must be to be worth a second copy of the weights


class OtherProducts:
    """The four products of every block by oneDNN, for passes of ``least_tokens`` and more; the rest stays compiled."""

    def __init__(self, library: ctypes.CDLL, model: GPT, least_tokens: int) -> None:
        self._library, self.least_tokens = library, least_tokens
        parts = [
            (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
            for layer in blocks_of(model)
        ]
        self._layers = [[PackedLinear(part) for part in layer] for layer in parts]

    @classmethod
    def where_faster(cls, library: ctypes.CDLL, model: GPT) -> OtherProducts | None:
        """Those for ``model`` if a few products of its largest weight, timed, say that they are worth it."""
        linear = blocks_of(model)[0].mlp.gate_up_proj
        if linear.weight.numel() < LEAST_TIMED or not can_pack(linear):
            return None
        least = _crossover(library, linear)
        return None if least is None else cls(library, model, least)

    def forward(self, described: Pass, packed: CpuModel, x: Tensor, h: Tensor, wide: Tensor) -> None:
        """As cpu.c's ``forward``; x, h and wide are what the pass's pointers point to."""
        tokens, last = described.tokens, packed.struct.layers - 1

        def stage(layer: int, which: int) -> None:
            self._library.stage(ctypes.byref(described), packed.reference, ctypes.c_int64(layer), ctypes.c_int64(which))

        def multiply(layer: int, which: int) -> Tensor:
            linear = self._layers[layer][which]
            return linear(h[:tokens, : linear.in_features])

        stage(0, EMBED)
        for layer in range(last + 1):
            for which, (before, adds) in enumerate(((QKV, False), (ATTEND, True), (GATE_UP, False), (DOWN, True))):
                stage(layer, before)
                if layer == last and not described.last_states and before == ATTEND:
                    return
                found = multiply(layer, which)
                if adds:
                    x[:tokens, : found.shape[1]] += found
                else:
                    wide[:tokens, : found.shape[1]] = found
            stage(layer, NOTE)
        stage(0, FINAL)


def _crossover(library: ctypes.CDLL, linear: nn.Linear) -> int | None:
    """The fewest tokens whose product with this weight oneDNN computes clearly faster than we; None for never."""
    weight = linear.weight.detach()
    ours, theirs = pack(library, weight), PackedLinear(linear)
    by = Linear(ours.data_ptr(), None, pad(linear.out_features), pad(linear.in_features, pair(weight.dtype)))
    x = torch.zeros(TRIED_TOKENS[-1], by.k, dtype=weight.dtype)
    out = torch.empty(len(x), by.n, dtype=torch.float32)
    with single_threaded():
        for tokens in TRIED_TOKENS:
            own = _seconds(partial(product, library, by, x[:tokens], out[:tokens]))
            if _seconds(partial(theirs, x[:tokens, : linear.in_features])) * CLEARLY_FASTER < own:
                return tokens
    return None


def _seconds(function: Callable[[], object]) -> float:
    """Processor time of the fastest of a few calls."""
    found = []
    for _ in range(4):
        started = time.thread_time()
        function()
        found.append(time.thread_time() - started)
    return min(found)
