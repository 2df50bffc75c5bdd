"""The machine's limit: a pass reads every weight, so memory bandwidth / bytes of weights bounds passes per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BUFFER = {"cpu": 1 << 29, "cuda": 1 << 31}  # bytes: far more than caches hold
_TRIES = 8


@dataclass(frozen=True)
class Limit:
    """How many passes over a model the machine could make if reading its weights were all there is to do."""

    bytes_per_second: float
    weight_bytes: int

    @property
    def passes_per_second(self) -> float:
        """At most, unless the weights fit into the processor's caches."""
        return self.bytes_per_second / self.weight_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bytes_per_second": self.bytes_per_second,
            "weight_bytes": self.weight_bytes,
            "passes_per_second": self.passes_per_second,
        }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a decoding step reads: all but tables of embeddings, of which it reads a row.

    A table that is the output head too is read whole. A mixture of experts reads less than this.
    """
    read = {
        id(weight)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if id(weight) in read)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device's memory gives, by the fastest of some reads with torch's threads."""
    size = _BUFFER["cuda" if device.type == "cuda" else "cpu"]
    buffer = torch.ones(size // 4, device=device)
    return size / min(_seconds(buffer) for _ in range(_TRIES))


def _seconds(buffer: Tensor) -> float:
    started = time.perf_counter()
    buffer.sum().item()  # item() waits for a GPU
    return time.perf_counter() - started
