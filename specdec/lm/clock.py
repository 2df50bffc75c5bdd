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
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """All of them so far; waits for what the GPU has not finished."""
        while self._open:
            started, ended = self._open.popleft()
            ended.synchronize()
            self._seconds += started.elapsed_time(ended) / 1000
        return self._seconds

    def add(self, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens in this block."""
        if self._on_gpu:
            with torch.cuda.device(self._device):
                started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                started.record()
                yield
                ended.record()
            self._open.append((started, ended))
        else:
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun

