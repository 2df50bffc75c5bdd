"""Tuning chooses by what was measured, and what it wrote is followed for its models, and for no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec import CheckpointError, ConfigError, load
from specdec.bench import Measurement
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.tune import choices, choose, place
from specdec.tuned import FILE, Choice, Tuned, TunedEngine, fingerprint
from toys import tiny_gpt

CELLS = [(1, 0.0), (8, 0.0), (1, 1.0)]


def sweep(speedups: dict[str, dict[int | str, list[float]]]) -> list[Measurement]:
    """Speedups of families and lengths in every one of ``CELLS``."""
    return [
        Measurement(f"{family} {k}", batch, temperature, 1, values[i], 1, 1, 3, family=family, num_draft_tokens=k)
        for i, (batch, temperature) in enumerate(CELLS)
        for family, lengths in {"plain": {0: [1.0] * 3}, **speedups}.items()
        for k, values in lengths.items()
    ]


def test_auto_is_kept_unless_a_fixed_length_is_clearly_faster() -> None:
    found = sweep({"draft": {"auto": [2.0, 0.9, 1.5], 3: [2.05, 0.92, 1.6], 4: [1.0, 0.7, 1.7]}, "HF": {3: [9.0] * 3}})
    assert choices(found, "draft") == [
        Choice(1, True, "auto", 2.0), Choice(8, True, 0, 1.0), Choice(1, False, 4, 1.7),
    ]  # fmt: skip


def test_the_drafter_is_the_one_that_gains_most_in_all(tiny_pair: Path) -> None:
    target, draft = str(tiny_pair / "target"), str(tiny_pair / "draft")
    drafts = {"draft": (draft,), "both": (draft, "suffix"), "lookup": ("suffix",)}
    found = sweep(
        {"draft": {"auto": [1.5, 1.5, 1.5]}, "both": {"auto": [3.0, 1.0, 1.5]}, "lookup": {"auto": [3.9, 1.0, 1.0]}}
    )
    tuned = choose(found, drafts, target)
    assert tuned.draft == (draft, "suffix") and [c.speedup for c in tuned.choices] == [3.0, 1.0, 1.5]
    assert tuned.target == fingerprint(Path(target)) and tuned.models == (fingerprint(Path(draft)),)
    nothing = choose(sweep({name: {"auto": [1.0, 0.5, 0.9]} for name in drafts}), drafts, target)
    assert nothing.draft == () and "No drafter pays" in nothing.lines()[0]


def test_lengths_are_those_of_the_nearest_batch_of_the_same_kind() -> None:
    tuned = Tuned((), (Choice(1, True, 5, 2.0), Choice(8, True, 2, 1.1), Choice(8, False, 0, 1.0)), "", ())
    assert [tuned.length(rows, greedy=True) for rows in (1, 2, 3, 8, 100)] == [5, 5, 2, 2, 2]
    assert tuned.length(1, greedy=False) == 0
    assert Tuned((), (Choice(1, True, 5, 2.0),), "", ()).length(1, greedy=False) == "auto"


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path) -> Path:
    """A pair with settings that name the draft model and the lookup: 3 tokens greedy at batch 1, 2 at batch 4."""
    shutil.copytree(tiny_pair, tmp_path / "pair")
    write(tmp_path / "pair", tmp_path / "pair/target" / FILE)
    return tmp_path / "pair"


def write(pair: Path, file: Path, draft: tuple[str, ...] = ("suffix",)) -> None:
    names = (str(pair / "draft"), *draft)
    lengths = (Choice(1, True, 3, 2.0), Choice(4, True, 2, 1.5), Choice(1, False, 1, 1.2))
    Tuned(names, lengths, fingerprint(pair / "target"), (fingerprint(pair / "draft"),)).write(file)


def longest(output: specdec.Output) -> int:
    """Of the drafts of a call."""
    return max(output.stats.control.lengths)


def test_calls_follow_the_settings_and_the_users_win(pair: Path) -> None:
    engine = load(pair / "target", draft="tuned")
    assert isinstance(engine, TunedEngine) and isinstance(engine.drafter, HybridDrafter)
    calls: list[tuple[Any, dict[str, Any], int]] = [
        ("def main(", {}, 3),
        (["def main("], {}, 3),
        ([5, 6, 7], {}, 3),
        (torch.tensor([[5, 6, 7]]), {}, 3),
        ({"input_ids": torch.tensor([[5, 6, 7]] * 4)}, {}, 2),
        (["def main("] * 4, {}, 2),
        (["def main("] * 4, {"max_batch_size": 1}, 3),
        ("def main(", {"n": 4}, 2),
        ("def main(", {"temperature": 1.0, "seed": 0}, 1),
        (["def main(", "import"], {"temperature": [0.0, 1.0], "seed": 0}, 1),
        ("def main(", {"num_draft_tokens": 4}, 4),
        ("def main(", {"num_draft_tokens": 0}, 0),
    ]
    for prompts, settings, length in calls:
        output = engine.generate(prompts, max_new_tokens=8, eos_token_id=None, **settings)
        assert longest(output) == length, (prompts, settings)
    pieces = list(engine.stream("def main(", max_new_tokens=8, eos_token_id=None))
    assert len(pieces[0].token_ids) <= 4 and sum(len(piece.token_ids) for piece in pieces) == 8
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine.generate("def main(", max_new_token=8)


def test_generate_reads_them_too(pair: Path) -> None:
    plain = specdec.generate(pair / "target", "def main(", max_new_tokens=8, dtype="float32")
    tuned = specdec.generate(pair / "target", "def main(", draft="tuned", max_new_tokens=8, dtype="float32")
    assert tuned.token_ids == plain.token_ids and longest(tuned) <= 3 and tuned.stats.num_draft_tokens > 0


def test_a_pair_can_be_moved_with_its_settings(pair: Path) -> None:
    moved = pair.rename(pair.with_name("moved"))
    assert json.loads((moved / "target" / FILE).read_text())["draft"] == ["../draft", "suffix"]
    assert isinstance(load(moved / "target", draft="tuned"), TunedEngine)


def test_the_file_can_be_anywhere(pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "mine.json"
    file.parent.mkdir()
    write(pair, file, ())
    engine = load(pair / "target", draft=str(file))
    assert isinstance(engine.drafter, ModelDrafter)
    file.write_text(json.dumps({**json.loads(file.read_text()), "draft": [], "models": [], "choices": []}))
    assert load(pair / "target", draft=file).drafter is None


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write_changed(file: Path) -> None:
        given = json.loads(file.read_text())
        change(given)
        file.write_text(json.dumps(given))

    return write_changed


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), "there are no tuned settings in"),
        (lambda file: file.write_text(file.read_text()[:-40]), "does not hold tuned settings"),
        (lambda file: file.write_text("[]"), "does not hold tuned settings"),
        (damage(lambda given: given.pop("target")), "does not hold tuned settings"),
        (damage(lambda given: given["models"].clear()), "does not hold tuned settings"),
        (damage(lambda given: given["choices"][0].update(num_draft_tokens="many")), "does not hold tuned settings"),
        (damage(lambda given: given["choices"][0].update(batch=0)), "does not hold tuned settings"),
        (damage(lambda given: given.update(target="0" * 16)), r"made for another model than \S+target"),
        (damage(lambda given: given.update(models=["0" * 16])), r"made for another model than \S+draft"),
    ],
)
def test_settings_that_are_missing_damaged_or_of_other_models_are_refused(
    pair: Path, harm: Callable[[Path], object], said: str
) -> None:
    harm(pair / "target" / FILE)
    with pytest.raises(ConfigError, match=rf"(?s){said}.*specdec tune"):
        load(pair / "target", draft="tuned")


def test_a_model_that_was_trained_on_is_another_one(pair: Path) -> None:
    before = fingerprint(pair / "target")
    weights = pair / "target" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(pair / "target") != before


def test_a_target_that_is_an_object_has_no_settings() -> None:
    with pytest.raises(ConfigError, match="pass the target as a directory or hub id, got GPT"):
        load(tiny_gpt(), draft="tuned")


def test_the_file_lies_with_the_weights_unless_told_otherwise(pair: Path, tmp_path: Path) -> None:
    assert place(str(pair / "target"), None) == pair / "target" / FILE
    assert place("some/hub-model", tmp_path / "x.json") == tmp_path / "x.json"
    with pytest.raises(ConfigError, match="some/hub-model is not a local directory.*--out FILE.json"):
        place("some/hub-model", None)
    with pytest.raises(ConfigError, match="--out must be a .json file in a folder that exists"):
        place(str(pair / "target"), tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="--out must be a .json file in a folder that exists"):
        place(str(pair / "target"), tmp_path / "none" / "x.json")
    with pytest.raises(CheckpointError, match="config.json"):
        place(str(tmp_path), None)
