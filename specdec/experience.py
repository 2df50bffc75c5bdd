"""How often guesses were right: what a controller and the drafters that judge themselves believe of the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_DRAFT_TOKENS = 15  # of a draft whose length is chosen; with the last token a pass over 16

_PRIOR = 0.6  # chance of acceptance of a token of which nothing is known
_ROW_MEMORY, _COMMON_MEMORY = 0.9, 0.995  # what is left of evidence after each further draft, of one row and of all
_EVIDENCE = 4.0  # drafts that weigh as much as what is believed before
# Drafts of a row that weigh as much as those of all rows; with fewer the next 32 of it are predicted worse.
_OWN_EVIDENCE = 6.0
_WORSE = 0.75  # of what was expected of a row: that it got less is not put down to chance

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
        return _rate(own, prior, _OWN_EVIDENCE if pooled else _EVIDENCE)

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

    def count(self, rows: Sequence[int], right: Table, tried: Table) -> None:
        """Add guesses of each row, [B, N] each."""
        seen = tried > 0
        own = np.array([self._rows.get(row, self._nothing) for row in rows]) * (_ROW_MEMORY**seen)[:, None]
        self._rows.update(zip(rows, own + np.stack([right, tried], axis=1), strict=True))
        self._common = self._common * _COMMON_MEMORY ** seen.sum(0) + np.array([right.sum(0), tried.sum(0)])
        self._common_known = None

    def count_chain(self, row: int, drafted: int, accepted: int) -> None:
        """Add a draft of which the first ``accepted`` tokens survived; kinds are positions. One was refused, at most."""
        self.count_chains([row], [[drafted]], [[accepted]])

    def count_chains(
        self, rows: Sequence[int], drafted: Sequence[Sequence[int]], accepted: Sequence[Sequence[int]]
    ) -> None:
        """Add drafts of the same rows, step after step, [N, B] each; nothing for those without."""
        most = len(self.priors)
        common = [0.0] * (most + 1), [0.0] * (most + 1)
        for b, row in enumerate(rows):
            weight, own = 1.0, ([0.0] * (most + 1), [0.0] * (most + 1))  # drafts by how many were right, and tried
            for lengths, counts in zip(reversed(drafted), reversed(accepted), strict=True):
                if lengths[b]:
                    ends = min(counts[b], most), min(lengths[b], counts[b] + 1, most)
                    for seen, all_seen, end in zip(own, common, ends, strict=True):
                        seen[end] += weight
                        all_seen[end] += 1
                    weight *= _ROW_MEMORY
            if weight < 1:
                self._rows[row] = self._rows.get(row, self._nothing) * weight + _reached(own)
        self._common = self._common * _COMMON_MEMORY ** sum(common[1]) + _reached(common)
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


def _reached(ends: Sequence[Sequence[float]]) -> Table:
    """How many get as far as each position [2, N], of how many end after 0 .. N [2, N + 1]."""
    found: Table = np.array(ends)[:, :0:-1].cumsum(1)[:, ::-1]
    return found


def _rate(table: Table, prior: Table, evidence: float = _EVIDENCE) -> Table:
    """Of a table [..., 2, N]."""
    rate: Table = (table[..., 0, :] + evidence * prior) / (table[..., 1, :] + evidence)
    return rate
