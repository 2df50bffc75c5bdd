"""Where triton interprets the GPU's kernels, a program takes milliseconds: there are few of them, with large tiles."""

import pytest
import torch

from specdec.nn import cuda


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda, "_TILE_N", 64)
        monkeypatch.setattr(cuda, "_TILE_K", 32)
