"""Prompt lookup: what followed the last occurrence of the row's latest n-gram (Saxena 2023, prompt-lookup-decoding)."""

from __future__ import annotations

import torch

from specdec.draft import Draft
from specdec.sequences import Row, Sequences, Step

_Table = dict[tuple[int, ...], int]


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
        found = [self._lookup(row, count) if count else [] for row, count in zip(sequences.rows, lengths, strict=True)]
        width = max(map(len, found))
        if width == 0:
            return Draft.empty(len(found), sequences.device)
        table = [[len(tokens), *tokens, *[0] * (width - len(tokens))] for tokens in found]
        cells = torch.tensor(table, device=sequences.device)
        return Draft(cells[:, 1:], cells[:, 0])

    def observe(self, step: Step) -> None:
        for slot in step.finished:
            self._tables.pop(step.rows[slot].id, None)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Nothing to do: tables belong to rows, wherever they live."""

    def free(self, rows: int) -> None:
        """A row's table goes when the row ends; those of rows that were abandoned go when nothing is live."""
        if rows == 0:
            self._tables.clear()

    def _lookup(self, row: Row, count: int) -> list[int]:
        tokens = row.tokens
        table = self._index(row)
        for size in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            end = table.get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end : end + count]
        return []

    def _index(self, row: Row) -> _Table:
        """The row's table: n-gram -> where its latest earlier occurrence ends."""
        table, done = self._tables.get(row.id, ({}, 0))
        for end in range(done + 1, len(row.tokens)):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                table[tuple(row.tokens[end - size : end])] = end
        self._tables[row.id] = (table, len(row.tokens) - 1)
        return table
