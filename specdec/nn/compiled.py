"""The C sources beside this file, compiled for models of a dtype."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from specdec import compiled as compiler

FOLDER = Path(__file__).parent
VARIANTS = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}


def compiled(source: str, *, dtype: torch.dtype, purpose: str) -> ctypes.CDLL | None:
    """As ``specdec.compiled.compiled``, of a file of this folder and its headers; None without a variant for ``dtype``."""
    if dtype not in VARIANTS:
        return None
    flags = ("-fopenmp", *VARIANTS[dtype])
    return compiler.compiled(FOLDER / source, *sorted(FOLDER.glob("*.h")), flags=flags, purpose=purpose)
