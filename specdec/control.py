"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.costs import Account, Costs
from specdec.draft import Drafter, Foresight, Outlook
from specdec.sequences import Row, Sequences, Step
from specdec.stats import Decisions

AUTO = "auto"
DEFAULT_DRAFT_TOKENS = 4
MOST_DRAFT_TOKENS = 15  # of a draft whose length is chosen; with the last token a pass over 16

_PRIOR = 0.6  # chance of acceptance of a token of which nothing is known
_ROW_MEMORY, _COMMON_MEMORY = 0.9, 0.995  # what is left of evidence after each further draft, of one row and of all
_EVIDENCE = 4.0  # how many drafts' worth of evidence a row needs to be judged by its own past half and half
_PROBE_SHARE = 0.01  # of all time may be lost by trying
_GRACE = 4.0  # plain steps whose time it may lose beyond it
_MOST_AT_ONCE = 4.0  # plain steps, lost by one step; what took longer was disturbed, or is measured again and given up
_CHECK = 5  # plain steps that are measured before it is believed that drafts lose
_FIRST_WAIT, _LONGEST_WAIT = 16, 1024  # steps between tries; twice as many after each that showed nothing
_PROBE_STEPS, _PROBE_TOKENS = 4, 2  # of one such try; the first step pays for reading what was not read
_LEAST_READ = 32  # unread tokens that say what reading costs
_STAY, _LONGEST_STAY = 4, 32  # steps that a choice is kept; twice as many each time it stays the same
_WORSE = 0.75  # of what was expected of a row: that it got less is not put down to chance
_NEW = 0.05  # weight of the latest step in running means
_REST, _LONGEST_REST = 3, 48  # steps of plain decoding after it was found best; twice as many each time again
_LONGEST_DOZE = 16  # the same where a look at the text may change the verdict at any token
_REFRESH = 64  # steps after which plain decoding is measured again
_WORTH = 1.01  # how much faster than plain decoding a draft must promise to be

Table = NDArray[np.float64]


