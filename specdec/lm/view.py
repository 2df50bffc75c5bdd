"""A compiled model run in a cheaper way over its own cache: what it guesses with, to check itself afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.lm.clock import Clock
from specdec.lm.cpu import CpuLM, Tokens
from specdec.lm.paged import BLOCK, Window
from specdec.nn import cpu


class CpuView(CpuLM):
    """``lm`` with some of its ``layers``, with weights ``in_bytes``, or with a ``window`` of its rows' latest tokens.

    Keys and values are those of ``lm``, which knows all committed tokens. What the view reads goes behind them, where
    ``lm`` writes over it; ``release`` forgets it. Rows come, go and move with those of ``lm``.
    """

    def __init__(
        self, lm: CpuLM, *, layers: Sequence[int] | None = None, in_bytes: bool = False, window: int | None = None
    ) -> None:
        self.__dict__.update(lm.__dict__)
        self._packed = lm._packed.view(range(lm._packed.struct.layers) if layers is None else layers, in_bytes=in_bytes)
        self._others = None
        self._pending, self._branches, self._features, self._tapped = [], {}, None, np.empty(0, dtype=np.int64)
        self.clock = Clock(self.device)
        self._scratch = [tensor[:0] for tensor in self._scratch]
        self._point()
        self._window = None if window is None else Window(lm.cache, -(-window // BLOCK) + 1)
        if self._window is not None:
            self.cache = self._window  # type: ignore[assignment]

    def reserve(self, rows: int, length: int) -> None:
        self._pending.extend([0] * (rows - len(self._pending)))
        self._know_positions(length)

    def release(self) -> None:
        """What was read since the last time was never there."""
        self._pending = [0] * len(self._pending)

    def _described(self, read: Tokens, first: int, needs_logits: bool) -> cpu.Pass:
        if self._window is not None:
            read = read._replace(places=read.places - self._window.skipped[first + read.row_of])
        return super()._described(read, first, needs_logits)
