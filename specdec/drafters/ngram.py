"""Prompt lookup: what followed the last occurrence of the row's latest n-gram (Saxena 2023, prompt-lookup-decoding)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.sequences import Row, Sequences, Step

LONGEST_MATCH = 16  # a longer match says no more about what follows

_Table = dict[tuple[int, ...], int]


class Guess(NamedTuple):
    """Tokens that may follow a row's text, and how many of its latest tokens the guess is based on (0: no guess)."""

    tokens: list[int]
    matched: int


class NgramDrafter:
    """Looks the latest tokens up in the row's own text; needs no model. The longest n-gram found wins, latest first.

    An index of n-grams per row, extended with every committed token, makes a lookup a few dictionary reads whatever
    the length of the text.
    """

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1) -> None:
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self._tables: dict[int, tuple[_Table, int]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Nothing to do: tables grow with their rows."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        guesses = [self.guess(row, count) for row, count in zip(sequences.rows, lengths, strict=True)]
        tokens, counts = padded([guess.tokens for guess in guesses], sequences.device)
        return Draft(tokens, counts)

    def guess(self, row: Row, count: int) -> Guess:
        """The ``count`` tokens that followed the row's latest n-gram when it last occurred.

        Where that was less than ``count`` tokens ago the guess goes on with its own tokens: the row repeats itself.
        """
        if count <= 0:
            return Guess([], 0)
        tokens = row.tokens
        table = self._index(row)
        for size in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            end = table.get(tuple(tokens[-size:]))
            if end is not None:
                found = tokens[end : end + count]
                while len(found) < count:
                    found.extend(found[: count - len(found)])
                return Guess(found, _matched(tokens, end, size))
        return Guess([], 0)

    def observe(self, step: Step) -> None:
        for slot in step.finished:
            self._tables.pop(step.rows[slot].id, None)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Nothing to do: tables belong to rows, wherever they live."""

    def free(self, rows: int) -> None:
        """A row's table goes when the row ends; those of rows that were abandoned go when nothing is live."""
        if rows == 0:
            self._tables.clear()

    def _index(self, row: Row) -> _Table:
        """The row's table: n-gram -> where its latest earlier occurrence ends."""
        table, done = self._tables.get(row.id, ({}, 0))
        for end in range(done + 1, len(row.tokens)):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                table[tuple(row.tokens[end - size : end])] = end
        self._tables[row.id] = (table, len(row.tokens) - 1)
        return table


def padded(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of tokens as one tensor [B, K], padded on the right, and their lengths [B]."""
    width = max(map(len, texts))
    cells = torch.tensor([[len(text), *text, *[0] * (width - len(text))] for text in texts], device=device)
    return cells[:, 1:], cells[:, 0]


def _matched(tokens: list[int], end: int, size: int) -> int:
    """How far back the text before ``end`` agrees with the end of the text; at least ``size`` tokens."""
    while size < LONGEST_MATCH and size < end and tokens[end - size - 1] == tokens[-size - 1]:
        size += 1
    return size
