"""Functions on GPU tensors, recorded as CUDA graphs: one call then starts all their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

_MOST_GRAPHS, _MOST_BYTES = 256, 2 << 30  # of one device, and what their inputs and results take

Results = tuple[Tensor, ...]


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Results
    results: Results


class Graphs:
    """What was recorded on one device; on a processor functions just run.

    What ``run`` returns is valid until the same function runs again. ``preparations`` counts, for all devices, how often one
    ran that will be recorded: times of such runs say nothing about the next ones.
    """

    preparations: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        self._device, self.records = device, device.type == "cuda"
        self._asked: set[object] = set()
        self._recorded: dict[object, _Recorded] = {}
        self._bytes = 0
        # Not torch's own stream for this: what libraries keep for a stream lies in the memory of the graphs that use it.
        self._stream = torch.cuda.Stream(device) if self.records else None
        self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def clear(self) -> None:
        """Something has moved that recorded kernels read, or there are too many of them."""
        self._recorded.clear()
        self._bytes = 0
        if self.records:
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: object, function: Callable[..., Results], *inputs: Tensor, records: bool = True) -> Results:
        """What ``function`` makes of ``inputs``, recorded when it is asked for again.

        ``key`` names it and the shapes of its inputs; nothing else that it reads may move, and it may not wait.
        """
        if not self.records:
            return function(*inputs)
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self._run(key, function, inputs, records)
        return self._run(key, function, inputs, records)

    def _run(self, key: object, function: Callable[..., Results], inputs: Results, records: bool) -> Results:
        known = self._recorded.get(key)
        if known is not None:
            for kept, given in zip(known.inputs, inputs, strict=True):
                kept.copy_(given, non_blocking=True)
            known.graph.replay()
            return known.results
        placed = [given.to(self._device, non_blocking=True) for given in inputs]
        results = function(*placed)
        if records and key in self._asked:  # its kernels are compiled by now
            self._record(key, function, placed)
        elif len(self._asked) >= 4 * _MOST_GRAPHS:
            self._asked.clear()  # keys of filters that never come again must not pile up
        self._asked.add(key)
        Graphs.preparations += records
        return results

    def _record(self, key: object, function: Callable[..., Results], inputs: list[Tensor]) -> None:
        if len(self._recorded) >= _MOST_GRAPHS or self._bytes > _MOST_BYTES:
            self.clear()
        kept = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = function(*kept)
        self._recorded[key] = _Recorded(graph, kept, results)
        self._bytes += sum(part.nbytes for part in (*kept, *results))
