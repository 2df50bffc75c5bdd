"""What passes cost: seconds of a target pass over B rows of W tokens, and of drafts for B rows; what drafts may lose.

Measured while decoding; what was not measured is interpolated. Kept per machine and
model in the cache directory, so that the next program begins with what this one learned.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LATEST = 7  # measurements of each cell
_REMEMBERED = 3  # of another program
_ENOUGH = 2  # the first pass of a shape may pay for its preparation
_OLD = 256  # measurements after which one that was not repeated counts no more
_LOST_SHARE = 0.005  # of all time may be lost by drafting that promised to pay
_MOST_LOST = 20.0  # plain steps whose time it may lose beyond it
_TRUST = 0.25  # how much of what may be lost must have come together before drafts that lost it are made again
_FRESH = 8  # measurements after which interpolations are made anew
_USUAL = 32  # draft tokens of which interpolations are made together
_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # rows that count as alike


class Cell:
    """The latest measurements of one thing, and what is typical: below their median, as disturbances only add."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self.latest = deque(seconds, maxlen=_LATEST)
        self.typical = _typical(self.latest)
        self.when = 0

    def add(self, seconds: float, when: int) -> None:
        """Add a measurement, the ``when``-th of all."""
        self.latest.append(seconds)
        self.typical = _typical(self.latest)
        self.when = when


