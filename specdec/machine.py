"""The machine: what it is called, what it is fast at, and where the project may keep things on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers

_PROBE_SIZE, _PROBES = 512, 8  # about 30 ms
_THREADS = Lock()  # for who sets their number, which is one for all


def cache_directory() -> Path:
    """Where trained pairs and measurements are kept between programs; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "specdec"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's own name where the system tells it."""
    return _told("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """What the processor can do, in the system's words; processors of one name may differ. Empty where it is not told."""
    return _told("flags") or _told("Features")


def _told(what: str) -> str:
    """The first line of that name in what Linux says of its processors."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(what):
                return line.split(":", 1)[1].strip()
    return ""


def batch_rows(device: torch.device) -> int:
    """Rows of a training batch that keep ``device`` busy: few, for more updates of as many tokens."""
    return 8 if device.type == "cuda" else 1


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies it clearly faster than float32, else float32.

    A CPU is asked by a measurement of some milliseconds: some list the instruction and emulate it.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    with single_threaded():
        times = [(_matmul_seconds(torch.float32), _matmul_seconds(torch.bfloat16)) for _ in range(_PROBES)]
    full, half = (min(column) for column in zip(*times, strict=True))
    return torch.bfloat16 if half < 0.67 * full else torch.float32


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch computes with one thread: then thread time is all of the work, and other programs cannot disturb measurements."""
    with _THREADS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Processor seconds of one matrix product in this thread."""
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    start = time.thread_time()
    torch.mm(matrix, matrix)
    return time.thread_time() - start
