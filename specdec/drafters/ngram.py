"""Prompt lookup: what followed the last occurrence of the row's latest n-gram (Saxena 2023, prompt-lookup-decoding)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.control import Experience
from specdec.draft import Draft, Outlook
from specdec.sequences import Row, Sequences, Step

LONGEST_MATCH = 16  # a longer match says no more about what follows
# What is believed before anything was seen: the chance that the next token is right, by matched tokens.
_PRIORS = [0.0, 0.15, 0.35, 0.5, 0.6, 0.7, 0.75] + [0.8] * (LONGEST_MATCH - 6)

_Table = dict[tuple[int, ...], int]


class Guess(NamedTuple):
    """Tokens that may follow a row's text, and how many of its latest tokens the guess is based on (0: no guess)."""

    tokens: list[int]
    matched: int


class NgramDrafter:
    """Looks the latest tokens up in the row's own text; needs no model. The longest n-gram found wins, latest first.

    An index of n-grams per row, extended with every committed token, makes a lookup a few dictionary reads whatever
    the length of the text. Guesses are judged by what the text became, proposed or not.
    """

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1) -> None:
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self.experience = Experience(_PRIORS)
        self.guesses: list[Guess] = []
        self._are_new = False  # made for a draft that is still to be proposed
        self._tables: dict[int, tuple[_Table, int]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Nothing to do: tables grow with their rows."""

    def look(self, rows: list[Row], most: list[int]) -> list[Guess]:
        """A guess of up to ``most[b]`` tokens for each row; kept until ``observe``."""
        self.guesses = [self._guess(row, count) for row, count in zip(rows, most, strict=True)]
        self._are_new = True
        return self.guesses

    def outlook(self, sequences: Sequences, most: list[int], price: float) -> Outlook:
        self.look(sequences.rows, most)
        return Outlook(self.survival(sequences.rows, max(most, default=0)), np.zeros(len(most), dtype=bool))

    def survival(self, rows: list[Row], width: int, *, pooled: bool = True) -> NDArray[np.float64]:
        """The chance that the first 1 .. ``width`` tokens of each row's guess are right, [B, width]."""
        rates = self.experience.rates([row.id for row in rows], pooled=pooled)
        matched = [guess.matched for guess in self.guesses]
        positions = np.arange(1, width + 1)
        survival: NDArray[np.float64] = rates[np.arange(len(rows)), matched][:, None] ** positions
        survival[positions > np.array([len(guess.tokens) for guess in self.guesses])[:, None]] = 0
        return survival

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        guesses = self.guesses if self._are_new else self.look(sequences.rows, lengths)
        self._are_new = False
        tokens = [guess.tokens[:length] for guess, length in zip(guesses, lengths, strict=True)]
        return Draft(*padded(tokens, sequences.device))

    def observe(self, step: Step) -> None:
        for row, guess, committed in zip(
            step.rows, self.guesses, step.committed, strict=False
        ):  # none if none was made
            if guess.matched:
                self._judge(row, guess, row.tokens[len(row.tokens) - committed :])
        self.guesses, self._are_new = [], False
        self.experience.forget(step.rows[slot].id for slot in step.finished)
        for slot in step.finished:
            self._tables.pop(step.rows[slot].id, None)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Nothing to do: tables belong to rows, wherever they live."""

    def free(self, rows: int) -> None:
        """A row's table goes when the row ends; those of rows that were abandoned go when nothing is live."""
        if rows == 0:
            self.experience.forget(list(self._tables))
            self._tables.clear()
            self.guesses, self._are_new = [], False

    def _guess(self, row: Row, count: int) -> Guess:
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

    def _judge(self, row: Row, guess: Guess, came: list[int]) -> None:
        """Compare a guess with the tokens that came."""
        right = next((i for i, pair in enumerate(zip(guess.tokens, came, strict=False)) if pair[0] != pair[1]), None)
        tried = min(len(guess.tokens), len(came)) if right is None else right + 1
        kind = np.arange(LONGEST_MATCH + 1) == guess.matched
        self.experience.count(row.id, kind * float(tried if right is None else right), kind * float(tried))

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
