"""Several rounds of decoding at once, for rows that nobody has to look at in between: rounds.c where models are compiled.

Python takes about as long for a round as a small model does. What is drawn and accepted is what single steps would draw
and accept (see draws.py); a round in which torch must decide is left to them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specdec import draws
from specdec.compiled import compiled
from specdec.nn.cpu import Pass

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "rounds.c", *draws.SOURCES, _HERE / "nn/pass.h")


@dataclass(frozen=True)
class Rounds:
    """Up to ``most`` rounds, all alike.

    texts: ends of the rows' texts, the last token at least and all that the draft model has not read. proposed: tokens
    drafted for each row; 0 for all is plain decoding. limits: the most that may still be, before a row's end; the round
    that passes one of them is the last, as is one with any of ``stops``. ids below ``vocab_size`` are drawn, by the rows'
    temperatures (None: the likeliest), seeds [B] and lengths ``text_lengths`` [B].
    """

    texts: Sequence[Sequence[int]]
    proposed: Sequence[int]
    limits: Sequence[int]
    most: int
    vocab_size: int
    stops: Sequence[int]
    rule: str
    temperatures: Sequence[float] | None
    seeds: Tensor
    text_lengths: Tensor

    @property
    def drafted(self) -> int:
        """The most tokens that are drafted for a row."""
        return max(self.proposed)


class Played(NamedTuple):
    """What rounds gave, [round][row]: tokens to be entered, how many were drafted and accepted; and what they took.

    ``beginning``: by how many of their ``seconds`` the first rounds took longer than later ones, until the processor's
    caches held what they need.
    """

    tokens: list[list[list[int]]]
    drafted: list[list[int]]
    accepted: list[list[int]]
    seconds: float
    beginning: float = 0.0

    def rounds(self) -> Iterator[tuple[list[list[int]], list[int], list[int]]]:
        """Tokens, drafted and accepted of one round after the other."""
        return zip(self.tokens, self.drafted, self.accepted, strict=True)

    def at_once(self) -> Played:
        """All of them as one, in which nothing was drafted."""
        rows = zip(*self.tokens, strict=True)
        tokens = [[[token for own in row for token in own] for row in rows]]
        return self._replace(tokens=tokens, drafted=self.drafted[:1], accepted=self.accepted[:1])


class Reader(Structure):
    """As in rounds.c."""

    kept: object  # what the pointers point to must live as long
    read: NDArray[np.int64]  # tokens in the cache, of each row

    _fields_ = [("first", Pass), ("next", Pass),
                *((name, c_void_p) for name in ("model", "head", "fuse", "forward", "product", "chain", "logits")),
                ("width", c_int64), *((name, c_void_p) for name in ("lengths", "held", "holding")),
                *((name, c_int64) for name in ("most_held", "feature_bytes", "feature_size", "ld_x")),
                ("seconds", c_double)]  # fmt: skip


class _Rounds(Structure):
    """As in rounds.c."""

    _fields_ = [*((name, c_int64) for name in ("rows", "most", "drafted")), ("proposed", c_void_p),
                ("limits", c_void_p), ("vocabulary", c_int64), ("texts", c_void_p), ("stride", c_int64),
                *((name, c_void_p) for name in ("ends", "unread", "accepted", "stops")),
                *((name, c_int64) for name in ("stop_count", "rule")),
                *((name, c_void_p) for name in ("temperatures", "seeds", "text_lengths")),
                *((name, c_void_p) for name in ("target_laws", "draft_laws", "seconds"))]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled function; None where there is none."""
    found = compiled(*_SOURCES, flags=("-ffp-contract=off",), purpose="decoding")
    if found is not None:
        found.rounds.restype = c_int64
    return found


def play(asked: Rounds, target: Reader, draft: Reader | None, unread: Sequence[int]) -> Played | None:
    """Run them; ``unread``: tokens of each text that the draft model has to read. None where nothing is compiled."""
    if (compiled := library()) is None:
        return None
    rows, drafted = len(asked.texts), asked.drafted
    begun = [len(text) for text in asked.texts]
    stride = max(begun) + asked.most * (drafted + 1) + drafted
    texts = _integers([[*text, *[0] * (stride - len(text))] for text in asked.texts])
    accepted = np.empty((asked.most, rows), dtype=np.int64)
    given = [
        _integers(one)
        for one in (
            asked.proposed, asked.limits, begun, unread, asked.stops, asked.seeds.numpy(), asked.text_lengths.numpy()
        )
    ]  # fmt: skip
    proposed, limits, ends, left, stops, seeds, text_lengths = (one.ctypes.data for one in given)
    floats = [np.empty(0, dtype=np.float32)] * 3
    if asked.temperatures is not None:
        laws = (np.empty(rows * count * asked.vocab_size, dtype=np.float32) for count in (drafted + 1, drafted))
        floats = [np.array(asked.temperatures, dtype=np.float32), *laws]
    temperatures, *laws_at = (one.ctypes.data for one in floats)
    taken = np.empty(asked.most)
    described = _Rounds(
        rows, asked.most, drafted, proposed, limits, asked.vocab_size, texts.ctypes.data, stride, ends, left,
        accepted.ctypes.data, stops, len(asked.stops), draws.RULES[asked.rule],
        None if asked.temperatures is None else temperatures, seeds, text_lengths, *laws_at, taken.ctypes.data,
    )  # fmt: skip
    other = Reader() if draft is None else draft
    started = time.perf_counter()
    done = compiled.rounds(ctypes.byref(target), ctypes.byref(other), ctypes.byref(described))
    seconds = time.perf_counter() - started
    return Played(*_played(asked, texts.tolist(), accepted[:done].tolist()), seconds, _beginning(taken[:done]))


def _beginning(taken: NDArray[np.float64]) -> float:
    """Seconds by which rounds that took so long took longer than as many like the later half of them."""
    return max(0.0, float(taken.sum() - len(taken) * taken[len(taken) // 2 :].mean())) if len(taken) else 0.0


def _integers(given: Any) -> NDArray[np.int64]:
    return np.array(given, dtype=np.int64)  # a copy: the rounds write into some of them


def _played(
    asked: Rounds, texts: list[list[int]], accepted: list[list[int]]
) -> tuple[list[list[list[int]]], list[list[int]], list[list[int]]]:
    """Tokens, drafted and accepted, of texts with all that rounds added to them."""
    places, limits = [len(text) for text in asked.texts], list(asked.limits)
    tokens, drafted = [], []
    for counts in accepted:
        drafted.append(list(map(min, asked.proposed, limits)))
        tokens.append(
            [text[place : place + count + 1] for text, place, count in zip(texts, places, counts, strict=True)]
        )
        places = [place + count + 1 for place, count in zip(places, counts, strict=True)]
        limits = [limit - count - 1 for limit, count in zip(limits, counts, strict=True)]
    return tokens, drafted, accepted
