"""What tests and benchmarks share: one tiny pair, trained once per run by the real trainer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the processor; before anything imports triton

from specdec.training.recipe import load_recipe
from specdec.training.trainer import train

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with target/ and draft/ of models/tiny.toml."""
    directory = tmp_path_factory.mktemp("tiny")
    train(load_recipe(ROOT / "models/tiny.toml"), directory, progress=False)
    return directory
