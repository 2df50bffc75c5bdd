"""What a run says about itself: evaluations, the log, curves, trackers and the model cards."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import assert_same_weights, new_run, stop_after
from toy_recipe import with_training

from specdec.errors import ConfigError
from specdec.load import accepted_length, load
from specdec.nn.gpt import GPT
from specdec.training.journal import read_log
from specdec.training.objective import agreement
from specdec.training.recipe import Recipe
from specdec.training.trainer import train


def test_evaluations_report_and_change_no_weight(tmp_path: Path, toy_recipe: Recipe) -> None:
    """With dropout in training: an evaluation must leave the random state alone."""
    train(toy_recipe, tmp_path / "quiet", progress=False)
    watched = with_training(toy_recipe, evaluate_steps=2)
    report = train(watched, tmp_path / "watched", progress=False, decode=accepted_length)
    assert_same_weights(tmp_path / "quiet", tmp_path / "watched")
    entries = read_log(tmp_path / "watched")
    updates = [entry for entry in entries if "held_out" not in entry]
    found = [entry for entry in entries if "held_out" in entry]
    assert [entry["step"] for entry in updates] == [1, 2, 3, 4, 5, 6]
    assert updates[0].keys() == {"step", "target_loss", "draft_loss", "rate", "seconds"}
    assert [entry["step"] for entry in found] == [2, 4, 6, 6]
    for values in (entry["held_out"] for entry in found):
        assert 1 <= values["mean_acceptance_length"] <= 5
        assert 1 >= values["acceptance_per_position"][0] >= values["acceptance_per_position"][-1] > 0
        assert values["target_loss"] > 0 and values["draft_loss"] > 0
    assert report.mean_acceptance_length == found[-1]["held_out"]["mean_acceptance_length"]
    assert (tmp_path / "watched" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_come_by_the_clock_too(tmp_path: Path, toy_recipe: Recipe) -> None:
    train(with_training(toy_recipe, evaluate_seconds=1e-9), tmp_path, progress=False)
    assert sum("held_out" in entry for entry in read_log(tmp_path)) == 6 + 1


def test_a_continued_run_logs_every_step_once(tmp_path: Path, toy_recipe: Recipe) -> None:
    often = with_training(toy_recipe, checkpoint_seconds=1e-9)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        stop_after(monkeypatch, 5, signal.SIGINT)
        train(often, tmp_path, progress=False)
    newest = tmp_path / "checkpoints" / "step-00000005" / "state.safetensors"
    newest.write_bytes(b"")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "target_lo')  # as a killed process leaves it
    train(often, tmp_path, progress=False)
    assert [entry["step"] for entry in read_log(tmp_path) if "held_out" not in entry] == [1, 2, 3, 4, 5, 6]


def test_acceptance_by_position_is_the_mean_product_of_neighbours(toy_recipe: Recipe) -> None:
    run = new_run(toy_recipe)
    windows = torch.randint(0, 300, (3, 12))
    found = agreement(run.target, run.draft, windows, drafted=3)
    with torch.no_grad():
        p, q = (model.lm_head(model(windows[:, :-1])).softmax(-1) for model in (run.target, run.draft))
    alpha = torch.minimum(p, q).sum(-1).double()
    for k, share in enumerate(found.acceptance_per_position, 1):
        products = [alpha[row, start : start + k].prod() for row in range(3) for start in range(11 - 2)]
        assert share == pytest.approx(float(torch.stack(products).mean()), rel=1e-5)
    same = agreement(run.target, run.target, windows)
    assert same.acceptance_per_position == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_decode_with_the_target_as_its_own_draft_accepts_everything(toy_recipe: Recipe) -> None:
    target: GPT = new_run(toy_recipe).target
    assert accepted_length(target, target, [[1, 2, 3], [4, 5, 6]], 10) > 4


def test_curves_go_to_tensorboard(tmp_path: Path, toy_recipe: Recipe) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(with_training(toy_recipe, trackers=("tensorboard",), evaluate_steps=3), tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/target_loss", "train/draft_loss", "held_out/acceptance", "held_out/accepted_to_4"} <= set(
        events.Tags()["scalars"]
    )
    logged = [entry["target_loss"] for entry in read_log(tmp_path) if "held_out" not in entry]
    assert [event.value for event in events.Scalars("train/target_loss")] == pytest.approx(logged)


def test_missing_tensorboard_is_named_with_its_command(
    tmp_path: Path, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(with_training(toy_recipe, trackers=("tensorboard",)), tmp_path, progress=False)


def test_cards_say_what_the_models_are(tmp_path: Path, toy_recipe: Recipe) -> None:
    report = train(replace(toy_recipe, name="counting"), tmp_path, progress=False, decode=accepted_length)
    for role in ("target", "draft"):
        card = (tmp_path / role / "README.md").read_text()
        assert f"# counting: {role}" in card
        assert f"{getattr(report, f'{role}_loss'):.4f} nats per token" in card
        assert f"{report.acceptance:.1%}" in card and f"{report.mean_acceptance_length:.2f}" in card
        assert "README.md" in json.loads((tmp_path / role / "manifest.json").read_text())
        code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
        assert 'specdec.generate("target", "import os", draft="draft"' in code
    assert load(tmp_path / "target", draft=tmp_path / "draft").generate(["line 3"], max_new_tokens=4).texts
