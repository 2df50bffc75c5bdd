"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from specdec.choice import LEAST_LEFT, PROBE_TOKENS, Choice, Chooser, Situation
from specdec.controller import DEFAULT_DRAFT_TOKENS
from specdec.costs import Costs
from specdec.draft import Drafter, Foresight, Outlook, Prices
from specdec.experience import MOST_DRAFT_TOKENS
from specdec.lessons import Lessons
from specdec.pacing import LONGEST_STAY, PlainBackoff
from specdec.sequences import Sequences, Step
from specdec.stats import Decisions

_CHECK = 5  # plain steps that are measured before any draft, and before it is believed that drafts lose
_MEASURED_PASSES = 8  # of a plain step that is measured; one of several counts twice
_FIRST_WAIT, _LONGEST_WAIT = 16, 1024  # steps between tries; twice as many after each that showed nothing
_PROBE_STEPS = 8  # of one such try; the first ones take longer than others
_STAY = 8  # steps that a choice is kept; twice as many each time it stays the same
_STAY_SHARE = 0.03  # of that time, at most, may go into deciding where it is costly
_SHORT_STAY = 3  # steps that a choice is kept where the text of every step matters, but deciding is costly
# Where looks at the text found something in that share of rows lately, decisions come so much more often.
_SELDOM, _OFTEN, _NEWS = 0.1, 3, 0.1
# Of the time while drafts pay, that share is lost by measuring plain decoding again: often where drafts gain little.
_LOOKS, _LEAST_TRUST, _LONGEST_TRUST = 0.01, 8, 1024


