"""The study of recurrent drafts compares equals, changes no text, and says what it measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from specdec import bench
from specdec.bench import PLAIN, Measurement
from specdec.load import load
from specdec.training.data import Corpus, gather
from specdec.training.distill_recipe import DistillReport

sys.path.append(str(Path(__file__).parents[2] / "evals"))
import recurrent

PROMPTS = [[5, 6, 7, 8 + i] for i in range(8)]


@pytest.fixture(scope="module")
def trained(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, DistillReport]]:
    """Both drafts of the tiny target, and how they learned."""
    folder, whole = tmp_path_factory.mktemp("drafts"), gather("stdlib")
    corpus = Corpus(whole.training[:20], whole.held_out[:4])
    tiny = {"rows": 4, "prompt_tokens": 16, "new_tokens": 16, "prompts_per_round": 4, "evaluation_prompts": 2}
    settings = {name: replace(recurrent.settings_of(name, 64), **tiny) for name in recurrent.SHAPES}
    return folder, recurrent.train_both(str(tiny_pair / "target"), corpus, folder, {"max_tokens": 1500}, settings)


@pytest.fixture(scope="module")
def found(tiny_pair: Path, trained: tuple[Path, dict[str, DistillReport]]) -> Iterator[list[Measurement]]:
    engine = load(tiny_pair / "target", dtype="float32")
    yield recurrent.decode(engine, recurrent.drafters(trained[0], "float32"), PROMPTS, rounds=1, new_tokens=12)


def test_both_learn_from_as_much(trained: tuple[Path, dict[str, DistillReport]]) -> None:
    _, reports = trained
    assert list(reports) == ["GPT", "LSTM"]
    recurrent.check_equal(reports, 0.1)  # widths of tiny models come in large steps
    assert reports["GPT"].evaluations[-1].tokens > 0
    larger = replace(reports["LSTM"], draft_parameters=2 * reports["LSTM"].draft_parameters)
    with pytest.raises(ValueError, match="differ in parameters by more than 10%"):
        recurrent.check_equal({**reports, "LSTM": larger}, 0.1)
    more = [replace(one, tokens=2 * one.tokens) for one in reports["LSTM"].evaluations]
    with pytest.raises(ValueError, match="differ in tokens by more than 10%"):
        recurrent.check_equal({**reports, "LSTM": replace(reports["LSTM"], evaluations=more)}, 0.1)


def test_every_cell_has_both_drafts_and_plain_decoding(found: list[Measurement]) -> None:
    assert [(m.method, *m.cell) for m in found] == [
        (method, *cell) for cell in recurrent.CELLS for method in (PLAIN, "GPT", "LSTM")
    ]
    for m in found:
        if m.method != PLAIN:
            assert len(m.acceptance_rate_per_position) == recurrent.DRAFTED and recurrent.draft_ms(m) > 0
    assert recurrent.equal_texts(found) == (18, 18)  # greedy, two drafts, batches of 1 and 8
    changed = [replace(m, same_text=7) if m.same_text == 8 else m for m in found]
    assert recurrent.equal_texts(changed) == (16, 18)


def test_cost_of_drafting_is_that_of_the_stats(tiny_pair: Path, trained: tuple[Path, dict[str, DistillReport]]) -> None:
    drafts = recurrent.drafters(trained[0], "float32")
    methods = bench.own_methods(load(tiny_pair / "target", dtype="float32"), drafts, max_new_tokens=8)
    runs = {name: [method(PROMPTS)] for name, method in methods.items()}
    for m in bench.summaries(runs)[1:]:
        stats = runs[m.method][0].stats
        assert stats is not None
        assert recurrent.draft_ms(m) == pytest.approx(1e3 * stats.draft_seconds / stats.num_target_passes)


def test_what_was_measured_is_drawn(
    trained: tuple[Path, dict[str, DistillReport]], found: list[Measurement], tmp_path: Path
) -> None:
    folder, reports = trained
    passes = recurrent.time_passes(recurrent.drafters(folder, "float32"), contexts=(8, 16))
    assert len(passes) == 2 * 2 * 2 and all(one.milliseconds > 0 for one in passes)
    assert recurrent.table(found, reports).row_count == 12
    recurrent.draw(found, passes, tmp_path / "recurrent.png")
    assert (tmp_path / "recurrent.png").stat().st_size > 10_000
    json.dumps([m.as_dict() for m in found])
