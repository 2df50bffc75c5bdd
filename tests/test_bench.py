"""Measuring counts what was run: ratios are to the baseline of the same round, rounds of warm-up do not count."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from specdec import Stats, bench
from specdec.bench import Measurement, Method, Run


def method(seconds: list[float], tokens: int = 10) -> Method:
    """Pretends to take ``seconds`` of each of its calls in turn."""
    calls = iter(seconds)

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        stats = Stats(num_generated_tokens=tokens * len(prompts), num_row_steps=len(prompts), total_seconds=1.0)
        return Run([[len(prompt)] * tokens for prompt in prompts], next(calls), stats)

    return run


def test_ratios_pair_the_rounds_and_leave_out_the_warm_up() -> None:
    # The machine is five times slower in the second round; paired, the ratio is 2 in every round.
    methods = {"plain": method([99, 1, 5, 1]), "fast": method([1, 0.5, 2.5, 0.5])}
    runs = bench.timed_rounds(methods, [[1, 2], [3]], rounds=3)
    plain, fast = bench.summaries(runs)
    assert (fast.speedup, plain.speedup, fast.rounds, fast.batch, fast.same_text) == (2, 1, 3, 2, 2)
    assert (fast.tokens_per_second, fast.slowest, fast.fastest) == (40, 8, 40)
    slower, _ = bench.summaries(runs, baseline="fast", batch=1)
    assert (slower.speedup, slower.batch) == (0.5, 1)


def test_a_run_with_other_numbers_of_tokens_is_compared_per_token() -> None:
    runs = bench.timed_rounds({"plain": method([1, 1]), "short": method([1, 1], tokens=5)}, [[1]], rounds=1)
    assert bench.summaries(runs)[1].speedup == pytest.approx(0.5)


def test_prompts_one_by_one_are_one_run() -> None:
    run = bench.one_by_one(method([1.0, 2.0, 4.0]))([[1], [1, 2], [1, 2, 3]])
    assert run.seconds == 7 and [row[0] for row in run.token_ids] == [1, 2, 3]
    assert run.stats is not None and run.stats.num_generated_tokens == 30 and run.stats.total_seconds == 3


def test_prompts_in_groups_are_one_run_and_keep_their_order() -> None:
    run = bench.in_groups(method([1.0, 2.0]), 2)([[1], [1, 2], [1, 2, 3]])
    assert run.seconds == 3 and [row[0] for row in run.token_ids] == [1, 2, 3]


def test_sampled_texts_are_not_compared() -> None:
    runs = bench.timed_rounds({"plain": method([1, 1]), "other": method([1, 1])}, [[1]], rounds=1)
    assert [m.same_text for m in bench.summaries(runs)] == [1, 1]
    assert [m.same_text for m in bench.summaries(runs, temperature=0.5)] == [None, None]


def test_parts_are_shares_of_the_whole_and_passes_those_after_the_prompt() -> None:
    stats = Stats(
        num_target_passes=30, num_row_steps=30, num_generated_tokens=60, prefill_seconds=1.0, draft_seconds=0.5,
        verify_seconds=2.0, total_seconds=4.0,
    )  # fmt: skip
    (found,) = bench.summaries({"plain": [Run([[1] * 60], 4.0, stats)]})
    assert [getattr(found, name) for name in bench.PARTS.values()] == [0.25, 0.125, 0.5, 0.125]
    assert found.passes_per_second == 10


def test_the_distance_to_the_limit_is_that_of_runs_and_what_was_measured_beside_them() -> None:
    """A machine that becomes half as fast for two of three rounds is as far from its limit as before."""

    def at(pace: float) -> Run:
        return Run([[1]], 4.0, Stats(num_target_passes=30, prefill_seconds=1.0, total_seconds=1.0 + 3.0 / pace))

    memory = iter((4e9, 4e9, 2e9, 2e9, 2e9, 2e9))
    runs = iter((at(1.0), at(0.5), at(0.5)))
    method = bench.beside_memory(lambda prompts: next(runs), lambda: next(memory))
    (found,) = bench.summaries({"plain": [method([[1]]) for _ in range(3)]})
    assert (found.bytes_per_second, found.bytes_per_pass) == (2e9, 4e8)
    (alone,) = bench.summaries({"plain": [at(1.0)]})
    assert (alone.bytes_per_second, alone.bytes_per_pass) == (None, None)


def test_the_table_fits_into_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    name = "a method with 28 letters, so"
    given = [Measurement(name, 16, 0.7, 12345.6, 12.34, 1, 1, 3, 1.0, 12.34, overhead_share=1.0)] * 2
    console.print(bench.table(given, "title"))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    cells = [name, "16", "0.7", "12346", "12.34x", "100%", "12.34", "100%"]
    assert [re.split(" +", line.removeprefix(name).strip()) for line in text.splitlines() if name in line] == [
        cells[1:]
    ] * 2
    assert "bookkeeping" in text and "overhead" not in text


def test_one_round_has_no_median() -> None:
    assert (bench.medians_of(1), bench.medians_of(3)) == ("one round", "medians of 3 rounds")


def test_the_batch_size_is_the_prompts() -> None:
    (found,) = bench.compare({"plain": method([1, 1])}, [[1], [2], [3]], rounds=1)
    assert found.batch == 3
