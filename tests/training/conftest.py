"""A text and a recipe small enough to train on in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_recipe import RECIPE

from specdec.training.recipe import Recipe, parse_recipe


@pytest.fixture
def toy_recipe(tmp_path: Path) -> Recipe:
    """A recipe for a folder of three short files that count."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(3):
        lines = "".join(f"line {n} of file {i} says {n * n}\n" for n in range(300))
        (folder / f"file{i}.txt").write_text(lines)
    return parse_recipe(RECIPE, "toy.toml", folder=tmp_path)