def _typical(seconds: deque[float]) -> float:
    return sorted(seconds)[(len(seconds) - 1) // 3] if seconds else 0.0


class Costs:
    """Measured seconds. A target pass includes all of its step but the drafting."""

    def __init__(self) -> None:
        self._passes: dict[int, dict[int, Cell]] = {}  # rows -> width -> seconds
        self._drafts: dict[int, dict[int, Cell]] = {}  # rows -> tokens -> seconds
        self._reading = Cell()
        self._curves: dict[tuple[str, int, int], tuple[int, NDArray[np.float64]]] = {}
        self._count = 0

    def count_pass(self, rows: int, width: int, seconds: float) -> None:
        """Add a step over ``rows`` rows of ``width`` tokens each."""
        self._add(self._passes.setdefault(_size(rows), {}).setdefault(width, Cell()), seconds)

    def count_draft(self, rows: int, tokens: int, seconds: float) -> None:
        """Add the drafting of ``tokens`` tokens for each of ``rows`` rows."""
        self._add(self._drafts.setdefault(_size(rows), {}).setdefault(tokens, Cell()), seconds)

    def count_reading(self, seconds: float) -> None:
        """Add what a draft model took for each token that it had to read before it could draft."""
        self._add(self._reading, seconds)

    def _add(self, cell: Cell, seconds: float) -> None:
        self._count += 1
        cell.add(seconds, self._count)

    def knows(self, rows: int, width: int) -> bool:
        """Whether passes over that many rows of ``width`` tokens were measured often enough to count on."""
        cell = self._passes.get(_size(rows), {}).get(width)
        return cell is not None and len(cell.latest) >= _ENOUGH

    def widest(self, rows: int) -> int:
        """Tokens per row of the widest passes that were, 1 if none were that checked drafts."""
        cells = self._passes.get(_size(rows), {})
        return max((width for width, cell in cells.items() if len(cell.latest) >= _ENOUGH), default=1)

    @property
    def reading(self) -> float:
        """Seconds for each token that a draft model has to read before it can draft; 0 while nothing is known."""
        return self._reading.typical

    def passes(self, rows: int, most: int) -> NDArray[np.float64]:
        """Seconds of passes over 1 .. ``most + 1`` tokens of each row; never less for more tokens."""
        return self._curve("passes", _size(rows), most)

    def drafts(self, rows: int, most: int) -> NDArray[np.float64]:
        """Seconds of drafting 0 .. ``most`` tokens for each of ``rows`` rows; 0 while nothing is known."""
        if not self._drafts:
            return np.zeros(most + 1)
        return self._curve("drafts", min(self._drafts, key=lambda size: abs(size - rows)), most)

    def _curve(self, what: str, size: int, most: int) -> NDArray[np.float64]:
        cells = (self._passes if what == "passes" else self._drafts)[size]
        made, curve = self._curves.get((what, size, len(cells)), (-_FRESH, np.empty(0)))
        if self._count - made >= _FRESH or len(curve) <= most:
            wanted = np.arange(max(most, _USUAL) + 1)
            if what == "passes":
                curve = _interpolated(self._fresh(cells), wanted + 1)
            else:
                curve = _interpolated({0: 0.0} | self._fresh(cells), wanted)
            self._curves[what, size, len(cells)] = (self._count, curve)
        return curve[: most + 1]

    def _fresh(self, cells: dict[int, Cell]) -> dict[int, float]:
        """Typical seconds by width; without what was last measured long ago, so that it will be tried again."""
        fresh = {w: cell.typical for w, cell in cells.items() if w == 1 or self._count - cell.when < _OLD}
        return fresh if len(fresh) > 1 else {width: cell.typical for width, cell in cells.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = {"passes": self._passes, "drafts": self._drafts, "reading": {0: {0: self._reading}}}
        return {
            name: {
                rows: {width: list(cell.latest)[-_REMEMBERED:] for width, cell in cells.items()}
                for rows, cells in table.items()
            }
            for name, table in tables.items()
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Costs:
        """What ``as_dict`` gave, perhaps by way of JSON."""
        costs = cls()
        costs._passes, costs._drafts, reading = (_cells(given[name]) for name in ("passes", "drafts", "reading"))
        costs._reading = reading[0][0]
        return costs


class Account:
    """The seconds that drafts which promised to pay may still lose against plain decoding.

    A share of all time is paid in, and what drafts gain; what they lose is taken out. It holds the time of a few plain
    steps, so that no loss hides behind gains of long ago, and chance alone seldom empties it.
    """

    def __init__(self, plain: float) -> None:
        self.left = _MOST_LOST * plain
        self.is_spent = False
        self._tokens = self._seconds = 0.0  # of the steps that drafted since it was full

    def book(self, seconds: float, plain: float, tokens: float | None) -> None:
        """A step of ``seconds`` where a plain one takes ``plain``; ``tokens`` per row are what it gave, if it drafted."""
        if tokens is not None:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
            self.left += tokens * plain - seconds
        self.left += _LOST_SHARE * seconds
        if self.left >= _MOST_LOST * plain:
            self.left, self._tokens, self._seconds = _MOST_LOST * plain, 0.0, 0.0
        self._judge(plain)

    def book_try(self, seconds: float, plain: float, tokens: float) -> None:
        """The same of a step that was a try: what it gained counts; what it lost is bounded elsewhere."""
        self.left = min(_MOST_LOST * plain, self.left + max(0.0, tokens * plain - seconds))
        self._judge(plain)

    def _judge(self, plain: float) -> None:
        self.is_spent = self.left <= 0 or self.is_spent and self.left < _TRUST * _MOST_LOST * plain

    def settle(self, plain: float) -> None:
        """A plain step takes ``plain`` seconds, as was just measured: if drafts gained after all, nothing is lost."""
        if self._tokens * plain > self._seconds:
            self.left, self.is_spent = _MOST_LOST * plain, False
        self._tokens = self._seconds = 0.0


def _cells(given: dict[Any, dict[Any, list[float]]]) -> dict[int, dict[int, Cell]]:
    return {
        int(rows): {int(width): Cell(map(float, latest)) for width, latest in cells.items()}
        for rows, cells in given.items()
    }


def _interpolated(cells: dict[int, float], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds of passes over the ``wanted`` numbers of tokens, along lines between what was measured, and on from there."""
    widths, seconds = np.array(sorted(cells.items())).T
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]  # what took longer for fewer tokens was disturbed
    found: NDArray[np.float64] = np.interp(wanted, widths, seconds)
    if len(widths) > 1:
        first = int(len(widths) > 2)  # a pass that checks nothing does without some of the work
        slope = (seconds[-1] - seconds[first]) / (widths[-1] - widths[first])
        found += slope * np.maximum(0, wanted - widths[-1])
    return found


def read_costs(file: Path) -> dict[str, Costs]:
    """The tables in ``file``, by name; none when there is no such file or it cannot be understood: it is a cache."""
    try:
        return {name: Costs.from_dict(table) for name, table in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_costs(file: Path, tables: dict[str, Costs]) -> None:
    """Write the tables; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({name: table.as_dict() for name, table in tables.items()}))
    os.replace(temporary, file)


def _size(rows: int) -> int:
    """The number of rows that stands for ``rows``."""
    return _SIZES[min(bisect_left(_SIZES, rows), len(_SIZES) - 1)]
