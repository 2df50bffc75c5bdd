"""Which tokens to draft, of all that could be: the best draft of every depth and number of tokens, for a batch of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.experience import Table


class Plan(NamedTuple):
    """A draft for every row: how deep the longest one may be, how many tokens they are in all, and what that takes.

    ``seconds``: for what a plain step brings.
    """

    depth: int
    tokens: int
    seconds: float


class Plans:
    """Drafts of any depth and number of tokens: each token is the one that promises most of those that are left.

    survival [B, K] of each row's tokens; passes [N + 1], seconds of a pass that checks so many tokens, at most N; drafts
    [K + 1], seconds of drafting so many for the rows that ask a model [B].
    """

    def __init__(self, survival: Table, passes: Table, drafts: Table, runs_model: NDArray[np.bool_]) -> None:
        self._rows, width = survival.shape
        worth = np.minimum.accumulate(survival, axis=1).ravel() / self._rows
        order = np.argsort(-worth, kind="stable")[: np.count_nonzero(worth)]  # of equals no token before its prefix
        self._row_of, places = np.divmod(order, width)
        self._depths = np.arange(1, width + 1) if runs_model.any() else np.array([width])
        self._is_in = (places < self._depths[:, None]) | ~runs_model[self._row_of]  # [D, tokens]
        self._counts = self._is_in.cumsum(1)
        seconds = passes[self._counts.clip(max=len(passes) - 1)] + drafts[self._depths][:, None]
        seconds[self._counts >= len(passes)] = np.inf
        self._seconds = seconds / (1 + (self._is_in * worth[order]).cumsum(1))

    def best(self) -> Plan | None:
        """The one that takes least; None where no token promises anything."""
        if not self._seconds.size:
            return None
        row, column = np.unravel_index(self._seconds.argmin(), self._seconds.shape)
        return self._plan(int(row), int(column))

    def of_depth(self, depth: int) -> Plan | None:
        """The best one of that depth, if there is one."""
        if not (self._seconds.size and 1 <= depth <= len(self._depths) > 1):
            return None
        return self._plan(depth - 1, int(self._seconds[depth - 1].argmin()))

    def like(self, depth: int, count: int) -> Plan | None:
        """The one of that depth and number of tokens, if there is one."""
        row = depth - 1 if len(self._depths) > 1 else 0
        if not count or row >= len(self._depths) or not self._seconds.size or count > self._counts[row, -1]:
            return None
        return self._plan(row, int(self._counts[row].searchsorted(count)))

    def lengths(self, plan: Plan) -> list[int]:
        """How many tokens are each row's."""
        row = plan.depth - 1 if len(self._depths) > 1 else 0
        chosen = self._row_of[self._is_in[row] & (self._counts[row] <= plan.tokens)]
        found: list[int] = np.bincount(chosen, minlength=self._rows).tolist()
        return found

    def _plan(self, row: int, column: int) -> Plan:
        return Plan(int(self._depths[row]), int(self._counts[row, column]), float(self._seconds[row, column]))
