"""Counters count what happened, and figures are made of them as their names say."""

from __future__ import annotations

import pytest
import torch

from specdec import Draft, Engine, Stats
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.sequences import Sequences, Step
from toys import native, noisy, tiny_gpt

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


class Watching(ModelDrafter):
    """Notes every step and every proposal."""

    def __init__(self) -> None:
        super().__init__(native(noisy(tiny_gpt(0), 0.015)))
        self.steps: list[Step] = []
        self.proposed: list[list[int]] = []

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        self.proposed.append(draft.lengths.tolist())
        return draft

    def observe(self, step: Step) -> None:
        self.steps.append(step)
        super().observe(step)


def test_counters_are_sums_over_rows_and_steps() -> None:
    watching = Watching()
    found = Engine(native(tiny_gpt(0)), watching)
    output = found.generate(PROMPTS, max_new_tokens=[30, 9, 21, 14], num_draft_tokens=3, max_batch_size=3, n=2)
    stats, steps = output.stats, watching.steps
    assert stats.num_requests == 8 and stats.num_prompt_tokens == 2 * sum(map(len, PROMPTS))
    assert stats.num_generated_tokens == sum(map(len, output.token_ids)) == 2 * (30 + 9 + 21 + 14)
    assert stats.num_target_passes == len(steps)
    assert stats.num_row_steps == sum(len(step.rows) for step in steps)
    drafted = [count for step in steps for count in step.drafted]
    accepted = [count for step in steps for count in step.accepted]
    assert [count for counts in watching.proposed for count in counts if count] == [count for count in drafted if count]
    assert stats.num_drafts == sum(count > 0 for count in drafted)
    assert stats.num_draft_tokens == sum(drafted) and stats.num_accepted_tokens == sum(accepted)
    assert stats.num_draft_tokens_per_position == [sum(count > i for count in drafted) for i in range(3)]
    assert stats.num_accepted_tokens_per_position == [sum(count > i for count in accepted) for i in range(3)]
    marked = sum(map(sum, output.from_draft))
    assert marked == stats.num_accepted_tokens  # nothing was cut away: length limits leave no draft behind


def test_plain_decoding_commits_one_token_per_pass_and_row() -> None:
    stats = Engine(native(tiny_gpt(0)), Watching()).generate(PROMPTS, max_new_tokens=9, num_draft_tokens=0).stats
    assert stats.mean_acceptance_length == 1 and stats.num_target_passes == 9 and stats.num_row_steps == 36
    assert stats.num_drafts == stats.num_draft_tokens == stats.acceptance_rate == 0
    assert stats.acceptance_rate_per_position == []


def test_a_perfect_draft_commits_a_whole_block_per_pass() -> None:
    found = Engine(native(tiny_gpt(0)), ModelDrafter(native(tiny_gpt(0))))
    stats = found.generate(PROMPTS, max_new_tokens=20, num_draft_tokens=4).stats
    assert stats.mean_acceptance_length == 5 and stats.acceptance_rate == 1
    assert stats.acceptance_rate_per_position == [1.0] * 4 and stats.num_target_passes == 4


def test_rates_are_pooled_and_not_means_of_ratios() -> None:
    stats = Stats()
    for drafted, accepted, committed in ((4, 4, 5), (4, 0, 1), (1, 1, 2), (0, 0, 1), (2, 1, 2)):
        stats.count_row(drafted, accepted, committed)
    assert stats.num_row_steps == 5 and stats.num_drafts == 4
    assert stats.acceptance_rate == 6 / 11
    assert stats.acceptance_rate_per_position == [3 / 4, 1 / 3, 1 / 2, 1 / 2]
    assert stats.mean_acceptance_length == 11 / 5


def test_seconds_add_up() -> None:
    found = Engine(native(tiny_gpt(0)), Watching())
    for _ in range(2):  # also when the models have run before
        stats = found.generate(PROMPTS, max_new_tokens=20).stats
        parts = [stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.overhead_seconds]
        assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(stats.total_seconds)
        assert stats.tokens_per_second == pytest.approx(80 / stats.total_seconds)
    lookup = Engine(native(tiny_gpt(0)), SuffixDrafter()).generate(PROMPTS, max_new_tokens=5).stats
    assert lookup.draft_seconds == 0


def test_an_empty_run_has_figures_too() -> None:
    stats = Stats()
    assert stats.acceptance_rate == stats.mean_acceptance_length == stats.tokens_per_second == 0
    assert stats.overhead_seconds == 0 and stats.acceptance_rate_per_position == []
    assert "acceptance rate" in str(stats)


def test_the_printed_table_has_every_figure() -> None:
    torch.manual_seed(0)
    stats = Engine(native(tiny_gpt(0)), Watching()).generate(PROMPTS, max_new_tokens=20).stats
    text = str(stats)
    for value in (
        "4", "80", f"{stats.acceptance_rate:.1%}", f"({stats.num_accepted_tokens}/{stats.num_draft_tokens})",
        f"{stats.mean_acceptance_length:.2f}", f"{stats.acceptance_rate_per_position[0]:.0%}", "prefill", "bookkeeping",
    ):  # fmt: skip
        assert value in text
    assert max(map(len, text.splitlines())) <= 80


def test_counters_of_two_runs_add_up() -> None:
    """As if one run had done both; draft positions that only one of them reached are counted as they are."""
    engine = Engine(native(tiny_gpt(0)), ModelDrafter(native(noisy(tiny_gpt(0), 0.015))))
    first, second = (
        engine.generate(PROMPTS[:2], max_new_tokens=24, num_draft_tokens=k, eos_token_id=None).stats for k in (1, 3)
    )
    total = first + second
    assert total.num_generated_tokens == 96 == first.num_generated_tokens + second.num_generated_tokens
    assert total.num_accepted_tokens == sum(total.num_accepted_tokens_per_position) > first.num_accepted_tokens
    assert total.num_draft_tokens_per_position[0] == first.num_drafts + second.num_drafts
    assert total.num_draft_tokens_per_position[1:] == second.num_draft_tokens_per_position[1:]
    assert total.total_seconds == first.total_seconds + second.total_seconds
