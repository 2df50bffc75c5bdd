"""What drafts gain and lose against plain decoding, and how much more they may lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specdec.costs import Costs
from specdec.sequences import Step

_LOST_SHARE = 0.005  # of all time may be lost by drafting that promised to pay
_MOST_LOST, _MOST_THOUGHT = 12.0, 2.5e-3  # plain steps whose time it may lose beyond it, and seconds for deciding
_TRUST = 0.25  # how much of what may be lost must have come together before drafts that lost it are made again
_PROBE_SHARE = 0.006  # of all time may be lost by trying
_GRACE = 8.0  # plain steps whose time it may lose beyond it
_MOST_AT_ONCE = 4.0  # plain steps, lost by one step; what took longer was disturbed, or is measured again and given up
_USUAL = 1.1  # times what steps usually take, the most that several together may take undisturbed
_NEW = 0.05  # weight of the latest step in running means
# Passes, or as long, until the processor's caches hold what plain steps need after drafts, or drafts after plain steps.
_SETTLES, _SETTLE_SECONDS = 4, 2e-3


class Timed(NamedTuple):
    """Steps that were measured together.

    unread: tokens that a draft model had to read first; is_settled: whether enough others alike came before.
    """

    steps: Sequence[Step]
    draft_seconds: float
    step_seconds: float
    unread: int
    is_settled: bool

    @property
    def passes(self) -> int:
        """Of the target."""
        return sum(step.passes for step in self.steps)


class Streak:
    """Steps in a row that drafted, or did not: caches of the processor hold what they need after some of them."""

    def __init__(self) -> None:
        self.drafts = False
        self._passes, self._seconds = 0, 0.0

    def add(self, drafts: bool, passes: int, seconds: float) -> bool:
        """One more, or several together; whether half of it was done when caches had settled."""
        if drafts != self.drafts:
            self.drafts, self._passes, self._seconds = drafts, 0, 0.0
        is_settled = self._passes + passes // 2 >= _SETTLES or self._seconds + seconds / 2 > _SETTLE_SECONDS
        self._passes, self._seconds = self._passes + passes, self._seconds + seconds
        return is_settled


class Account:
    """The seconds that drafts which promised to pay may still lose against plain decoding.

    A share of all time is paid in, and what drafts gain; what they lose is taken out. It holds the time of a few plain
    steps, so that no loss hides behind gains of long ago, and chance alone seldom empties it.
    """

    def __init__(self, plain: float) -> None:
        self.left = _most(plain)
        self.is_spent = False
        self._tokens = self._seconds = 0.0  # of the steps that drafted since it was full

    def book(self, seconds: float, plain: float, tokens: float | None) -> None:
        """A step of ``seconds`` where a plain one takes ``plain``; ``tokens`` per row are what it gave, if it drafted."""
        if tokens is not None:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
            self.left += tokens * plain - seconds
        self.left += _LOST_SHARE * seconds
        if self.left >= _most(plain):
            self.left, self._tokens, self._seconds = _most(plain), 0.0, 0.0
        self._judge(plain)

    def book_try(self, seconds: float, plain: float, tokens: float) -> None:
        """The same of a step that was a try: what it gained counts; what it lost is bounded elsewhere."""
        self.left = min(_most(plain), self.left + max(0.0, tokens * plain - seconds))
        self._judge(plain)

    def _judge(self, plain: float) -> None:
        self.is_spent = self.left <= 0 or self.is_spent and self.left < _TRUST * _most(plain)

    def settle(self, plain: float) -> None:
        """A plain step takes ``plain`` seconds, as was just measured: if drafts gained after all, nothing is lost."""
        if self._tokens * plain > self._seconds:
            self.left, self.is_spent = _most(plain), False
        self._tokens = self._seconds = 0.0


def _most(plain: float) -> float:
    """Seconds that may be lost where a plain step takes ``plain``."""
    return _MOST_LOST * plain + _MOST_THOUGHT


class Ledger:
    """Enters what drafts that promised to pay, and tries, brought and took. In seconds, as steps usually take them.

    brought: tokens per row of a step, lately; seconds: what one takes; last_try: what the latest try lost.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._account: Account | None = None  # from when on it is known what a plain step takes
        self._elapsed = self._tried = 0.0  # in all, and what trying took longer than plain decoding
        self.last_try = 0.0
        self.brought, self.seconds = 1.0, 0.0
        self.rested = 0  # plain passes that were not entered yet

    @property
    def is_spent(self) -> bool:
        """Whether drafts have lost what they may."""
        return self._account is not None and self._account.is_spent

    def spare(self, rows: int) -> float:
        """Seconds that tries may still lose."""
        allowed = _PROBE_SHARE * self._elapsed + _GRACE * float(self._costs.passes(rows, 0)[0])
        return allowed - self._tried

    def enter(self, spell: Sequence[Timed], *, is_try: bool, deciding: float = 0.0) -> None:
        """Enter steps of the same rows that drafted alike.

        is_try: they drafted only to see what that takes; deciding: seconds that went into choosing what to draft.
        """
        first, rows, count = spell[0].steps[0], len(spell[0].steps[0].rows), sum(timed.passes for timed in spell)
        brought = sum(sum(step.committed) for timed in spell for step in timed.steps) / rows
        fades = (1 - _NEW) ** count
        self.brought = fades * self.brought + (1 - fades) * brought / count
        if not self._costs.knows(rows, 0):
            return
        plain = float(self._costs.passes(rows, 0)[0])
        most = (2 if is_try else 1) * _MOST_AT_ONCE * plain
        seconds = min(self._usual(spell), brought * plain + most * count)
        self.seconds = fades * (self.seconds or seconds / count) + (1 - fades) * seconds / count
        rested, self.rested = self.rested * plain, 0
        self._elapsed += seconds + rested
        if self._account is None:
            self._account = Account(plain)
        if rested:
            self._account.book(rested, plain, None)
        if is_try:
            reading = self._costs.reading * sum(timed.unread for timed in spell)
            self.last_try = max(0.0, seconds + deciding - brought * plain)
            self._tried += self.last_try + min(reading, most)
            self._account.book_try(seconds, plain, brought)
        else:  # what a draft model had to read was weighed before
            drafts = any(first.drafted)
            self._account.book(seconds + deciding * drafts, plain, brought if drafts else None)

    def settle(self, rows: int) -> None:
        """It was measured what plain steps take: whether drafts lost after all is judged by that."""
        if self._account is not None:
            self._account.settle(float(self._costs.passes(rows, 0)[0]))

    def _usual(self, spell: Sequence[Timed]) -> float:
        """What steps took, or should have: the machine does other things as well, and disturbs long steps more often."""
        first, rows, count = spell[0].steps[0], len(spell[0].steps[0].rows), sum(timed.passes for timed in spell)
        by_model, width, drafted = sum(timed.draft_seconds for timed in spell), max(first.drafted), sum(first.drafted)
        usual = float(self._costs.passes(rows, drafted)[drafted])
        usual += float(self._costs.drafts(rows, width)[width]) if by_model else 0.0
        usual *= _USUAL if count > len(spell) else 1.0
        return min(count * usual, by_model + sum(timed.step_seconds for timed in spell))
