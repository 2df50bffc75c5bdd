"""The machine: what it is called, and where the project may keep things on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


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
