"""The C sources beside this file, compiled for models of a dtype."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from specdec import compiled as compiler

FOLDER = Path(__file__).parent
VARIANTS = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}


def compiled(*sources: str, dtype: torch.dtype, purpose: str) -> ctypes.CDLL | None:
    """As ``specdec.compiled.compiled``, of files of this folder; None without a variant for ``dtype`` too."""
    if dtype not in VARIANTS:
        return None
    return compiler.compiled(*(FOLDER / name for name in sources), flags=VARIANTS[dtype], purpose=purpose)
