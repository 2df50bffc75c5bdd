"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specdec.controller import DEFAULT_DRAFT_TOKENS
from specdec.costs import Costs
from specdec.draft import Drafter, Foresight, Outlook
from specdec.experience import MOST_DRAFT_TOKENS, Experience
from specdec.ledger import Ledger, Streak, Timed
from specdec.plans import Plan, Plans
from specdec.sequences import Row, Sequences, Step
from specdec.stats import Decisions

_CHECK = 5  # plain steps that are measured before any draft, and before it is believed that drafts lose
_MEASURED_PASSES = 8  # of a plain step that is measured; one of several counts twice
_SEVERAL = 4  # rounds that were measured together and drafted
_FIRST_WAIT, _LONGEST_WAIT = 16, 1024  # steps between tries; twice as many after each that showed nothing
_PROBE_STEPS, _PROBE_TOKENS = 8, 2  # of one such try; the first ones take longer than others
_LEAST_LEFT = 32  # tokens that rows must have before them to be worth a try
_LEAST_READ = 32  # unread tokens that say what reading costs
_STAY, _LONGEST_STAY = 8, 64  # steps that a choice is kept; twice as many each time it stays the same
_STAY_CARE = 0.03  # that share of them, at most, in plain steps, may go into deciding where it is dear
_DEAR, _SHORT_STAY = 0.05, 3  # the same where every step's text counts, but deciding takes that share of a plain step
# Steps in a row without one accepted token, at least, that are less likely than this if what is believed holds: it is not
# waited for the next decision then.
_REFUSED, _UNLIKELY = 3, 0.01
# Where looks at the text found something in that share of rows lately, decisions come so much more often.
_SELDOM, _OFTEN, _NEWS = 0.1, 3, 0.1
_CARED = 0.02  # weight of the latest step in what deciding takes per step
# Plain passes that follow the first one after it was found best; twice as many each time again, all together powers of two.
_REST, _LONGEST_REST = 3, 63
_MOST_REST, _CARE = 1023, 0.005  # the longest one where deciding takes more than that share of the rest
# The first one where deciding is dear: that share of it goes into deciding, less where drafts promised less than _FAR.
_FIRST_CARE, _CLEAR_CARE, _FAR = 0.2, 0.02, 0.8
_LONGEST_DOZE = 31  # the same where a look at the text may change the verdict at any token
# Of the time while drafts pay, that share is lost by measuring plain decoding again: often where drafts gain little.
_LOOKS, _LEAST_TRUST, _LONGEST_TRUST = 0.01, 8, 1024
_WORTH = 1.05  # how much faster than plain decoding drafts must promise to be to begin
_STILL_WORTH = 1.02  # and to go on
_NEARLY, _NEARLY_IF_DEAR = 1.01, 1.03  # of two choices that differ less, the one made before is kept
# Every so many decisions one that seems not much slower is made, if what it takes was not measured lately.
_ASIDE, _ALMOST, _NOT_LATELY = 6, 1.12, 16