class Adaptive:
    """Drafts as many tokens as promise the most tokens per second, 0 where none does.

    Knows what a pass over B rows of W tokens and their drafts cost (``Costs``, measured as it goes) and how rows fare
    (``Experience``, or the drafter's own ``outlook``), which it learns from steps as they are done (``Lessons``). Whatever
    is promised, drafts that are measured to lose more than ``Ledger`` allows are given up. Where a draft model does not pay
    it is tried again now and then.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.decisions = Decisions()
        self._lessons = Lessons(costs)
        self._deciding, self._ledger = self._lessons.deciding, self._lessons.ledger
        self._wait = _FIRST_WAIT  # steps without drafts by a model until it will be tried
        self._probing = 0  # steps of the probe under way that are left
        self._ids: list[int] = []  # of the rows
        self._rows = self._age = 0
        self._refused = 0  # steps in a row whose drafts were refused, all of them
        self._chooser, self._choice = Chooser(costs, self._ledger), Choice([])  # the latest one
        self._backoff = PlainBackoff()
        self._stay = _STAY
        self._check = 0  # plain steps to measure before anything else
        self._holds = 1  # steps that the latest choice holds for
        self._is_restless = False  # whether something is decided at every step
        self._seen = 1.0  # share of rows in which looks at the text found something, lately
        self._has_model = False  # whether the drafts of any row cost passes of one

    @property
    def holds(self) -> int:
        return self._holds

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        started = time.perf_counter()
        lengths = self._choose(sequences, drafter)
        self._deciding.add(time.perf_counter() - started)
        return lengths

    def _choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        self._meet([row.id for row in sequences.rows])
        nothing = [0] * self._rows
        if self._check or self._backoff.left:
            self._holds = _MEASURED_PASSES if self._check else self._backoff.left
            self._check = max(0, self._check - 1)
            self._backoff.add(1)
            return nothing
        self._holds = 1
        gives_up = self._choice.is_try and self._ledger.last_try > self._ledger.spare(self._rows)
        self._age = -1 if gives_up else self._age - 1
        foresight: Foresight | None = drafter if hasattr(drafter, "outlook") else None  # type: ignore[assignment]
        is_costly = self._deciding.is_costly
        self._is_restless = foresight is not None and not is_costly
        # A single step costs as much as many rounds at once where deciding is costly.
        is_new = self._age < (_SHORT_STAY if is_costly and not self._choice.is_try else 0) or self._is_restless
        if not is_new and not self._choice.drafts and not self._has_model:
            return nothing
        most = getattr(drafter, "most_draft_tokens", MOST_DRAFT_TOKENS)  # of a tree more than of a chain
        limits = [min(limit, most) for limit in sequences.draft_limits()]
        if is_new:
            self._decide(sequences, foresight, limits)
        if not self._choice.is_free and self._choice.drafts:
            self._probing = 0
        elif max(limits) and self._has_model and (self._probing or self._probe_steps(sequences)):
            if not self._probing:
                self._probing, self._wait = self._probe_steps(sequences), min(2 * self._wait, _LONGEST_WAIT)
            self._probing -= 1
            self._backoff.left, self._holds = 0, 1 + self._probing
            return [min(PROBE_TOKENS, limit) for limit in limits]
        if self._choice.drafts:
            self._holds = 1 if self._is_restless else 1 + max(0, self._age)
        return [min(length, limit) for length, limit in zip(self._choice.lengths, limits, strict=True)]

    def _meet(self, ids: list[int]) -> None:
        """These are the rows from now on."""
        if ids != self._ids:
            self._end_spell()
            self._lessons.forget(set(self._lessons.experience).difference(ids))  # given up, not finished
            self._ids, self._age = ids, min(self._age, self._least_stay)  # what holds for all rows holds for new ones
        if len(ids) != self._rows:
            self._rows, self._age, self._stay = len(ids), 0, _STAY
            self._choice = self._choice._replace(is_try=False)
            self._backoff.end()

    def observe(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
        self._deciding.add(overhead)
        self.decisions.count(steps)
        timed = self._lessons.timed(steps, draft_seconds, step_seconds)
        self._age, self._probing = self._age - len(steps) + 1, max(0, self._probing - len(steps) + 1)
        self._check = max(0, self._check - (timed.passes > 1))
        self._backoff.add(timed.passes - 1)
        ended = [steps[-1].rows[slot].id for slot in steps[-1].finished]
        if self._backoff.left:  # nothing is decided before the last step of one
            self._ledger.rested += timed.passes
        else:
            self._lessons.note(timed)
            self._look_for_refusals(steps)
            if self._is_restless or self._choice.is_try or self._probing or ended:
                self._end_spell()
        self._lessons.forget(ended)

    def _look_for_refusals(self, steps: Sequence[Step]) -> None:
        """Decide anew where what was believed does not hold."""
        for step in steps:
            self._refused = self._refused + 1 if self._lessons.drafts and not any(step.accepted) else 0
            if self._refused >= self._choice.patience:
                self._age = 0

    def _end_spell(self) -> None:
        """Learn from what was done since the last decision."""
        learned = self._lessons.learn(self._choice)
        if learned is None:
            return
        self.decisions.probes += learned.passes * learned.is_try
        if not learned.is_try:
            self._wait = _FIRST_WAIT if learned.by_model else self._wait
            self._look_at_losses()

    def _look_at_losses(self) -> None:
        """Where drafts have lost too much, measure plain decoding before that is believed."""
        if not self._ledger.is_spent or self._check:
            return
        if self._lessons.drafts:
            self._check, self._age = _CHECK, 0
        else:
            self._ledger.settle(self._rows)

    def _prices(self) -> Prices:
        """What the time of one token of a model's usual draft, and of a step alone, could have brought instead."""
        if not self.costs.knows(self._rows, 0):
            return Prices()
        seconds = self._ledger.seconds or float(self.costs.passes(self._rows, 0)[0])
        draft = float(self.costs.drafts(self._rows, DEFAULT_DRAFT_TOKENS)[-1]) / DEFAULT_DRAFT_TOKENS
        worth = self._ledger.brought / seconds
        return Prices(draft * worth, self._alone * worth)

    @property
    def _alone(self) -> float:
        """Seconds that a step takes longer whose guesses are looked up: it runs alone, and is decided alone."""
        deciding = self._deciding.share * float(self.costs.passes(self._rows, 0)[0])
        return self._deciding.alone + deciding * self._deciding.is_costly

    @property
    def _least_stay(self) -> int:
        """For how many steps a choice is kept."""
        enough = int(self._deciding.share / _STAY_SHARE / self._choice.step)
        return max(_STAY, min(enough, LONGEST_STAY)) if self._deciding.is_costly else _STAY

    @property
    def _knows_plain(self) -> bool:
        """Whether it is known what a plain step takes by now."""
        look, gain = _MEASURED_PASSES if self._deciding.is_costly else 2, max(1 - 1 / self._choice.promise, 1e-3)
        # It is decided before and after.
        trust = (look * gain + 2 * self._deciding.share) / _LOOKS / self._choice.step
        is_lately = self._lessons.since_settled < min(max(trust, _LEAST_TRUST), _LONGEST_TRUST)
        return is_lately and self.costs.knows(self._rows, 0) and self.costs.is_fresh(self._rows)

    def _decide(self, sequences: Sequences, foresight: Foresight | None, limits: list[int]) -> None:
        """Choose the lengths of the next drafts, and how many steps to stay with them."""
        started = time.perf_counter()
        self._end_spell()
        if foresight is not None:
            outlook = foresight.outlook(sequences, limits, self._prices())
        else:
            outlook = Outlook(self._lessons.experience.survival(self._ids, limits), np.ones(len(limits), dtype=bool))
        before, kept, left = self._choice, self._chooser.kept, self._left(sequences)
        self._has_model = bool(outlook.runs_model.any())
        self._choice = before.given_up(self._rows, is_look=True)
        if self._knows_plain:
            unread, upkeep, is_costly = (
                self._lessons.unread(sequences.rows),
                self._deciding.upkeep,
                self._deciding.is_costly,
            )
            given = Situation(outlook, left, unread, upkeep, self._alone, is_costly, self._is_restless)
            self._choice = self._chooser.choose(given, before)
            if self._choice.plain:
                self.decisions.expected, self.decisions.plain = self._choice.expected, self._choice.plain
        is_same = (kept, before.is_free) == (self._chooser.kept, self._choice.is_free)
        self._settle(outlook if foresight is not None else None, int(left) if left < LEAST_LEFT else None, is_same)
        if self.costs.knows(self._rows, 0):
            plain = float(self.costs.passes(self._rows, 0)[0])
            self._deciding.share = (time.perf_counter() - started) / plain
        self._holds = 1 + self._backoff.left if self._knows_plain else _MEASURED_PASSES

    def _settle(self, outlook: Outlook | None, left: int | None, is_same: bool) -> None:
        """For how long to stay with the choice that was just made, the same as before or another one.

        outlook: what a drafter has seen, if it has; it changes with every token. left: tokens before the rows' ends, if few.
        """
        chosen, is_costly = self._choice, self._deciding.is_costly
        if not chosen.is_aside:
            self._stay = max(min(2 * self._stay, LONGEST_STAY) if is_same else _STAY, self._least_stay)
        stay = _STAY if chosen.is_aside else self._stay
        if outlook is not None:  # but a model alone may run ahead
            alone = is_costly and bool(outlook.runs_model[np.array(chosen.lengths) > 0].all())
            self._seen += _NEWS * (1.0 - float(outlook.runs_model.mean()) - self._seen)
            often = _OFTEN if self._seen > _SELDOM else 1
            stay = max(_SHORT_STAY, self._least_stay // often * alone)
        is_settled = self._knows_plain and self.costs.knows(self._rows, sum(chosen.lengths))
        self._age = _PROBE_STEPS if chosen.is_try else stay if is_settled else _SHORT_STAY * is_costly
        if chosen.drafts:
            self._backoff.end()
            self._lessons.experience.fade(
                row for row, length in zip(self._ids, chosen.lengths, strict=True) if not length
            )
        elif self._knows_plain:
            self._lessons.experience.fade(self._ids)
            self._backoff.begin(self._deciding, chosen.promise, left, may_change=outlook is not None)
            self._age = 0

    def _probe_steps(self, sequences: Sequences) -> int:
        """Whether it is time to see how drafts fare, and for how many steps there is time to lose."""
        if (
            self._lessons.since < self._wait
            or not self.costs.knows(self._rows, 0)
            or self._left(sequences) < LEAST_LEFT
        ):
            return 0
        passes = self.costs.passes(self._rows, PROBE_TOKENS * self._rows)
        drafting = self.costs.drafts(self._rows, PROBE_TOKENS)[PROBE_TOKENS]
        tokens = 1 + self._lessons.experience.survival([-1], [PROBE_TOKENS]).sum()  # as rows fare on the whole
        lost = max(0.01 * passes[0], drafting + passes[-1] - tokens * passes[0])
        count = int((self._ledger.spare(self._rows) - self.costs.reading * self._lessons.unread(sequences.rows)) / lost)
        return min(count, _PROBE_STEPS) if count > 1 else 0

    def _left(self, sequences: Sequences) -> float:
        """Tokens that a row may still get, on the mean."""
        return max(1.0, sum(row.remaining for row in sequences.rows) / self._rows)
