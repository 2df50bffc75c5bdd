"""The controller where rounds are played ahead: one choice for many steps, which are told apart by what they brought."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specdec.control import Adaptive
from specdec.controller import FixedLength
from specdec.costs import Costs
from test_control import SMALL, World

MOST = 16  # rounds at once


class WorldAhead(World):
    """Plays as many rounds as a choice holds for; a call of the controller takes ``care`` plain steps."""

    care = 0.0

    def step(self) -> None:
        lengths = self.controller.choose(self.sequences, SimpleNamespace())  # type: ignore[arg-type]
        rounds, width = min(self.controller.holds, MOST), max(lengths)
        assert rounds >= 1
        self.seconds += self.care
        count, passes = (rounds, 1) if width else (1, rounds)
        steps: list[Any] = []
        for _ in range(count):
            accepted = [int((self.random.random(n) < self.accepted).cumprod().sum()) for n in lengths]
            committed = [n + passes for n in accepted]
            step = SimpleNamespace(
                rows=self.sequences.rows, drafted=lengths, accepted=accepted, committed=committed, finished=[],
                passes=passes, is_first=False,
            )  # fmt: skip
            steps.append(step)
            self.tokens += sum(committed)
            self.lengths.append(width)
        drafting, verifying = count * width * self.draft, rounds * self.pass_seconds(sum(lengths))
        self.controller.observe(steps, drafting, verifying)
        self.seconds += drafting + verifying


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("accepted", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("machine", list(SMALL))
def test_rounds_ahead_are_no_slower_and_as_good_as_single_ones(machine: str, accepted: float, rows: int) -> None:
    world = WorldAhead(rows=rows, accepted=accepted, **{**SMALL[machine], "reading": 0.0})
    rate = world.run(1500)
    assert rate > 0.97 * world.fixed(0) and rate > 0.95 * world.best


def test_nothing_is_decided_while_rounds_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    decide = Adaptive._decide
    monkeypatch.setattr(Adaptive, "_decide", lambda self, *given: (decided.append(1), decide(self, *given))[1])
    for accepted in (0.02, 0.9):
        world = WorldAhead(accepted=accepted)
        world.run(300)
        decided.clear()
        world.run(200)
        assert len(decided) <= sum(world.controller.decisions.lengths.values()) / 8
    assert FixedLength(3).holds > 1000


def test_a_pass_of_several_counts_as_several() -> None:
    world = WorldAhead(accepted=0.02)
    world.run(100)
    counted = world.controller.decisions.lengths[0]
    assert counted > 4 * len(world.lengths)
    assert world.controller.costs.passes(1, 0)[0] == pytest.approx(1.0)


def test_steps_that_prepare_something_are_not_timed() -> None:
    """The first of a shape on a GPU takes a hundred times as long; drafts would never pay."""
    for is_first in (True, False):
        world = World(accepted=0.8)
        observe, seen = world.controller.observe, dict[int, int]()

        def slow_at_first(
            steps: Any, drafting: float, seconds: float, overhead: float,
            observe: Any = observe, seen: Any = seen, is_first: Any = is_first,
        ) -> None:  # fmt: skip
            width = max(steps[0].drafted)
            seen[width] = seen.get(width, 0) + 1
            if width and seen[width] <= 2:
                steps[0].is_first, seconds = is_first, 100 * seconds
            observe(steps, drafting, seconds, overhead)

        world.controller.observe = slow_at_first  # type: ignore[method-assign]
        world.run(300)
        drafted = sum(1 for length in world.lengths[-100:] if length)
        assert (drafted > 50) == is_first


def test_plain_passes_are_believed_to_become_faster_as_the_others_do() -> None:
    """The machine becomes twice as fast while only drafts are made; what little chance does is not taken for that."""
    for factor, believed in ((0.5, 0.5), (0.96, 1.0), (2.0, 1.0)):
        costs = Costs()
        for _ in range(7):
            costs.count_pass(1, 4, 1.5)
        for _ in range(3):
            costs.count_pass(1, 0, 1.0)
        for _ in range(7):
            costs.count_pass(1, 4, 1.5 * factor)
        costs._curves.clear()
        assert costs.passes(1, 0)[0] == pytest.approx(believed)
