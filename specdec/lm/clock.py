"""Seconds spent in a model: of the host where passes run on it, of the GPU where the host only hands them over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Counts the time of the blocks that run under ``timed``, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """All of them so far; waits for what the GPU has not finished."""
        while self._open:
            pair = self._open.popleft()
            pair[1].synchronize()
            self._seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._free.append(pair)
        return self._seconds

    def add(self, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens in this block."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            pair = self._free.pop() if self._free else tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pair[0].record(stream)
            yield
            pair[1].record(stream)
            self._open.append((pair[0], pair[1]))
        else:
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun
