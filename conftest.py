"""What tests and benchmarks share: one tiny pair, trained once per run by the real trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.training.recipe import load_recipe
from specdec.training.trainer import train

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with target/ and draft/ of models/tiny.toml."""
    directory = tmp_path_factory.mktemp("tiny")
    train(load_recipe(ROOT / "models/tiny.toml"), directory, progress=False)
    return directory
