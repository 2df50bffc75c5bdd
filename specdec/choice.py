"""What to draft next: of all that could be, what promises the most tokens per second, and whether that is worth it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from specdec.costs import Costs
from specdec.draft import Outlook
from specdec.experience import Table
from specdec.ledger import Ledger
from specdec.plans import Plan, Plans

PROBE_TOKENS = 2  # of each row, where it is tried what drafts cost
LEAST_LEFT = 32  # tokens that rows must have before them to be worth a try

_WORTH = 1.05  # how much faster than plain decoding drafts must promise to be to begin
_STILL_WORTH = 1.02  # and to go on
_NEARLY, _NEARLY_IF_COSTLY = 1.01, 1.03  # of two choices that differ less, the one made before is kept
# Every so many decisions one that seems not much slower is made, if what it takes was not measured lately.
_ASIDE, _ALMOST, _NOT_LATELY = 6, 1.12, 16
# Steps in a row without one accepted token, at least, that are less likely than this if what is believed holds.
_REFUSED, _UNLIKELY = 3, 0.01


class Situation(NamedTuple):
    """What a choice depends on beside what passes cost.

    outlook of up to N tokens; left: tokens that a row may still get, on the mean; unread: tokens that a draft model must
    read before it can draft, of all rows; upkeep: seconds per drafted step that deciding takes; alone: seconds that a step
    takes longer where not all guesses are a model's; is_costly: whether a decision takes a good share of a plain step;
    is_restless: whether something is decided at every step.
    """

    outlook: Outlook
    left: float
    unread: int
    upkeep: float
    alone: float
    is_costly: bool
    is_restless: bool


class Choice(NamedTuple):
    """How many tokens to draft for every row, and what is believed of that.

    is_free: rows whose drafts cost passes of a model go without; is_try: it is but to see what passes cost; is_aside: it
    measures a neighbour of what seems best; is_look: it measures plain decoding between drafts. promise: how much faster
    than plain decoding the best should be, what a draft model must read first left out; step: plain steps that one as
    chosen takes; patience: steps in a row without an accepted token that are too many; expected, plain: tokens per second,
    0 where nothing was weighed.
    """

    lengths: list[int]
    is_free: bool = True
    is_try: bool = False
    is_aside: bool = False
    is_look: bool = False
    promise: float = 1.0
    step: float = 1.0
    patience: int = _REFUSED
    expected: float = 0.0
    plain: float = 0.0

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return any(self.lengths)

    def given_up(self, rows: int, *, is_look: bool = False) -> Choice:
        """Plain decoding of so many rows instead, for a look or as drafts do not pay; what was believed is still believed."""
        return self._replace(
            lengths=[0] * rows, is_free=True, is_try=False, is_aside=False,
            is_look=is_look and (self.drafts or self.is_look), expected=0.0, plain=0.0,
        )  # fmt: skip


class _Best(NamedTuple):
    """The best of all plans, or none, and whether it drafts only what costs no passes of a model."""

    plans: Plans | None
    plan: Plan | None
    is_free: bool


class Chooser:
    """Weighs what drafts of every length promise against plain decoding.

    kept: depth and tokens of the latest choice that was no aside.
    """

    def __init__(self, costs: Costs, ledger: Ledger) -> None:
        self.kept = 0, 0
        self._costs, self._ledger = costs, ledger
        self._count = 0  # of choices of drafts by a model

    def choose(self, given: Situation, before: Choice) -> Choice:
        """What to do after ``before``; it is known what a plain step takes by now."""
        survival, runs_model = given.outlook
        rows, most = len(runs_model), int((survival > 0).sum(1).max(initial=0))
        known = self._costs.most_drafted(rows)
        nothing = before.given_up(rows)
        if not most or self._ledger.is_spent or not known and not self._may_try(rows, given.left):
            return nothing
        most = most if known else min(most, PROBE_TOKENS)
        survival, total = survival[:, :most], most * rows
        # Twice what was measured at most: beyond that costs are but a guess.
        passes = self._costs.passes(rows, min(total, max(rows, 2 * known)) if known else total)
        if not known:  # assume that passes with drafts cost no more than plain ones: a try will tell
            passes = np.full_like(passes, passes[0])
        drafts = self._costs.drafts(rows, most)
        passes[1:] += given.upkeep + given.alone * (not runs_model.all())
        reading = self._costs.reading * given.unread / given.left if runs_model.any() else 0.0
        drafts[1:] += reading
        plain, best = float(passes[0]), self._best(given, survival, passes, drafts, before)
        if best.plan is None:
            return nothing._replace(expected=rows / plain, plain=rows / plain)
        seconds = best.plan.seconds
        taken = float(passes[best.plan.tokens] + drafts[best.plan.depth] * (not best.is_free))
        first = 0.0 if best.is_free else reading / taken
        found = nothing._replace(
            promise=plain / (seconds * (1 - first)), step=taken / plain,
            expected=rows / min(seconds, plain), plain=rows / plain,
        )  # fmt: skip
        if plain / seconds < (_STILL_WORTH if before.drafts or before.is_look else _WORTH):
            return found
        return self._chosen(given, survival, best, found._replace(is_try=not known))

    def _may_try(self, rows: int, left: float) -> bool:
        return left >= LEAST_LEFT and self._ledger.last_try <= self._ledger.spare(rows)

    def _best(self, given: Situation, survival: Table, passes: Table, drafts: Table, before: Choice) -> _Best:
        """The plan that takes least, or the one before if that is hardly slower: looking less often is worth more."""
        runs_model, best = given.outlook.runs_model, _Best(None, None, True)
        if not runs_model.all():
            plans = Plans(survival * ~runs_model[:, None], passes, drafts * 0, np.zeros_like(runs_model))
            best = _Best(plans, plans.best(), True)
        if not runs_model.any():
            return best
        plans = Plans(survival, passes, drafts, runs_model)
        plan = plans.best()
        if plan is None or best.plan is not None and best.plan.seconds <= plan.seconds:
            return best
        kept = None if before.is_free else plans.like(*self.kept)
        nearly = _NEARLY_IF_COSTLY if given.is_costly else _NEARLY
        return _Best(plans, kept if kept is not None and kept.seconds < nearly * plan.seconds else plan, False)

    def _chosen(self, given: Situation, survival: Table, best: _Best, found: Choice) -> Choice:
        """``found``, with the lengths of the best plan or of one beside it."""
        plans, plan, is_free = best
        assert plans is not None and plan is not None
        self.kept = plan.depth, plan.tokens
        rows, is_aside = len(found.lengths), False
        if not (found.is_try or is_free or given.is_restless):
            aside = self._aside(rows, plans, plan)
            is_aside, plan = aside is not None, aside or plan
        lengths = plans.lengths(plan)
        refused = (1 - survival[np.array(lengths) > 0, 0]).prod()  # the chance of a step without one accepted token
        patience = max(_REFUSED, math.ceil(math.log(_UNLIKELY) / math.log(refused.clip(1e-3, 0.9))))
        return found._replace(lengths=lengths, is_free=is_free, is_aside=is_aside, patience=patience)

    def _aside(self, rows: int, plans: Plans, plan: Plan) -> Plan | None:
        """Now and then a neighbour of ``plan`` that may be better by now."""
        self._count += 1
        if self._count % _ASIDE:
            return None
        near = [plans.of_depth(depth) for depth in (plan.depth // 2, plan.depth - 1, plan.depth + 1, 2 * plan.depth)]
        ages = {self._costs.age(rows, p.tokens): p for p in near if p and p.seconds < _ALMOST * plan.seconds}
        oldest = max(ages, default=0)
        return ages[oldest] if oldest > _NOT_LATELY else None