class Experience:
    """How often guesses of N kinds (positions of a draft, say) were right, by row and in all; the latest count most.

    ``rates`` of a row begin as those of all rows (``pooled``) or as fixed ones, for drafts that must not depend on a
    row's neighbours. In a ``chain`` a kind of which little is known is believed to be like the one before it.
    """

    def __init__(self, priors: Sequence[float], *, chain: bool = False) -> None:
        self.priors, self._chain = np.array(priors, dtype=float), chain
        self._nothing = np.zeros((2, len(priors)))  # right, tried
        self._common = self._nothing.copy()
        self._common_known: Table | None = None  # rates of all rows, until more is counted
        self._rows: dict[int, Table] = {}

    @classmethod
    def of_positions(cls) -> Experience:
        """Of the positions of a draft of which nothing else is known."""
        return cls([_PRIOR] * MOST_DRAFT_TOKENS, chain=True)

    def survival(self, ids: Sequence[int], most: Sequence[int], *, pooled: bool = True) -> Table:
        """Where kinds are positions: the chance that the first 1 .. N of up to ``most[b]`` tokens are right, [B, N]."""
        found: Table = self.rates(ids, pooled=pooled).cumprod(1)
        found[np.arange(found.shape[1]) >= np.array(most)[:, None]] = 0
        return found

    def rates(self, ids: Sequence[int], *, pooled: bool = True) -> Table:
        """The chance that the next guess of each kind is right, for every row, [B, N]."""
        own = np.array([self._rows.get(row, self._nothing) for row in ids])
        prior = self._common_rates() if pooled else self.priors
        if pooled and self._chain:  # a row that fares clearly worse than others where it was seen does so elsewhere
            share = (own[:, 0].sum(1) + _EVIDENCE) / ((own[:, 1] * prior).sum(1) + _EVIDENCE)
            prior = prior * np.where(share < _WORSE, share, 1.0)[:, None]
        return _rate(own, prior)

    def _common_rates(self) -> Table:
        if self._common_known is None:
            self._common_known = self._chained() if self._chain else _rate(self._common, self.priors)
        return self._common_known

    def _chained(self) -> Table:
        rates, before = [], float(self.priors[0])
        for right, tried in self._common.T.tolist():
            before = (right + _EVIDENCE * before) / (tried + _EVIDENCE)
            rates.append(before)
        return np.array(rates)

    def count(self, row: int, right: Table, tried: Table) -> None:
        """Add guesses of a row, [N] each."""
        own = self._rows.get(row)
        if own is None:
            own = self._rows[row] = self._nothing.copy()
        for table, memory in ((own, _ROW_MEMORY), (self._common, _COMMON_MEMORY)):
            table *= memory ** (tried > 0)
            table[0] += right
            table[1] += tried
        self._common_known = None

    def count_chain(self, row: int, drafted: int, accepted: int) -> None:
        """Add a draft of which the first ``accepted`` tokens survived; kinds are positions. One was refused, at most."""
        self.count_chains([row], [drafted], [accepted])

    def count_chains(self, rows: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Add one draft of each row; nothing for those without."""
        known = [(row, length, right) for row, length, right in zip(rows, drafted, accepted, strict=True) if length]
        if not known:
            return
        ids, lengths, right = zip(*known, strict=True)
        ends = np.array([right, np.minimum(lengths, np.add(right, 1))]).T  # of what was right, of what was tried
        new = np.arange(len(self.priors)) < ends[:, :, None]
        own = np.array([self._rows.get(row, self._nothing) for row in ids]) * _ROW_MEMORY + new
        self._rows.update(zip(ids, own, strict=True))
        self._common = self._common * _COMMON_MEMORY ** len(ids) + new.sum(0)
        self._common_known = None

    def fade(self, rows: Iterable[int]) -> None:
        """Time has passed without drafts of these rows: what they showed counts less, all rows' past more."""
        for row in rows:
            if row in self._rows:
                self._rows[row] *= _ROW_MEMORY

    def forget(self, rows: Iterable[int]) -> None:
        """These rows are gone."""
        for row in rows:
            self._rows.pop(row, None)

    def __iter__(self) -> Iterator[int]:
        """The rows of which something is known."""
        return iter(self._rows)


def _rate(table: Table, prior: Table) -> Table:
    """Of a table [..., 2, N]."""
    rate: Table = (table[..., 0, :] + _EVIDENCE * prior) / (table[..., 1, :] + _EVIDENCE)
    return rate


class Controller(Protocol):
    """Decides before each step and is told afterwards what came of it and how long it took.

    ``decisions`` are counted since whoever reads them last put new ones in their place.
    """

    decisions: Decisions

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        """Draft lengths of the live rows."""

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        """A step that drafted, or not, as chosen; ``step_seconds`` without ``draft_seconds``."""


class FixedLength:
    """The same number of draft tokens for every row and step, as far as a row has room for them."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.decisions = Decisions()

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        return [min(self.num_draft_tokens, limit) for limit in sequences.draft_limits()]

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        """Nothing to learn."""
        _count(self.decisions, step)


class Adaptive:
    """Drafts as many tokens as promise the most tokens per second, 0 where none does.

    Knows what a pass over B rows of W tokens and their drafts cost (``Costs``, measured as it goes) and how rows fare
    (``Experience``, or the drafter's own ``outlook``). Whatever is promised, drafts that are measured to lose more than
    ``Account`` allows are given up. Where a draft model does not pay it is tried again now and then.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.decisions = Decisions()
        self._experience = Experience.of_positions()
        self._account: Account | None = None  # from when on it is known what a plain step takes
        # Seconds, of all and of what trying took longer than plain decoding, in all and the last time.
        self._elapsed = self._tried = self._last_try = 0.0
        self._since, self._wait = 0, _FIRST_WAIT  # steps since a model drafted, and until it will be tried
        self._has_read: set[int] = set()  # the rows whose text the draft model knows but for what came since
        self._probing = 0  # steps of the probe under way that are left
        self._tokens, self._seconds = 1.0, 0.0  # what a row gained per step and what that usually takes, lately
        self._rows = self._length = self._age = self._since_plain = 0
        self._stay = _STAY
        self._check = 0  # plain steps to measure before anything else
        self._rest = 0  # steps of plain decoding before anything is thought about again
        self._next_rest, self._rested = _REST, 0  # steps of the next rest, and of the last one
        self._free = True  # whether rows whose drafts cost passes of a model go without
        self._tries = False  # whether the draft is made to see what passes cost
        self._runs_model: NDArray[np.bool_] | None = None  # which rows these are; None for none

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        rows = len(sequences.rows)
        if rows != self._rows:
            self._rows, self._age, self._rest, self._next_rest, self._stay = rows, 0, 0, _REST, _STAY
        if self._check or self._rest:
            self._check, self._rest = max(0, self._check - 1), max(0, self._rest - 1)
            return [0] * rows
        self._age -= 1
        foresight: Foresight | None = drafter if hasattr(drafter, "outlook") else None  # type: ignore[assignment]
        is_new = self._age < 0 or foresight is not None
        if not is_new and not self._length and self._runs_model is None:
            return [0] * rows
        most = getattr(drafter, "most_draft_tokens", MOST_DRAFT_TOKENS)  # of a tree more than of a chain
        limits = [min(limit, most) for limit in sequences.draft_limits()]
        if is_new:
            self._decide(sequences, foresight, limits)
        free, length = self._free, self._length
        if not free and length:
            self._probing = 0
        elif max(limits) and self._runs_model is not None and (self._probing or self._may_probe(sequences)):
            if not self._probing:
                self._probing, self._wait = _PROBE_STEPS, min(2 * self._wait, _LONGEST_WAIT)
            self._probing, self._rest = self._probing - 1, 0
            length, free = _PROBE_TOKENS, False
        if not (free and self._runs_model is not None):
            return [min(length, limit) for limit in limits]
        models = self._runs_model.tolist()
        return [0 if model else min(length, limit) for limit, model in zip(limits, models, strict=True)]

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        _count(self.decisions, step)
        self._since += 1
        if self._rest:  # nothing is decided before the last step of one
            self._rested += 1
        else:
            self._learn(step, draft_seconds, step_seconds)
        if step.finished:
            ended = [step.rows[slot].id for slot in step.finished]
            self._experience.forget(ended)
            self._has_read.difference_update(ended)

    def _learn(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        width, rows = max(step.drafted), len(step.rows)
        tokens = sum(step.committed) / rows
        unread = self._unread(step.rows) if draft_seconds else 0
        mean = -(-sum(step.drafted) // rows)  # rows that draft less are read less
        if unread >= _LEAST_READ:
            expected = min(draft_seconds, float(self.costs.drafts(rows, width)[width]))
            self.costs.count_reading((draft_seconds - expected) / unread)
        elif draft_seconds and not unread:
            self.costs.count_draft(rows, width, draft_seconds)
        self.costs.count_pass(rows, 1 + mean, step_seconds)
        if width:
            self._experience.count_chains([row.id for row in step.rows], step.drafted, step.accepted)
        self._since_plain = self._since_plain + 1 if width else 0
        self._tokens += _NEW * (tokens - self._tokens)
        is_try = bool(width) and (self._tries or draft_seconds > 0 and (self._free or not self._length))
        self.decisions.probes += is_try
        if draft_seconds:
            self._since = 0
            self._has_read = {row.id for row in step.rows}
        if not self.costs.knows(rows, 1):
            return
        # What the machine does besides disturbs single steps, long ones more often, so accounts are kept in usual seconds.
        plain = float(self.costs.passes(rows, 0)[0])
        usual = float(self.costs.passes(rows, mean)[mean])
        usual += float(self.costs.drafts(rows, width)[width]) if draft_seconds else 0.0
        usual = min(usual, draft_seconds + step_seconds, (tokens + _MOST_AT_ONCE) * plain)
        self._seconds += (_NEW if self._seconds else 1.0) * (usual - self._seconds)
        rested, self._rested = self._rested * plain, 0
        self._elapsed += usual + rested
        if rested and self._account is not None:
            self._account.book(rested, plain, None)
        if is_try:
            self._last_try = max(0.0, usual + self.costs.reading * unread - tokens * plain)
            self._tried += self._last_try
            if self._account is not None:
                self._account.book_try(usual, plain, tokens)
        else:  # what a draft model had to read was weighed before
            self._wait = _FIRST_WAIT if draft_seconds else self._wait
            self._book(usual, plain, tokens if width else None)

    def _book(self, seconds: float, plain: float, tokens: float | None) -> None:
        """Note a step that was no try; where drafts have lost too much, measure plain decoding before that is believed."""
        if self._account is None:
            self._account = Account(plain)
        self._account.book(seconds, plain, tokens)
        if not self._account.is_spent or self._check:
            return
        if tokens is not None:
            self._check, self._age = _CHECK, 0
        else:
            self._account.settle(plain)

    def _unread(self, rows: Sequence[Row]) -> int:
        """About how many tokens a draft model has to read before it can draft as usual."""
        return sum(self._since - 1 if row.id in self._has_read else len(row.tokens) for row in rows)

    def _price(self) -> float:
        """What the time of one token of a model's usual draft could have brought instead, in tokens per row."""
        if not self.costs.knows(self._rows, 1):
            return 0.0
        seconds = self._seconds or float(self.costs.passes(self._rows, 0)[0])
        draft = float(self.costs.drafts(self._rows, DEFAULT_DRAFT_TOKENS)[-1]) / DEFAULT_DRAFT_TOKENS
        return draft / seconds * self._tokens

    def _decide(self, sequences: Sequences, foresight: Foresight | None, limits: list[int]) -> None:
        """Choose the length of the next drafts, and how many steps to stay with it."""
        ids = [row.id for row in sequences.rows]
        if foresight is not None:
            outlook = foresight.outlook(sequences, limits, self._price())
        else:
            outlook = Outlook(self._experience.survival(ids, limits), np.ones(len(limits), dtype=bool))
        before = self._length, self._free
        self._length, self._free, self._tries = self._best(sequences, outlook)
        self._stay = min(2 * self._stay, _LONGEST_STAY) if (self._length, self._free) == before else _STAY
        is_settled = self._since_plain < _REFRESH and self.costs.knows(self._rows, 1 + self._length)
        self._age = self._stay if is_settled and not self._tries else 0
        if self._length:
            self._next_rest = _REST
        elif self._since_plain < _REFRESH and self.costs.knows(self._rows, 1):
            self._experience.fade(ids)
            self._rest, self._age = self._next_rest, 0
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST if foresight is None else _LONGEST_DOZE)

    def _best(self, sequences: Sequences, outlook: Outlook) -> tuple[int, bool, bool]:
        """The length that promises most, whether only drafts that cost nothing are made, and whether it is but a try."""
        self._runs_model = outlook.runs_model if outlook.runs_model.any() else None
        most = int((outlook.survival > 0).sum(1).max(initial=0))
        if not most or self._since_plain >= _REFRESH or not self.costs.knows(self._rows, 1):
            return 0, True, False
        widest = self.costs.widest(self._rows)
        tries = widest == 1
        if self._account is not None and self._account.is_spent or tries and not self._affords(self._last_try):
            return 0, True, False
        most = min(most, _PROBE_TOKENS if tries else 2 * widest)  # costs far beyond what was measured are but guesses
        plain = float(self.costs.passes(self._rows, 0)[0]) / self._rows  # seconds per token
        free = self._seconds_per_token(outlook, most, ~outlook.runs_model)
        found, best, is_free = int(free.argmin()), float(free.min()), True
        if self._runs_model is not None:
            left = sum(max(1, row.remaining) for row in sequences.rows)
            reading = self.costs.reading * self._unread(sequences.rows) / left
            both = self._seconds_per_token(outlook, most, np.ones_like(outlook.runs_model)) + reading
            if both[1:].min(initial=np.inf) < best:
                found, best, is_free = int(both[1:].argmin()) + 1, float(both[1:].min()), False
            before = self._length if not self._free and self._length <= most else 0
            if before and not is_free and both[before] < _WORTH * best:
                found, best = before, float(both[before])  # looking less often is worth more
        self.decisions.expected, self.decisions.plain = 1 / min(best, plain), 1 / plain
        return (found, is_free, tries) if found and best * _WORTH < plain else (0, True, False)

    def _seconds_per_token(self, outlook: Outlook, most: int, drafted: NDArray[np.bool_]) -> Table:
        """Seconds per token with drafts of 0 .. ``most`` tokens for the rows that are ``drafted`` for."""
        survival = outlook.survival[drafted, :most]
        gained = np.concatenate([[0], survival.sum(0).cumsum()])
        # Not every row has so many, and what rows draft on average is what counts.
        mean = np.concatenate([[0], (survival > 0).sum(0).cumsum() / self._rows])
        seconds = np.interp(mean, np.arange(most + 1), self.costs.passes(self._rows, most))
        if (outlook.runs_model & drafted).any():
            seconds += self.costs.drafts(self._rows, most)
        found: Table = seconds / (self._rows + gained)
        return found

    def _may_probe(self, sequences: Sequences) -> bool:
        """Whether it is time to see how drafts fare, and there is time enough to lose."""
        if self._since < self._wait or not self.costs.knows(self._rows, 1):
            return False
        passes = self.costs.passes(self._rows, _PROBE_TOKENS)
        drafting = self.costs.drafts(self._rows, _PROBE_TOKENS)[_PROBE_TOKENS]
        tokens = 1 + self._experience.survival([-1], [_PROBE_TOKENS]).sum()  # as rows fare on the whole
        cost = _PROBE_STEPS * max(0.0, drafting + passes[-1] - tokens * passes[0])
        return self._affords(cost + self.costs.reading * self._unread(sequences.rows))

    def _affords(self, seconds: float) -> bool:
        """Whether a try may lose so much."""
        allowed = _PROBE_SHARE * self._elapsed + _GRACE * float(self.costs.passes(self._rows, 0)[0])
        return self._tried + seconds <= allowed


def _count(decisions: Decisions, step: Step) -> None:
    width = max(step.drafted)
    decisions.lengths[width] = decisions.lengths.get(width, 0) + 1
