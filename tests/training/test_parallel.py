"""The same recipe is the same training in parts, in several processes, on two devices, and compiled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import assert_same_weights, weights
from toy_recipe import RECIPE, with_training

from specdec.errors import ConfigError
from specdec.training.journal import read_log
from specdec.training.optimizer import schedule
from specdec.training.recipe import Recipe
from specdec.training.trainer import train

WITHOUT_DROPOUT = RECIPE.replace("dropout = 0.1\n", "").replace("rows = 2", "rows = 4\nevaluate_steps = 3")


def losses(out: Path) -> list[tuple[float, float]]:
    return [(entry["target_loss"], entry["draft_loss"]) for entry in read_log(out) if "held_out" not in entry]


def command(recipe: Path, out: Path, processes: int, sharded: bool = False) -> list[str]:
    """``accelerate launch``; told of several GPUs it starts processes by torchrun, and without GPUs they use gloo."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--use_fsdp", "--fsdp_version", "2"] if sharded else ["--multi_gpu"]
    launcher += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, "-m", "specdec", "train", str(recipe), "--out", str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def launch(recipe: Path, out: Path, *, sharded: bool = False) -> None:
    ran = subprocess.run(
        command(recipe, out, 2, sharded), env=environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.fixture
def recipe_file(tmp_path: Path, toy_recipe: Recipe) -> Path:
    file = tmp_path / "toy.toml"
    file.write_text(WITHOUT_DROPOUT)
    return file


def assert_close(first: Path, second: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(first)), torch.tensor(losses(second)), rtol=1e-5, atol=1e-5)
    left, right = weights(first), weights(second)
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def alone(recipe_file: Path, tmp_path: Path) -> Path:
    from specdec.load import accepted_length
    from specdec.training.recipe import load_recipe

    train(load_recipe(recipe_file), tmp_path / "alone", progress=False, decode=accepted_length)
    return tmp_path / "alone"


def test_two_processes_train_as_one(recipe_file: Path, alone: Path, tmp_path: Path) -> None:
    launch(recipe_file, tmp_path / "two")
    assert_close(alone, tmp_path / "two")
    one, two = (json.loads((out / "report.json").read_text()) for out in (alone, tmp_path / "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["target_loss"] == pytest.approx(one["target_loss"], abs=1e-4)
    assert two["mean_acceptance_length"] == pytest.approx(one["mean_acceptance_length"], abs=0.2)


@pytest.mark.slow
def test_two_sharded_processes_train_as_one(recipe_file: Path, alone: Path, tmp_path: Path) -> None:
    launch(recipe_file, tmp_path / "sharded", sharded=True)
    assert_close(alone, tmp_path / "sharded")
    report = json.loads((tmp_path / "sharded" / "report.json").read_text())
    assert (report["processes"], report["sharded"]) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_stop_together(recipe_file: Path, alone: Path, tmp_path: Path, sharded: str) -> None:
    """At the same step, with one checkpoint of whole weights and the random states of both."""
    long = recipe_file.with_name("long.toml")
    long.write_text(WITHOUT_DROPOUT.replace("max_steps = 6", "max_steps = 100000"))
    process = subprocess.Popen(command(long, tmp_path / "long", 2, sharded), env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(read_log(tmp_path / "long")) < 20 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    found = list((tmp_path / "long" / "checkpoints").iterdir())
    assert len(found) == 1
    state = load_file(found[0] / "state.safetensors")
    assert {"random.cpu.0", "random.cpu.1"} <= state.keys()
    assert state["target.master.embed_tokens.weight"].shape == (300, 32)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(toy_recipe: Recipe, tmp_path: Path, parts: int) -> None:
    still = with_training(toy_recipe, rows=4)
    still = with_dropout(still, 0.0)
    train(still, tmp_path / "whole", progress=False)
    train(with_training(still, accumulate=parts), tmp_path / "parts", progress=False)
    assert_close(tmp_path / "whole", tmp_path / "parts")


def with_dropout(recipe: Recipe, dropout: float) -> Recipe:
    from dataclasses import replace

    return replace(recipe, target=replace(recipe.target, dropout=dropout))


def test_separate_documents_train_and_accumulate(toy_recipe: Recipe, tmp_path: Path) -> None:
    still = with_training(with_dropout(toy_recipe, 0.0), rows=4, separate_documents=True)
    train(still, tmp_path / "whole", progress=False)
    train(with_training(still, accumulate=2), tmp_path / "parts", progress=False)
    assert_close(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("asked", "dtype"), [("no", "float32"), ("bf16", "bfloat16"), ("fp16", None)])
def test_the_launchers_precision_goes_before_the_recipes(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, dtype: str | None
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", asked)
    if dtype is None:
        with pytest.raises(ConfigError, match="float32 or bfloat16, got --mixed_precision fp16"):
            train(toy_recipe, tmp_path, progress=False)
    else:
        assert train(toy_recipe, tmp_path, progress=False).dtype == dtype


def test_rows_that_cannot_be_shared_are_refused(toy_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.rows must be a multiple of .*\(1 x 3\), got 2"):
        train(with_training(toy_recipe, accumulate=3), tmp_path, progress=False)


def test_each_model_on_a_device_of_its_own(toy_recipe: Recipe, tmp_path: Path) -> None:
    """Two names of the one CPU: every transfer is made, none changes a bit."""
    train(toy_recipe, tmp_path / "one", progress=False)
    devices = {"target_device": "cpu", "draft_device": "cpu:0"}
    train(with_training(toy_recipe, **devices), tmp_path / "two", progress=False)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ConfigError, match="train.draft_device = 'gpu' is no device of this machine"):
        train(with_training(toy_recipe, draft_device="gpu"), tmp_path / "none", progress=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_model_on_a_gpu_of_its_own(toy_recipe: Recipe, tmp_path: Path) -> None:
    still = with_dropout(toy_recipe, 0.0)
    for name, draft in (("one", "cuda:0"), ("two", "cuda:1")):
        recipe = with_training(still, target_device="cuda:0", draft_device=draft)
        train(recipe, tmp_path / name, progress=False)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_change_no_result(toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = with_dropout(toy_recipe, 0.0)
    train(still, tmp_path / "overlapping", progress=False)
    monkeypatch.setattr("specdec.training.parallel.Parallel.overlap", False)
    train(still, tmp_path / "serial", progress=False)
    assert_close(tmp_path / "overlapping", tmp_path / "serial")


@pytest.mark.slow
def test_compiled_layers_train_the_same(toy_recipe: Recipe, tmp_path: Path) -> None:
    from specdec.load import accepted_length

    still = with_dropout(toy_recipe, 0.0)
    train(still, tmp_path / "plain", progress=False)
    train(with_training(still, compile=True), tmp_path / "compiled", progress=False, decode=accepted_length)
    assert_close(tmp_path / "plain", tmp_path / "compiled")


def test_warm_up_stable_decay() -> None:
    values = [schedule(p, warmup=0.1, final=0.02, decay=0.2) for p in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.51, 0.02])


def test_dropout_acts_in_training_only(toy_recipe: Recipe, tmp_path: Path) -> None:
    from test_trainer import new_run

    run = new_run(with_dropout(toy_recipe, 0.5), tmp_path)
    tokens = torch.arange(16)[None]
    assert not torch.equal(run.target(tokens), run.target(tokens))
    run.evaluate()
    assert run.target.training and run.draft.training
    run.target.eval()
    assert torch.equal(run.target(tokens), run.target(tokens))
