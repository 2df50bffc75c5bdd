"""What passes cost: seconds of a target pass over B rows of W tokens, and of a draft token for B rows.

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

_LATEST = 5  # measurements of each cell
_REMEMBERED = 3  # of another program
_ENOUGH = 2  # the first pass of a shape may pay for its preparation
_OLD = 256  # measurements after which one that was not repeated counts no more
_FRESH = 4  # measurements after which interpolations are made anew
_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # rows that count as alike


class Cell:
    """The latest measurements of one thing, and what is typical: little above the least, as disturbances only add."""

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
    return sorted(seconds)[(len(seconds) - 1) // 4] if seconds else 0.0


class Costs:
    """Measured seconds. A target pass includes all of its step but the drafting."""

    def __init__(self) -> None:
        self._passes: dict[int, dict[int, Cell]] = {}  # rows -> width -> seconds
        self._drafts: dict[int, Cell] = {}  # rows -> seconds per token
        self._curves: dict[tuple[int, int], tuple[int, NDArray[np.float64]]] = {}
        self._count = 0

    def count_pass(self, rows: int, width: int, seconds: float) -> None:
        """Add a step over ``rows`` rows of ``width`` tokens each."""
        self._add(self._passes.setdefault(_size(rows), {}).setdefault(width, Cell()), seconds)

    def count_draft(self, rows: int, seconds: float) -> None:
        """Add the drafting of one token for ``rows`` rows."""
        self._add(self._drafts.setdefault(_size(rows), Cell()), seconds)

    def _add(self, cell: Cell, seconds: float) -> None:
        self._count += 1
        cell.add(seconds, self._count)

    def knows(self, rows: int, width: int) -> bool:
        """Whether passes over that many rows of ``width`` tokens were measured often enough to count on."""
        cell = self._passes.get(_size(rows), {}).get(width)
        return cell is not None and len(cell.latest) >= _ENOUGH

    def knows_wider(self, rows: int) -> bool:
        """Whether any pass that checked drafts was."""
        cells = self._passes.get(_size(rows), {})
        return any(width > 1 and len(cell.latest) >= _ENOUGH for width, cell in cells.items())

    def passes(self, rows: int, most: int) -> NDArray[np.float64]:
        """Seconds of passes over 1 .. ``most + 1`` tokens of each row; never less for more tokens."""
        key = (_size(rows), most)
        made, curve = self._curves.get(key, (-_FRESH, None))
        if curve is None or self._count - made >= _FRESH:
            curve = _interpolated(self._fresh(key[0]), most)
            self._curves[key] = (self._count, curve)
        return curve

    def _fresh(self, size: int) -> dict[int, float]:
        """Typical seconds by width; without what was last measured long ago, so that it will be tried again."""
        cells = self._passes[size]
        fresh = {w: cell.typical for w, cell in cells.items() if w == 1 or self._count - cell.when < _OLD}
        return fresh if len(fresh) > 1 else {width: cell.typical for width, cell in cells.items()}

    def draft(self, rows: int) -> float:
        """Seconds of one draft token for that many rows; 0 while nothing is known."""
        if not self._drafts:
            return 0.0
        return self._drafts[min(self._drafts, key=lambda size: abs(size - rows))].typical

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        passes = {
            rows: {w: list(cell.latest)[-_REMEMBERED:] for w, cell in cells.items()}
            for rows, cells in self._passes.items()
        }
        return {
            "passes": passes,
            "drafts": {rows: list(cell.latest)[-_REMEMBERED:] for rows, cell in self._drafts.items()},
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Costs:
        """What ``as_dict`` gave, perhaps by way of JSON."""
        costs = cls()
        for rows, cells in given["passes"].items():
            costs._passes[int(rows)] = {int(width): Cell(map(float, latest)) for width, latest in cells.items()}
        costs._drafts = {int(rows): Cell(map(float, latest)) for rows, latest in given["drafts"].items()}
        return costs


def _interpolated(cells: dict[int, float], most: int) -> NDArray[np.float64]:
    """Seconds of passes over 1 .. ``most + 1`` tokens, along lines between what was measured, and on from there."""
    widths, seconds = np.array(sorted(cells.items())).T
    seconds = np.maximum.accumulate(seconds)
    wanted = np.arange(1, most + 2)
    found: NDArray[np.float64] = np.interp(wanted, widths, seconds)
    if len(widths) > 1:
        slope = (seconds[-1] - seconds[0]) / (widths[-1] - widths[0])
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
