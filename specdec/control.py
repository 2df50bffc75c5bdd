"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.costs import Costs
from specdec.draft import Drafter, Foresight, Outlook
from specdec.sequences import Sequences, Step
from specdec.stats import Decisions

AUTO = "auto"
DEFAULT_DRAFT_TOKENS = 4
MOST_DRAFT_TOKENS = 15  # of a draft whose length is chosen; with the last token a pass over 16

_PRIOR = 0.6  # chance of acceptance of a token of which nothing is known
_ROW_MEMORY, _COMMON_MEMORY = 0.9, 0.995  # what is left of evidence after each further draft, of one row and of all
_EVIDENCE = 4.0  # how many drafts' worth of evidence a row needs to be judged by its own past half and half
_PROBE_SHARE = 0.01  # of the time may go into drafts that are made only to see whether drafting pays again
_GRACE = 4  # plain steps whose time they may take beyond it, once
_FIRST_WAIT, _LONGEST_WAIT = 16, 1024  # steps between such drafts; twice as many after each that showed nothing
_PROBE_STEPS, _PROBE_TOKENS = 4, 2  # of one such try; the first step pays for reading what was not read
_STAY = 4  # steps that a choice is kept, if nothing but the draft model's past record speaks for another
_NEW = 0.05  # weight of the latest step in running means
_REST, _LONGEST_REST = 3, 24  # steps of plain decoding after it was found best; twice as many each time again
_LONGEST_DOZE = 12  # the same where a look at the text may change the verdict at any token
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

    def rates(self, ids: Sequence[int], *, pooled: bool = True) -> Table:
        """The chance that the next guess of each kind is right, for every row, [B, N]."""
        prior = self._common_rates() if pooled else self.priors
        return _rate(np.array([self._rows.get(row, self._nothing) for row in ids]), prior)

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
        tried = np.zeros(len(self.priors))
        tried[: min(accepted + 1, drafted)] = 1
        right = tried.copy()
        right[accepted:] = 0
        self.count(row, right, tried)

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

    Knows what a pass over B rows of W tokens and a draft token cost (``Costs``, measured as it goes) and how rows fare
    (``Experience``, or the drafter's own ``outlook``). Where a draft model does not pay it is tried again now and then,
    for at most a hundredth of the time.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.decisions = Decisions()
        self._experience = Experience([_PRIOR] * MOST_DRAFT_TOKENS, chain=True)
        self._elapsed = self._probed = 0.0  # seconds, of all and of what probes cost more than plain steps
        self._since, self._wait = 0, _FIRST_WAIT  # steps since a model drafted, and until it will be tried
        self._probing = 0  # steps of the probe under way that are left
        self._tokens = 1.0  # that a row gained per step, lately
        self._rows = self._length = self._age = self._since_plain = 0
        self._rest = 0  # steps of plain decoding before anything is thought about again
        self._next_rest = _REST
        self._free = True  # whether rows whose drafts cost passes of a model go without
        self._runs_model: NDArray[np.bool_] | None = None  # which rows these are; None for none

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        rows = len(sequences.rows)
        if rows != self._rows:
            self._rows, self._age, self._rest, self._next_rest = rows, 0, 0, _REST
        if self._rest:
            self._rest -= 1
            return [0] * rows
        limits = [min(limit, MOST_DRAFT_TOKENS) for limit in sequences.draft_limits()]
        self._age -= 1
        foresight: Foresight | None = drafter if hasattr(drafter, "outlook") else None  # type: ignore[assignment]
        if self._age < 0 or foresight is not None:
            self._decide(self._outlook(sequences, foresight, limits))
            if self._length:
                self._next_rest = _REST
            elif self._since_plain < _REFRESH and self.costs.knows(rows, 1):
                self._experience.fade(row.id for row in sequences.rows)
                self._rest, self._age = self._next_rest, 0
                self._next_rest = min(2 * self._next_rest, _LONGEST_REST if foresight is None else _LONGEST_DOZE)
        free, length = self._free, self._length
        if not free and length:
            self._probing = 0
        elif max(limits) and self._runs_model is not None and (self._probing or self._may_probe()):
            if not self._probing:
                self._probing, self._wait = _PROBE_STEPS, min(2 * self._wait, _LONGEST_WAIT)
            self._probing, self._rest = self._probing - 1, 0
            length, free = _PROBE_TOKENS, False
        if not (free and self._runs_model is not None):
            return [min(length, limit) for limit in limits]
        models = self._runs_model.tolist()
        return [0 if model else min(length, limit) for limit, model in zip(limits, models, strict=True)]

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        self._elapsed += draft_seconds + step_seconds
        _count(self.decisions, step)
        self._since += 1
        if not self._rest:  # nothing is decided before the last step of one
            self._learn(step, draft_seconds, step_seconds)
        self._experience.forget(step.rows[slot].id for slot in step.finished)

    def _learn(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        width, rows = max(step.drafted), len(step.rows)
        catches_up = draft_seconds > 0 and self._since > 1  # a model that reads what was written without it
        if not catches_up:
            if draft_seconds:
                self.costs.count_draft(rows, draft_seconds / max(width, 1))
            # Rows that draft less are read less, so what counts is how much a row drafts on average.
            self.costs.count_pass(rows, 1 + -(-sum(step.drafted) // rows), step_seconds)
        for row, drafted, accepted in zip(step.rows, step.drafted, step.accepted, strict=True):
            if drafted:
                self._experience.count_chain(row.id, drafted, accepted)
        self._since_plain = self._since_plain + 1 if width else 0
        self._tokens += _NEW * (sum(step.committed) / rows - self._tokens)
        if draft_seconds:
            self._since = 0
            if self._free or not self._length:
                if self.costs.knows(rows, 1):  # rows may have left since the probe began
                    self._probed += max(0.0, draft_seconds + step_seconds - self.costs.passes(rows, 0)[0])
                self.decisions.probes += 1
            else:
                self._wait = _FIRST_WAIT

    def _outlook(self, sequences: Sequences, foresight: Foresight | None, limits: list[int]) -> Outlook:
        if foresight is not None:
            return foresight.outlook(sequences, limits, self._price())
        survival = self._experience.rates([row.id for row in sequences.rows]).cumprod(1)
        survival[np.arange(MOST_DRAFT_TOKENS) >= np.array(limits)[:, None]] = 0
        return Outlook(survival, np.ones(len(limits), dtype=bool))

    def _price(self) -> float:
        """What the time of one draft token of a model could have brought instead, in tokens per row."""
        if not self.costs.knows(self._rows, 1):
            return 0.0
        return float(self.costs.draft(self._rows) / self.costs.passes(self._rows, 0)[0] * self._tokens)

    def _decide(self, outlook: Outlook) -> None:
        """Choose the length of the next drafts, and how many steps to stay with it."""
        self._runs_model = outlook.runs_model if outlook.runs_model.any() else None
        most = int((outlook.survival > 0).sum(1).max(initial=0))
        self._length, self._free = self._unmeasured(most) or self._best(outlook, most)
        self._age = _STAY if self._since_plain < _REFRESH else 0

    def _unmeasured(self, most: int) -> tuple[int, bool] | None:
        """The length to try because nothing is known of passes over that many rows; None when enough is."""
        if self._since_plain >= _REFRESH or not self.costs.knows(self._rows, 1):
            return 0, True
        length = min(DEFAULT_DRAFT_TOKENS, most)
        if length and not self.costs.knows_wider(self._rows):
            return length, self._runs_model is None
        return None

    def _best(self, outlook: Outlook, most: int) -> tuple[int, bool]:
        """The length that promises most, and whether only drafts that cost nothing are to be made."""
        passes = self._passes(outlook.survival > 0, most)
        free_passes = self._passes((outlook.survival > 0) & ~outlook.runs_model[:, None], most)
        plain = self._rows / passes[0]
        best, found = plain * _WORTH, (0, True)
        free = outlook.survival[~outlook.runs_model].sum(0)[:most]
        rates = (self._rows + np.concatenate([[0], free.cumsum()])) / free_passes
        if rates.max() > best:
            best, found = float(rates.max()), (int(rates.argmax()), True)
        if self._runs_model is not None:
            gained = np.concatenate([[0], outlook.survival.sum(0)[:most].cumsum()])
            drafting = self.costs.draft(self._rows) * np.arange(most + 1)
            rates = (self._rows + gained) / (passes + drafting)
            rates[0] = 0
            if rates.max() > best:
                best, found = float(rates.max()), (int(rates.argmax()), False)
        self.decisions.expected, self.decisions.plain = float(max(best, plain)), float(plain)
        return found

    def _passes(self, drafted: NDArray[np.bool_], most: int) -> Table:
        """Seconds of passes that check the first 0 .. ``most`` tokens of drafts [B, K]; not every row has so many."""
        curve = self.costs.passes(self._rows, most)
        mean = np.concatenate([[0], drafted[:, :most].sum(0).cumsum() / self._rows])
        found: Table = np.interp(mean, np.arange(most + 1), curve)
        return found

    def _may_probe(self) -> bool:
        """Whether it is time to see how drafts fare, and time enough has passed to afford it."""
        if self._since < self._wait or not self.costs.knows(self._rows, 1):
            return False
        passes = self.costs.passes(self._rows, _PROBE_TOKENS)
        cost = _PROBE_STEPS * (_PROBE_TOKENS * self.costs.draft(self._rows) + passes[-1] - passes[0])
        return bool(self._probed + cost <= _PROBE_SHARE * self._elapsed + _GRACE * passes[0])


def _count(decisions: Decisions, step: Step) -> None:
    width = max(step.drafted)
    decisions.lengths[width] = decisions.lengths.get(width, 0) + 1
