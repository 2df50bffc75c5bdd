"""What steps teach whoever decides about the next ones: what they cost, how drafts fared, what deciding takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from specdec.choice import Choice
from specdec.costs import Costs
from specdec.experience import Experience
from specdec.ledger import Ledger, Streak, Timed
from specdec.pacing import DecisionCost
from specdec.sequences import Row, Step

_LEAST_READ = 32  # unread tokens that say what reading costs
_SEVERAL = 4  # rounds that were measured together and drafted


class Learned(NamedTuple):
    """Of which steps something was learned: whether they were a try, whether a model drafted, and the target's passes."""

    is_try: bool
    by_model: bool
    passes: int


class Lessons:
    """Watches steps as they are done, and learns from all of one choice at a time.

    since: passes since a model drafted; since_settled: drafts since a plain step was measured well.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs, self.ledger = costs, Ledger(costs)
        self.experience, self.deciding = Experience.of_positions(), DecisionCost()
        self.since = self.since_settled = 0
        self._streak = Streak()
        self._spell: list[Timed] = []  # steps of the same rows and the same choice, of which nothing was learned yet
        self._has_read: set[int] = set()  # the rows whose text the draft model knows but for what came since
        self._begun: set[int] = set()  # numbers of rows for which anything was drafted: the first time is slow

    @property
    def drafts(self) -> bool:
        """Whether the latest steps drafted."""
        return self._streak.drafts

    def unread(self, rows: Sequence[Row]) -> int:
        """About how many tokens a draft model has to read before it can draft as usual."""
        return sum(self.since if row.id in self._has_read else len(row.tokens) for row in rows)

    def forget(self, rows: Iterable[int]) -> None:
        """These rows are gone."""
        gone = set(rows)
        self.experience.forget(gone)
        self._has_read -= gone

    def timed(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float) -> Timed:
        """Steps that were just done, with what is known of them before anything is learned."""
        unread = self.unread(steps[0].rows) if draft_seconds else 0
        passes = sum(step.passes for step in steps)
        self.since = 0 if draft_seconds else self.since + passes
        is_settled = self._streak.add(any(steps[0].drafted), passes, draft_seconds + step_seconds)
        return Timed(steps, draft_seconds, step_seconds, unread, is_settled)

    def note(self, timed: Timed) -> None:
        """Learn from these steps when all of their choice are done."""
        first = timed.steps[0]
        begins = self.drafts and len(first.rows) not in self._begun
        if begins or first.is_first:  # what it took says nothing
            self._begun.update([len(first.rows)] * begins)
            self._count_drafts([timed])
        else:
            self._spell.append(timed)
        if timed.unread:
            self._has_read = {row.id for row in first.rows}

    def learn(self, choice: Choice) -> Learned | None:
        """Learn from all steps that were noted since the last time, done as chosen; None if there are none."""
        if not self._spell:
            return None
        spell, self._spell = self._spell, []
        for timed in spell:
            self._time(timed)
        self._count_drafts(spell)
        by_model = sum(timed.draft_seconds for timed in spell) > 0
        is_try = self.drafts and (choice.is_try or by_model and (choice.is_free or not choice.drafts))
        count = sum(len(timed.steps) for timed in spell)
        deciding = self.deciding.spread(count if self.drafts and not is_try else 0)
        self.ledger.enter(spell, is_try=is_try, deciding=deciding)
        return Learned(is_try, by_model, sum(timed.passes for timed in spell))

    def _count_drafts(self, spell: Sequence[Timed]) -> None:
        """Learn how the drafts of these steps fared."""
        steps = [step for timed in spell for step in timed.steps]
        if any(steps[0].drafted):
            ids = [row.id for row in steps[0].rows]
            self.experience.count_chains(ids, [step.drafted for step in steps], [step.accepted for step in steps])

    def _time(self, timed: Timed) -> None:
        """Learn what steps took."""
        first, count = timed.steps[0], len(timed.steps)
        rows, width, drafted = len(first.rows), max(first.drafted), sum(first.drafted)
        draft_seconds, seconds = timed.draft_seconds / count, timed.step_seconds / timed.passes
        if timed.unread >= _LEAST_READ:
            expected = min(draft_seconds, float(self.costs.drafts(rows, width)[width]))
            self.costs.count_reading((draft_seconds - expected) / timed.unread)
        elif draft_seconds and timed.unread < count:
            self.costs.count_draft(rows, width, draft_seconds)
        is_settled = timed.is_settled
        if width:
            self.since_settled += count
            if not draft_seconds and self.costs.knows(rows, drafted):
                self.deciding.count_alone(seconds - float(self.costs.passes(rows, drafted)[drafted]))
        else:
            if is_settled or not self.costs.knows(rows, 0):
                self.since_settled = 0
            # Even a plain step that follows others takes at most that long, so what is believed is too much.
            is_settled |= self.costs.is_settled(rows) and seconds < self.costs.passes(rows, 0)[0]
        self.costs.count_pass(rows, drafted, seconds, is_settled=is_settled)
        if count >= _SEVERAL and not self.costs.knows(rows, drafted):  # their mean is as good as two
            self.costs.count_pass(rows, drafted, seconds, is_settled=is_settled)
