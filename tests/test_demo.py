"""The demo runs end to end on a pair that it trains itself (a tiny one here), and again from its cache."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from specdec import demo
from specdec.training.distill_recipe import DistillSettings
from specdec.training.recipe import load_recipe
from specdec.widen import Width

TINY = Path(__file__).parents[1] / "models/tiny.toml"


pytestmark = pytest.mark.chosen


def test_demo_trains_decodes_checks_and_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "demo_recipe", lambda: load_recipe(TINY))
    monkeypatch.setattr(demo, "NEW_TOKENS", 12)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "LARGE_ROUNDS", 1)
    monkeypatch.setattr(demo, "WIDE", Width(128, 256))
    monkeypatch.setattr(demo, "DISTILLATION", DistillSettings(max_tokens=2000, on_policy=0.5, new_tokens=16))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = StringIO(), StringIO()
    demo.demo(tmp_path / "demo.png", Console(file=first, width=120))
    demo.demo(tmp_path / "demo.png", Console(file=second, width=120))
    assert "Training" in first.getvalue() and "Trained pair found" in second.getvalue()
    for printed in (first.getvalue(), second.getvalue()):
        assert "24 of 24 speculative greedy texts identical to plain decoding" in printed
        assert "HF generate" in printed and "suffix" in printed
    (pair,) = (tmp_path / "specdec").glob("demo-*")
    weights = [(pair / name / "model.safetensors").read_bytes() for name in ("draft", demo.ON_TEXT)]
    assert weights[0] != weights[1]
    (pair / "draft").rename(pair / "distilled")  # as a program leaves it that ends between two renamings
    assert demo.demo_pair(Console(file=StringIO())) == pair and (pair / "draft/config.json").is_file()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_recipe_travels_with_the_package() -> None:
    assert demo.demo_recipe().name == "demo"
