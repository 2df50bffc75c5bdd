"""What passes cost: seconds of a target pass that checks N drafted tokens of B rows, and of drafts.

Measured while decoding; what was not measured is interpolated. A machine that others use as well becomes faster and slower
for seconds at a time, and more so than lengths differ, so what was measured a while ago is scaled by what became of what was
measured beside it. Kept per machine and model in the cache directory, so that the next program begins with what this one
learned.
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

_LATEST, _LATEST_PLAIN = 7, 3  # measurements of each cell; plain decoding is seldom measured where drafts pay
_REMEMBERED = 3  # of another program
_ENOUGH = 2  # the first pass of a shape may pay for its preparation
_OLD = 128  # measurements after which one that was not repeated counts no more
_FRESH = 24  # measurements after which interpolations are made anew; at once after a plain pass
_SAME = 0.87  # of a time is no more than chance brings about
_BESIDE = 16  # measurements in which two were taken beside each other
_USUAL = 64  # tokens of which interpolations are made together
_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # that stand for others


class Cell:
    """The latest measurements of one thing, and what is typical: below their median, as disturbances only add.

    A measurement is how many tokens it was of, and seconds.
    """

    def __init__(self, measured: Iterable[tuple[float, float]] = (), latest: int = _LATEST) -> None:
        self.latest = deque(measured, maxlen=latest)
        self.when, self.is_settled = 0, bool(self.latest)
        self.beside: dict[int, float] = {}  # what was typical of other cells beside which this one was measured

    def add(self, tokens: float, seconds: float, when: int, is_settled: bool = True) -> None:
        """Add a measurement, the ``when``-th of all; those that were not settled count only until there is one that is."""
        if is_settled != self.is_settled:
            if self.is_settled:
                return
            self.latest.clear()
            self.is_settled = True
        self.latest.append((tokens, seconds))
        self.when = when

    @property
    def tokens(self) -> float:
        """The mean of theirs."""
        return sum(tokens for tokens, _ in self.latest) / len(self.latest)

    @property
    def typical(self) -> float:
        """Seconds; 0 while nothing was measured."""
        seconds = sorted(seconds for _, seconds in self.latest)
        return seconds[(len(seconds) - 1) // 3] if seconds else 0.0


class Costs:
    """Measured seconds. A target pass includes all of its step but the drafting."""

    def __init__(self) -> None:
        self._passes: dict[int, dict[int, Cell]] = {}  # rows -> drafted tokens of all -> seconds
        self._drafts: dict[int, dict[int, Cell]] = {}  # rows -> drafted tokens of each -> seconds
        self._most: dict[int, int] = {}  # by rows: tokens that passes checked which were measured well
        self._reading = Cell()
        self._latest: dict[int, Cell] = {}  # by table of cells
        self._curves: dict[tuple[str, int, int], tuple[int, NDArray[np.float64]]] = {}
        self._count = 0

    def count_pass(self, rows: int, drafted: int, seconds: float, *, is_settled: bool = True) -> None:
        """Add a step over ``rows`` rows that checked so many tokens in all, and whether it followed others of its kind."""
        cells = self._passes.setdefault(_size(rows), {})
        self._add(cells, _size(drafted), drafted, seconds, is_settled)
        self._note_most(_size(rows), cells[_size(drafted)])
        if not drafted:
            self._curves.clear()

    def count_draft(self, rows: int, tokens: int, seconds: float) -> None:
        """Add the drafting of ``tokens`` tokens for each of ``rows`` rows."""
        self._add(self._drafts.setdefault(_size(rows), {}), tokens, tokens, seconds)

    def count_reading(self, seconds: float) -> None:
        """Add what a draft model took for each token that it had to read before it could draft."""
        self._reading.add(1, seconds, self._count)

    def _add(self, cells: dict[int, Cell], size: int, tokens: int, seconds: float, is_settled: bool = True) -> None:
        cell = cells.setdefault(size, _cell(size))
        if self._latest.get(id(cells)) is not cell:
            lately = {n: other for n, other in cells.items() if other.when and self._count - other.when < _BESIDE}
            cell.beside = {n: other.typical for n, other in lately.items() if other is not cell}
            self._latest[id(cells)] = cell
        self._count += 1
        cell.add(tokens, seconds, self._count, is_settled)

    def is_settled(self, rows: int) -> bool:
        """Whether plain passes over that many rows were measured among others of their kind."""
        cell = self._passes.get(_size(rows), {}).get(0)
        return cell is not None and cell.is_settled

    def knows(self, rows: int, drafted: int) -> bool:
        """Whether passes over that many rows that checked about so many tokens were measured often enough to count on."""
        cell = self._passes.get(_size(rows), {}).get(_size(drafted))
        return cell is not None and len(cell.latest) >= _ENOUGH

    def is_fresh(self, rows: int) -> bool:
        """Whether plain passes over that many rows were measured since the program began: the machine may have changed."""
        cell = self._passes.get(_size(rows), {}).get(0)
        return cell is not None and cell.when > 0

    def age(self, rows: int, drafted: int) -> int:
        """Measurements since a pass over that many rows that checked about so many tokens was the latest of them."""
        cell = self._passes.get(_size(rows), {}).get(_size(drafted))
        return self._count - (0 if cell is None else cell.when)

    def most_drafted(self, rows: int) -> int:
        """The most tokens that passes over that many rows, or about so many, checked; 0 if nothing is known of them."""
        return self._most.get(self._lender(_size(rows)), 0)

    def _lender(self, size: int) -> int:
        """The number of rows whose passes say what drafts cost: ``size``, or the next one of which anything is known."""
        return size if size in self._most else min(self._most, key=lambda n: (abs(n - size), -n), default=size)

    def _note_most(self, size: int, cell: Cell) -> None:
        """Passes over ``size`` rows were added to ``cell``."""
        if cell.is_settled and len(cell.latest) >= _ENOUGH and (most := int(cell.tokens)):
            self._most[size] = max(most, self._most.get(size, 0))

    @property
    def reading(self) -> float:
        """Seconds for each token that a draft model has to read before it can draft; 0 while nothing is known."""
        return self._reading.typical

    def passes(self, rows: int, most: int) -> NDArray[np.float64]:
        """Seconds of passes that check 0 .. ``most`` tokens in all; never less for more tokens.

        Where none of that many rows was measured but plain ones, drafts cost as much more as they do of other numbers.
        """
        size = _size(rows)
        lender = self._lender(size)
        curve, own = self._curve("passes", lender, most), self._passes.get(size, {}).get(0)
        return curve if lender == size or own is None else curve * (own.typical / curve[0])

    def drafts(self, rows: int, most: int) -> NDArray[np.float64]:
        """Seconds of drafting 0 .. ``most`` tokens for each of ``rows`` rows; 0 while nothing is known."""
        if not self._drafts:
            return np.zeros(most + 1)
        return self._curve("drafts", min(self._drafts, key=lambda size: abs(size - rows)), most)

    def _curve(self, what: str, size: int, most: int) -> NDArray[np.float64]:
        cells = (self._passes if what == "passes" else self._drafts)[size]
        made, curve = self._curves.get((what, size, len(cells)), (-_FRESH, np.empty(0)))
        if self._count - made >= _FRESH or len(curve) <= most:
            curve = _interpolated(self._fresh(cells), max(most, _USUAL), from_nothing=what == "drafts")
            self._curves[what, size, len(cells)] = (self._count, curve)
        return curve[: most + 1].copy()

    def _fresh(self, cells: dict[int, Cell]) -> dict[float, float]:
        """What passes, or drafts, of so many tokens should take by now, in seconds.

        What was measured once or long ago is left out, so that it is tried again; the rest is scaled by how others measured
        beside it have changed. A plain pass is scaled down but never up: taken for too slow, it would make losing drafts seem
        to pay, while one taken for too fast is soon measured again.
        """
        drafted = [c for n, c in cells.items() if n and self._count - c.when < _OLD] or [
            c for n, c in cells.items() if n
        ]
        sure = [c for c in drafted if c.is_settled and len(c.latest) >= _ENOUGH]
        plain = {0.0: min(1.0, _pace(cells[0], cells)) * cells[0].typical} if 0 in cells else {}
        return plain | {cell.tokens: _pace(cell, cells) * cell.typical for cell in sure or drafted}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = {"passes": self._passes, "drafts": self._drafts, "reading": {0: {0: self._reading}}}
        return {
            name: {
                rows: {size: list(cell.latest)[-_REMEMBERED:] for size, cell in cells.items()}
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
        for size, cells in costs._passes.items():
            for drafted, cell in cells.items():
                costs._note_most(size, cell)
                if drafted and 0 in cells:  # as fast as the machine was then
                    cell.beside = {0: cells[0].typical}
        return costs


def _pace(cell: Cell, cells: dict[int, Cell]) -> float:
    """What others that were measured since take of what they took beside ``cell``: the machine changed by that."""
    shares = sorted(cells[n].typical / seconds for n, seconds in cell.beside.items() if cells[n].when > cell.when)
    share = shares[(len(shares) - 1) // 2] if shares else 1.0
    return 1.0 if _SAME < share < 1 / _SAME else share


def _cell(size: int, measured: Iterable[tuple[float, float]] = ()) -> Cell:
    return Cell(measured, _LATEST if size else _LATEST_PLAIN)


def _cells(given: dict[Any, dict[Any, list[list[float]]]]) -> dict[int, dict[int, Cell]]:
    return {
        int(rows): {
            int(size): _cell(int(size), [(float(tokens), float(seconds)) for tokens, seconds in latest])
            for size, latest in cells.items()
        }
        for rows, cells in given.items()
    }


def _interpolated(cells: dict[float, float], most: int, *, from_nothing: bool) -> NDArray[np.float64]:
    """Seconds for 0 .. ``most`` tokens: along lines between what was measured, and on from there to both sides.

    Drafts begin with 0 seconds ``from_nothing``. A pass that checks anything does more than a plain one, so that the line
    of those that did does not lead to it, unless only one was measured; and none of those takes less.
    """
    known = {tokens: seconds for tokens, seconds in cells.items() if tokens}
    wanted, least = np.arange(most + 1), 0.0 if from_nothing else min([cells.get(0, 0.0), *known.values()])
    if len(known) < 2 or from_nothing:
        known[0] = least
    tokens, seconds = np.array(sorted(known.items())).T
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]  # what took longer for fewer tokens was disturbed
    found: NDArray[np.float64] = np.interp(wanted, tokens, seconds)
    if len(tokens) > 1:
        slope = (seconds[-1] - seconds[0]) / (tokens[-1] - tokens[0])
        found += slope * (np.maximum(0, wanted - tokens[-1]) - np.maximum(0, tokens[0] - wanted))
    found[0] = least or found[0]
    return np.maximum(found, least)


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


def _size(count: int) -> int:
    """The number of rows, or of tokens, that stands for ``count``."""
    return count and _SIZES[min(bisect_left(_SIZES, count), len(_SIZES) - 1)]
