"""Training: learns, continues exactly, stops safely, and refuses what it should."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_recipe import with_training

from specdec.errors import CheckpointError, ConfigError, ModelError
from specdec.machine import fast_dtype
from specdec.training import data, trainer
from specdec.training.objective import Pair
from specdec.training.optimizer import MasterAdamW, schedule
from specdec.training.parallel import Parallel
from specdec.training.progress import TrainingProgress
from specdec.training.recipe import Recipe
from specdec.training.trainer import Run, train


def weights(out: Path) -> dict[str, torch.Tensor]:
    names = ("target", "draft")
    return {f"{n}.{k}": w for n in names for k, w in load_file(out / n / "model.safetensors").items()}


def assert_same_weights(first: Path, second: Path) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals) -> None:
    """Send this process ``number`` in the middle of step ``steps``."""
    original = Run.train_step

    def step(run: Run, progress: float) -> tuple[float, float]:
        if run.step == steps - 1:
            os.kill(os.getpid(), number)
        return original(run, progress)

    monkeypatch.setattr(Run, "train_step", step)


def test_training_learns_and_reports(tmp_path: Path, toy_recipe: Recipe) -> None:
    short = train(with_training(toy_recipe, max_steps=2), tmp_path / "short", progress=False)
    report = train(with_training(toy_recipe, max_steps=120), tmp_path / "long", progress=False)
    assert report.target_loss < short.target_loss - 1
    assert report.draft_loss < short.draft_loss - 1
    assert 0.2 < report.acceptance <= 1
    assert 0.2 < report.top1 <= 1
    assert (report.steps, report.tokens) == (120, 120 * 2 * 16)
    assert json.loads((tmp_path / "long" / "report.json").read_text())["target_loss"] == report.target_loss
    written = ["curves.png", "draft", "log.jsonl", "report.json", "target"]
    assert sorted(path.name for path in (tmp_path / "long").iterdir()) == written


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_run_continues_bit_by_bit(
    tmp_path: Path, toy_recipe: Recipe, number: signal.Signals, error: type[BaseException], precision: str
) -> None:
    """With dropout, so the random state counts too."""
    recipe, handler = with_training(toy_recipe, precision=precision), signal.getsignal(signal.SIGINT)
    train(recipe, tmp_path / "whole", progress=False)
    for step in (3, 5):  # twice in a row: what is restored must itself be saved again
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(error) as stopped:
            stop_after(monkeypatch, step, number)
            train(recipe, tmp_path / "parts", progress=False)
        assert error is KeyboardInterrupt or stopped.value.code == 0
        assert (tmp_path / "parts" / "checkpoints" / f"step-{step:08d}").is_dir()
        torch.manual_seed(123)  # another process would start with another random state
    report = train(recipe, tmp_path / "parts", progress=False)
    assert report.steps == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is handler  # which a shell sets otherwise for what it runs in the background


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path, toy_recipe: Recipe) -> None:
    train(toy_recipe, tmp_path / "whole", progress=False)
    often = with_training(toy_recipe, checkpoint_seconds=1e-9)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        stop_after(monkeypatch, 5, signal.SIGINT)
        train(often, tmp_path / "parts", progress=False)
    newest = tmp_path / "parts" / "checkpoints" / "step-00000005" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(often, tmp_path / "parts", progress=False)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_not_trained_again(tmp_path: Path, toy_recipe: Recipe) -> None:
    report = train(toy_recipe, tmp_path, progress=False)
    assert train(toy_recipe, tmp_path, progress=False) == report
    with pytest.raises(ConfigError, match="pair of another recipe"):
        train(with_training(toy_recipe, seed=1), tmp_path, progress=False)
    assert train(with_training(toy_recipe, seed=1), tmp_path, progress=False, resume=False) != report
    file = tmp_path / "draft" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors does not match"):
        train(with_training(toy_recipe, seed=1), tmp_path, progress=False)


@pytest.mark.parametrize("resume", [True, False])
def test_folders_of_others_are_left_alone(tmp_path: Path, toy_recipe: Recipe, resume: bool) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("data")
    with pytest.raises(ConfigError, match="was not written by a training run"):
        train(toy_recipe, tmp_path, progress=False, resume=resume)
    assert (tmp_path / "target" / "precious").read_text() == "data"


def test_what_others_put_beside_trained_weights_is_left_alone(tmp_path: Path, toy_recipe: Recipe) -> None:
    report = train(toy_recipe, tmp_path, progress=False)
    notes = tmp_path / "draft" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt, which no training run wrote"):
        train(toy_recipe, tmp_path, progress=False, resume=False)
    assert train(toy_recipe, tmp_path, progress=False) == report
    assert notes.read_text() == "mine"


def new_run(recipe: Recipe, out: Path | None = None) -> Run:
    out = out or Path(recipe.data.path).parent
    return Run(recipe, data.gather("path", Path(recipe.data.path)), "id", 0.0, Parallel(recipe.train, out), out)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_loss_that_is_not_finite_changes_no_weight(toy_recipe: Recipe, which: str) -> None:
    run = new_run(toy_recipe)
    run.train_step(0.5)
    with torch.no_grad():
        getattr(run, which).norm.weight[0] = float("nan")
    before = [{n: w.clone() for n, w in optimizer.state().items()} for optimizer, _ in run.optimizers]
    with pytest.raises(ModelError, match="diverged at step 1"):
        run.train_step(0.5)
    assert run.step == 1
    for (optimizer, _), old in zip(run.optimizers, before, strict=True):
        assert all(torch.equal(weight, old[name]) for name, weight in optimizer.state().items())


def test_batches_that_are_not_finite_are_skipped_counted_and_capped(
    tmp_path: Path, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Pair.forward

    def poisoned(pair: Pair, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        losses = original(pair, tokens, *arguments)
        return losses * (float("nan") if any(torch.equal(tokens, bad) for bad in batches) else 1.0)

    run = new_run(toy_recipe)
    batches = [data.batch(run.training, step=step, rows=2, length=16, seed=0) for step in (1, 4)]
    monkeypatch.setattr(Pair, "forward", poisoned)
    report = train(with_training(toy_recipe, max_skipped_batches=2), tmp_path / "two", progress=False)
    assert (report.steps, report.skipped) == (6, 2)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(tmp_path / "two").values())
    with pytest.raises(ModelError, match="step 4: .*after 1 such batches of the 1 that train.max_skipped_batches"):
        train(with_training(toy_recipe, max_skipped_batches=1), tmp_path / "one", progress=False)


def test_the_count_of_skipped_batches_is_continued(toy_recipe: Recipe, tmp_path: Path) -> None:
    run = new_run(with_training(toy_recipe, max_skipped_batches=3), tmp_path)
    run.skipped = 2
    run.save()
    again = new_run(with_training(toy_recipe, max_skipped_batches=3), tmp_path)
    with TrainingProgress("", visible=False) as bar:
        again.resume(bar)
    assert again.skipped == 2


def test_a_checkpoint_of_another_tokenizer_is_refused(toy_recipe: Recipe, tmp_path: Path) -> None:
    run = new_run(toy_recipe, tmp_path)
    run.tokenizer_hash = "another"
    run.save()
    with (
        TrainingProgress("", visible=False) as bar,
        pytest.raises(CheckpointError, match="trained with another tokenizer"),
    ):
        new_run(toy_recipe, tmp_path).resume(bar)


def test_a_missing_random_state_is_an_error(toy_recipe: Recipe) -> None:
    parallel = new_run(toy_recipe).parallel
    state = parallel.random_state()
    parallel.set_random_state(state)
    parallel.rank = 1
    with pytest.raises(CheckpointError, match=r"no state of random.cpu.1.*as many processes.*--fresh"):
        parallel.set_random_state(state)


def test_a_full_disk_costs_no_training(
    tmp_path: Path, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(toy_recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("specdec.training.checkpoint._seal", full)
        run = new_run(with_training(toy_recipe, checkpoint_seconds=1e-9), tmp_path / "full")
        with TrainingProgress("", visible=True) as bar:
            run.loop(bar)
    said = " ".join(capsys.readouterr().err.split())
    assert "No space left on device" in said and "training goes on" in said
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    run.finish()
    assert_same_weights(tmp_path / "whole", tmp_path / "full")


def test_two_runs_of_one_seed_have_the_same_bits(tmp_path: Path, toy_recipe: Recipe) -> None:
    for name in ("first", "second"):
        train(toy_recipe, tmp_path / name, progress=False)
    assert_same_weights(tmp_path / "first", tmp_path / "second")


def test_time_limits_the_run_and_the_schedule(tmp_path: Path, toy_recipe: Recipe) -> None:
    report = train(with_training(toy_recipe, max_steps=0, max_seconds=1.0), tmp_path, progress=False)
    assert report.steps > 6
    assert 1.0 <= report.seconds < 2.0


def test_text_shorter_than_a_window_is_refused(toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.data, "encode", lambda *_: torch.zeros(16, dtype=torch.int32))
    with pytest.raises(ConfigError, match="text is too short: 16 tokens"):
        new_run(toy_recipe)


def test_training_works_outside_the_main_thread(tmp_path: Path, toy_recipe: Recipe) -> None:
    thread = threading.Thread(target=train, args=(toy_recipe, tmp_path), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert (tmp_path / "report.json").exists()


def test_matrices_decay_and_vectors_do_not(toy_recipe: Recipe) -> None:
    model = new_run(toy_recipe).target
    optimizer = MasterAdamW(model, torch.float32, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    optimizer.step(0.1, optimizer.gather_gradients(), clip=1.0)
    for name, master in optimizer.masters.items():
        torch.testing.assert_close(master, before[name] * (0.95 if master.ndim == 2 else 1.0))


def test_clipping_limits_the_update_and_zero_turns_it_off(toy_recipe: Recipe) -> None:
    model = new_run(toy_recipe).draft
    optimizer = MasterAdamW(model, torch.float32, weight_decay=0.0)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    norm = optimizer.gather_gradients()
    assert norm.item() == pytest.approx(sum(weight.numel() for weight in model.parameters()) ** 0.5)
    optimizer.step(0.0, norm, clip=0.5)
    first_moment = optimizer.adamw.state[optimizer.masters["norm.weight"]]["exp_avg"]
    torch.testing.assert_close(first_moment, torch.full_like(first_moment, 0.1 * 0.5 / norm.item()))


def test_schedule_warms_up_and_ends_low() -> None:
    values = [schedule(p, warmup=0.1, final=0.02) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert values == pytest.approx([0.01, 0.5, 1.0, 0.51, 0.02])
    assert schedule(0.0, warmup=0.0, final=0.1) == 1.0


def test_processor_speed_decides_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for seconds, expected in ((0.5, torch.bfloat16), (3.0, torch.float32)):
        monkeypatch.setattr(
            "specdec.machine._matmul_seconds", lambda dtype, s=seconds: s if dtype == torch.bfloat16 else 1.0
        )
        assert fast_dtype(cpu) is expected