class Adaptive:
    """Drafts as many tokens as promise the most tokens per second, 0 where none does.

    Knows what a pass over B rows of W tokens and their drafts cost (``Costs``, measured as it goes) and how rows fare
    (``Experience``, or the drafter's own ``outlook``). Whatever is promised, drafts that are measured to lose more than
    ``Ledger`` allows are given up. Where a draft model does not pay it is tried again now and then.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.decisions = Decisions()
        self._experience = Experience.of_positions()
        self._ledger = Ledger(costs)
        self._since, self._wait = 0, _FIRST_WAIT  # steps since a model drafted, and until it will be tried
        self._has_read: set[int] = set()  # the rows whose text the draft model knows but for what came since
        self._begun: set[int] = set()  # numbers of rows for which anything was drafted: the first time is slow
        self._probing = 0  # steps of the probe under way that are left
        self._ids: list[int] = []  # of the rows
        self._rows = self._age = 0
        self._care = 0.0  # seconds per drafted step for deciding, learning and beginning, if a choice is kept for long
        self._refused = 0  # steps in a row whose drafts were refused, all of them
        self._patience = _REFUSED  # how many are too many
        self._since_settled = 0  # drafts since a plain step was measured well
        self._streak = Streak()
        self._step = 1.0  # plain steps that one as chosen takes
        self._promise = (
            1.0  # how much faster than plain decoding the latest choice should be, what is read first left out
        )
        self._lengths: list[int] = []
        self._kept = 0, 0  # depth and tokens of the latest choice but those aside
        self._decisions, self._is_aside = 0, False  # with drafts of a model; whether the latest one only measures
        self._stay = _STAY
        self._check = 0  # plain steps to measure before anything else
        self._holds = 1  # steps that the latest choice holds for
        self._rest = 0  # steps of plain decoding before anything is thought about again
        self._next_rest = _REST
        self._free = True  # whether rows whose drafts cost passes of a model go without
        self._is_restless = False  # whether something is decided at every step
        self._thinking = 0.0  # seconds since anything was learned
        self._seen = 1.0  # share of rows in which looks at the text found something, lately
        self._deciding = 0.0  # plain steps whose time a decision takes
        self._spell: list[Timed] = []  # steps since the last decision, of which nothing was learned yet
        self._tries = False  # whether the draft is made to see what passes cost
        self._runs_model: NDArray[np.bool_] | None = None  # which rows these are; None for none

    @property
    def holds(self) -> int:
        return self._holds

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        started = time.perf_counter()
        lengths = self._choose(sequences, drafter)
        self._thinking += time.perf_counter() - started
        return lengths

    def _choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        rows, ids = len(sequences.rows), [row.id for row in sequences.rows]
        if ids != self._ids:
            self._end_spell()
            self._experience.forget(set(self._experience).difference(ids))  # rows that were given up, not finished
            self._ids, self._age = ids, min(self._age, self._least_stay)  # what holds for all rows holds for new ones
        if rows != self._rows:
            self._rows, self._rest, self._next_rest, self._tries = rows, 0, _REST, False
            self._age, self._stay = 0, _STAY
        if self._check or self._rest:
            self._holds = _MEASURED_PASSES if self._check else self._rest
            self._check, self._rest = max(0, self._check - 1), max(0, self._rest - 1)
            return [0] * rows
        self._holds = 1
        self._age = -1 if self._tries and self._ledger.last_try > self._ledger.spare(self._rows) else self._age - 1
        foresight: Foresight | None = drafter if hasattr(drafter, "outlook") else None  # type: ignore[assignment]
        self._is_restless = foresight is not None and not self._is_dear
        # A single step costs as much as many rounds at once where deciding is dear.
        is_new = self._age < (_SHORT_STAY if self._is_dear and not self._tries else 0) or self._is_restless
        if not is_new and not any(self._lengths) and self._runs_model is None:
            return [0] * rows
        most = getattr(drafter, "most_draft_tokens", MOST_DRAFT_TOKENS)  # of a tree more than of a chain
        limits = [min(limit, most) for limit in sequences.draft_limits()]
        if is_new:
            started = time.perf_counter()
            self._end_spell()
            self._decide(sequences, foresight, limits)
            if self.costs.knows(rows, 0):
                self._deciding = (time.perf_counter() - started) / float(self.costs.passes(rows, 0)[0])
            self._holds = 1 + self._rest if self._knows_plain else _MEASURED_PASSES
        lengths = self._lengths
        if not self._free and any(lengths):
            self._probing = 0
        elif max(limits) and self._runs_model is not None and (self._probing or self._probe_steps(sequences)):
            if not self._probing:
                self._probing, self._wait = self._probe_steps(sequences), min(2 * self._wait, _LONGEST_WAIT)
            self._probing, self._rest = self._probing - 1, 0
            self._holds = 1 + self._probing
            return [min(_PROBE_TOKENS, limit) for limit in limits]
        if any(lengths):
            self._holds = 1 if self._is_restless else 1 + max(0, self._age)
        return [min(length, limit) for length, limit in zip(lengths, limits, strict=True)]

    def observe(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
        self._thinking += overhead
        self.decisions.count(steps)
        first, passes = steps[0], sum(step.passes for step in steps)
        unread = self._unread(first.rows) if draft_seconds else 0
        self._since = 0 if draft_seconds else self._since + passes
        is_settled = self._streak.add(any(first.drafted), passes, draft_seconds + step_seconds)
        self._age, self._probing = self._age - len(steps) + 1, max(0, self._probing - len(steps) + 1)
        self._check, self._rest = max(0, self._check - (passes > 1)), max(0, self._rest - passes + 1)
        if self._rest:  # nothing is decided before the last step of one
            self._ledger.rested += passes
        else:
            timed = Timed(steps, draft_seconds, step_seconds, unread, is_settled)
            begins = self._streak.drafts and len(first.rows) not in self._begun
            if begins or first.is_first:  # what it took says nothing
                self._begun.update([len(first.rows)] * begins)
                self._count_drafts([timed])
            else:
                self._spell.append(timed)
            if unread:
                self._has_read = {row.id for row in first.rows}
            self._look_for_refusals(steps)
            if self._is_restless or self._tries or self._probing or steps[-1].finished:
                self._end_spell()
        if steps[-1].finished:
            ended = [steps[-1].rows[slot].id for slot in steps[-1].finished]
            self._experience.forget(ended)
            self._has_read.difference_update(ended)

    def _look_for_refusals(self, steps: Sequence[Step]) -> None:
        """Decide anew where what was believed does not hold."""
        for step in steps:
            self._refused = self._refused + 1 if self._streak.drafts and not any(step.accepted) else 0
            if self._refused >= self._patience:
                self._age = 0

    def _end_spell(self) -> None:
        """Learn from what was done since the last decision."""
        if self._spell:
            self._learn(self._spell)
            self._spell = []

    def _learn(self, spell: list[Timed]) -> None:
        """Learn from steps of the same rows and the same choice."""
        rows, count = len(spell[0].steps[0].rows), sum(len(timed.steps) for timed in spell)
        for timed in spell:
            self._time(timed, rows)
        self._count_drafts(spell)
        by_model = sum(timed.draft_seconds for timed in spell)
        is_try = self._streak.drafts and (self._tries or by_model > 0 and (self._free or not any(self._lengths)))
        if self._streak.drafts and not is_try:
            fades = (1 - _CARED) ** count
            self._care = fades * self._care + (1 - fades) * self._thinking / max(count, _LONGEST_STAY)
        self.decisions.probes += sum(timed.passes for timed in spell) * is_try
        self._ledger.enter(spell, is_try=is_try)
        self._thinking = 0.0
        if not is_try:
            self._wait = _FIRST_WAIT if by_model else self._wait
            self._look_at_losses(rows)

    def _count_drafts(self, spell: list[Timed]) -> None:
        """Learn how the drafts of these steps fared."""
        steps = [step for timed in spell for step in timed.steps]
        if any(steps[0].drafted):
            ids = [row.id for row in steps[0].rows]
            self._experience.count_chains(ids, [step.drafted for step in steps], [step.accepted for step in steps])

    def _time(self, timed: Timed, rows: int) -> None:
        """Note what steps took."""
        first, count = timed.steps[0], len(timed.steps)
        width, drafted, draft_seconds = max(first.drafted), sum(first.drafted), timed.draft_seconds / count
        seconds = timed.step_seconds / timed.passes
        if timed.unread >= _LEAST_READ:
            expected = min(draft_seconds, float(self.costs.drafts(rows, width)[width]))
            self.costs.count_reading((draft_seconds - expected) / timed.unread)
        elif draft_seconds and timed.unread < count:
            self.costs.count_draft(rows, width, draft_seconds)
        is_settled = timed.is_settled
        if width:
            self._since_settled += count
        else:
            if is_settled or not self.costs.knows(rows, 0):
                self._since_settled = 0
            # Even a plain step that follows others takes at most that long, so what is believed is too much.
            is_settled |= self.costs.is_settled(rows) and seconds < self.costs.passes(rows, 0)[0]
        self.costs.count_pass(rows, drafted, seconds, is_settled=is_settled)
        if count >= _SEVERAL and not self.costs.knows(rows, drafted):  # their mean is as good as two
            self.costs.count_pass(rows, drafted, seconds, is_settled=is_settled)

    def _look_at_losses(self, rows: int) -> None:
        """Where drafts have lost too much, measure plain decoding before that is believed."""
        if not self._ledger.is_spent or self._check:
            return
        if self._streak.drafts:
            self._check, self._age = _CHECK, 0
        else:
            self._ledger.settle(rows)

    def _unread(self, rows: Sequence[Row]) -> int:
        """About how many tokens a draft model has to read before it can draft as usual."""
        return sum(self._since if row.id in self._has_read else len(row.tokens) for row in rows)

    def _price(self) -> float:
        """What the time of one token of a model's usual draft could have brought instead, in tokens per row."""
        if not self.costs.knows(self._rows, 0):
            return 0.0
        seconds = self._ledger.seconds or float(self.costs.passes(self._rows, 0)[0])
        draft = float(self.costs.drafts(self._rows, DEFAULT_DRAFT_TOKENS)[-1]) / DEFAULT_DRAFT_TOKENS
        return draft / seconds * self._ledger.brought

    @property
    def _is_dear(self) -> bool:
        """Whether deciding takes a good share of a plain step."""
        return self._deciding > _DEAR

    @property
    def _least_stay(self) -> int:
        """For how many steps a choice is kept."""
        care = int(self._deciding / _STAY_CARE / self._step)
        return max(_STAY, min(care, _LONGEST_STAY)) if self._is_dear else _STAY

    @property
    def _knows_plain(self) -> bool:
        """Whether it is known what a plain step takes by now."""
        look, gain = _MEASURED_PASSES if self._is_dear else 2, max(1 - 1 / self._promise, 1e-3)
        trust = (look * gain + 2 * self._deciding) / _LOOKS / self._step  # it is decided before and after
        return self.costs.knows(self._rows, 0) and self._since_settled < min(max(trust, _LEAST_TRUST), _LONGEST_TRUST)

    def _decide(self, sequences: Sequences, foresight: Foresight | None, limits: list[int]) -> None:
        """Choose the lengths of the next drafts, and how many steps to stay with them."""
        ids = self._ids
        if foresight is not None:
            outlook = foresight.outlook(sequences, limits, self._price())
        else:
            outlook = Outlook(self._experience.survival(ids, limits), np.ones(len(limits), dtype=bool))
        before = self._kept, self._free
        self._is_aside = False
        self._lengths, self._free, self._tries = self._best(sequences, outlook)
        drafted = sum(self._lengths)
        if not self._is_aside:
            longer = min(2 * self._stay, _LONGEST_STAY)
            self._stay = max(longer if (self._kept, self._free) == before else _STAY, self._least_stay)
        is_settled = self._knows_plain and self.costs.knows(self._rows, drafted)
        stay = _STAY if self._is_aside else self._stay
        if foresight is not None:  # what it sees changes with every token, but a model alone may run ahead
            alone = self._is_dear and bool(outlook.runs_model[np.array(self._lengths) > 0].all())
            self._seen += _NEWS * (1.0 - float(outlook.runs_model.mean()) - self._seen)
            often = _OFTEN if self._seen > _SELDOM else 1
            stay = max(_SHORT_STAY, self._least_stay // often * alone)
        self._age = _PROBE_STEPS if self._tries else stay if is_settled else _SHORT_STAY * self._is_dear
        if drafted:
            self._next_rest = _REST
            self._experience.fade(row for row, length in zip(ids, self._lengths, strict=True) if not length)
        elif self._knows_plain:
            self._experience.fade(ids)
            longest = _LONGEST_REST if foresight is None or self._is_dear else _LONGEST_DOZE
            longest = max(longest, min(int(self._deciding / _CARE), _MOST_REST))
            first = int(self._deciding / (_CLEAR_CARE if self._promise < _FAR else _FIRST_CARE))
            self._rest, self._age = max(self._next_rest, min(first, longest)), 0
            self._next_rest = min(2 * self._rest + 1, longest)

    def _best(self, sequences: Sequences, outlook: Outlook) -> tuple[list[int], bool, bool]:
        """The lengths that promise most, whether only drafts that cost nothing are made, and whether they are but a try."""
        none = [0] * self._rows, True, False
        runs_model = outlook.runs_model
        self._runs_model = runs_model if runs_model.any() else None
        most = int((outlook.survival > 0).sum(1).max(initial=0))
        if not most or not self._knows_plain:
            return none
        known = self.costs.most_drafted(self._rows)
        tries = not known
        left = self._left(sequences)
        if tries and (left < _LEAST_LEFT or self._ledger.last_try > self._ledger.spare(self._rows)):
            return none
        if self._ledger.is_spent:
            return none
        if tries:
            most = min(most, _PROBE_TOKENS)
        survival, total = outlook.survival[:, :most], most * self._rows
        # What passes cost far beyond what was measured is but a guess; of what was not measured well the best is hoped.
        passes = self.costs.passes(self._rows, total if tries else min(total, max(self._rows, 2 * known)))
        passes = np.full_like(passes, passes[0]) if tries else passes
        drafts = self.costs.drafts(self._rows, most)
        passes[1:] += self._care
        plain, model_free = float(passes[0]), np.zeros_like(runs_model)
        plan, is_free, reading = None, True, 0.0
        if not runs_model.all():
            plans = Plans(survival * ~runs_model[:, None], passes, drafts * 0, model_free)
            plan = plans.best()
        if self._runs_model is not None:
            reading = self.costs.reading * self._unread(sequences.rows) / left
            drafts[1:] += reading
            both = Plans(survival, passes, drafts, runs_model)
            with_model = both.best()
            if with_model is not None and (plan is None or with_model.seconds < plan.seconds):
                plans, plan, is_free = both, with_model, False
                before = None if self._free else both.like(*self._kept)
                nearly = _NEARLY_IF_DEAR if self._is_dear else _NEARLY
                if before is not None and before.seconds < nearly * plan.seconds:
                    plan = before  # looking less often is worth more
        seconds = plain if plan is None else plan.seconds
        first = 0.0 if plan is None or is_free else reading / float(passes[plan.tokens] + drafts[plan.depth])
        self._promise = plain / (seconds * (1 - first))
        self.decisions.expected, self.decisions.plain = self._rows / min(seconds, plain), self._rows / plain
        if plan is None or plain / seconds < (_STILL_WORTH if any(self._lengths) else _WORTH):
            return none
        self._kept = plan.depth, plan.tokens
        if not (tries or is_free or self._is_restless):
            plan = self._aside(plans, plan)
        self._step = float(passes[plan.tokens] + drafts[plan.depth] * (not is_free)) / plain
        lengths = plans.lengths(plan)
        refused = (1 - survival[np.array(lengths) > 0, 0]).prod()  # the chance of a step without one accepted token
        self._patience = max(_REFUSED, math.ceil(math.log(_UNLIKELY) / math.log(refused.clip(1e-3, 0.9))))
        return lengths, is_free, tries

    def _aside(self, plans: Plans, plan: Plan) -> Plan:
        """Now and then a neighbour of ``plan`` that may be better by now; else ``plan``."""
        self._decisions += 1
        if self._decisions % _ASIDE:
            return plan
        near = [plans.of_depth(depth) for depth in (plan.depth // 2, plan.depth - 1, plan.depth + 1, 2 * plan.depth)]
        ages = {self.costs.age(self._rows, p.tokens): p for p in near if p and p.seconds < _ALMOST * plan.seconds}
        oldest = max(ages, default=0)
        self._is_aside = oldest > _NOT_LATELY
        return ages[oldest] if self._is_aside else plan

    def _probe_steps(self, sequences: Sequences) -> int:
        """Whether it is time to see how drafts fare, and for how many steps there is time to lose."""
        if self._since < self._wait or not self.costs.knows(self._rows, 0) or self._left(sequences) < _LEAST_LEFT:
            return 0
        passes = self.costs.passes(self._rows, _PROBE_TOKENS * self._rows)
        drafting = self.costs.drafts(self._rows, _PROBE_TOKENS)[_PROBE_TOKENS]
        tokens = 1 + self._experience.survival([-1], [_PROBE_TOKENS]).sum()  # as rows fare on the whole
        lost = max(0.01 * passes[0], drafting + passes[-1] - tokens * passes[0])
        count = int((self._ledger.spare(self._rows) - self.costs.reading * self._unread(sequences.rows)) / lost)
        return min(count, _PROBE_STEPS) if count > 1 else 0

    def _left(self, sequences: Sequences) -> float:
        """Tokens that a row may still get, on the mean."""
        return max(1.0, sum(row.remaining for row in sequences.rows) / self._rows)
