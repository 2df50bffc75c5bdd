"""Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): what most often followed the end of the row's text before.

Unlike there, later occurrences count more (the automaton's half-life), a guess that reaches the text's end goes on with
what followed shorter ends of it, and a draft is as long as whoever asks wants: the engine's controller knows costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specdec.draft import Draft, Outlook, Prices
from specdec.drafters.automaton import NOTHING, START, Guess, new_automaton
from specdec.errors import ConfigError
from specdec.experience import Experience
from specdec.sequences import Row, Sequences, Step

DEPTH = 64  # tokens of the longest string whose continuations are counted
LONGEST_MATCH = 16  # a longer match says no more about what follows
MOST_TOKENS = 1 << 16  # of one row's text, or of the store, that are indexed; about 32 MB
# What is believed before anything was seen: by matched tokens, how many of those come that should by their shares.
_PRIORS = [0.0, 0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8] + [0.85] * (LONGEST_MATCH - 8) + [0.9]


class SuffixDrafter:
    """Follows the likeliest continuation of the row's text, by counts over all its repetitions; needs no model.

    Every end of the text that occurred before proposes at most ``factor`` times as many tokens as it is long; the
    proposal of which most tokens should be right wins. Where it is asked what guesses are worth, they are judged by what
    the text became, proposed or not.

    With ``share`` the outputs of earlier calls and rows, up to a bound, are looked up as well. What a row is proposed
    then depends on what came before it; its law does not, and under the rule "coupled" its text does not either.
    """

    def __init__(self, *, factor: float = math.inf, share: bool = False) -> None:
        if not isinstance(factor, int | float) or not factor > 0:
            raise ConfigError(f"factor must be > 0, got {factor!r}; 1 is cautious, math.inf sets no bound")
        self.factor = factor
        self.experience = Experience(_PRIORS)
        self.guesses: list[Guess] | None = None  # of the step under way, if it was asked what they are worth
        self._texts: dict[int, _Text] = {}
        self._store = _Store() if share else None

    def reserve(self, rows: int, length: int) -> None:
        """Nothing to do: the index grows with its rows."""

    def look(self, rows: Sequence[Row], most: Sequence[int]) -> list[Guess]:
        """A guess of up to ``most[b]`` tokens for each row; kept until ``observe``, which judges it."""
        self.guesses = self._look(rows, most)
        return self.guesses

    def outlook(self, sequences: Sequences, most: list[int], prices: Prices) -> Outlook:
        self.look(sequences.rows, most)
        return Outlook(self.survival(sequences.rows, max(most, default=0)), np.zeros(len(most), dtype=bool))

    def survival(self, rows: Sequence[Row], width: int, *, pooled: bool = True) -> NDArray[np.float64]:
        """The chance that the first 1 .. ``width`` tokens of each row's guess are right, [B, width]."""
        guesses = self.guesses or []
        shares, matched = np.zeros((len(rows), width)), np.zeros((len(rows), width), dtype=int)
        for b, guess in enumerate(guesses):
            count = min(len(guess.tokens), width)
            shares[b, :count], matched[b, :count] = guess.shares[:count], guess.matched[:count]
        rates = self.experience.rates([row.id for row in rows], pooled=pooled)
        found: NDArray[np.float64] = (
            (shares * np.take_along_axis(rates, matched.clip(max=LONGEST_MATCH), axis=1)).clip(max=1).cumprod(1)
        )
        return found

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        guesses = self._look(sequences.rows, lengths) if self.guesses is None else self.guesses
        tokens = [guess.tokens[:length] for guess, length in zip(guesses, lengths, strict=True)]
        return Draft.certain(tokens, sequences.device)

    def observe(self, step: Step) -> None:
        if self.guesses is not None:
            self._judge(step, self.guesses)
        self.guesses = None
        self.experience.forget(step.rows[slot].id for slot in step.finished)
        for slot in step.finished:
            self._texts.pop(step.rows[slot].id, None)
            if self._store is not None and step.rows[slot].error is None:
                self._store.add(step.rows[slot].new_tokens)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Nothing to do: texts belong to rows, wherever they live."""

    def free(self, rows: int) -> None:
        """A row's index goes when the row ends; those of rows that were abandoned go when nothing is live."""
        if rows == 0:
            self.experience.forget(list(self._texts))
            self._texts.clear()
            self.guesses = None

    def _look(self, rows: Sequence[Row], most: Sequence[int]) -> list[Guess]:
        return [self._guess(row, count) for row, count in zip(rows, most, strict=True)]

    def _guess(self, row: Row, most: int) -> Guess:
        """The better of what the row's own text and the store say; its own where they are equal."""
        if most <= 0:
            return NOTHING
        text = self._texts.get(row.id)
        if text is None:
            text = self._texts[row.id] = _Text()
        text.read(row.tokens, self._store)
        found = text.automaton.guess(None, most, self.factor)
        if self._store is None:
            return found
        stored = self._store.automaton.guess(text.place, most, self.factor)
        return stored if stored.score > found.score else found

    def _judge(self, step: Step, guesses: list[Guess]) -> None:
        """Compare guesses with the tokens that came: how many were right, by matched tokens, and should have been."""
        judged = [b for b, guess in enumerate(guesses) if guess.tokens and step.committed[b]]
        if not judged:
            return
        counts = np.zeros((2, len(judged), LONGEST_MATCH + 1))  # right, promised
        for right, promised, b in zip(*counts, judged, strict=True):
            tokens = step.rows[b].tokens
            for token, share, matched, true in zip(
                *guesses[b][:3], tokens[len(tokens) - step.committed[b] :], strict=False
            ):
                place = min(matched, LONGEST_MATCH)
                promised[place] += share
                right[place] += token == true
                if token != true:
                    break
        self.experience.count([step.rows[b].id for b in judged], *counts)


class _Text:
    """A row's own text, indexed as far as it was read; only its latest tokens if it is very long."""

    def __init__(self) -> None:
        self.automaton = new_automaton(DEPTH)
        self.place = START  # of the text's end in the store
        self._count = self._outputs = 0  # tokens that were read, outputs that were stored then

    def read(self, tokens: list[int], store: _Store | None) -> None:
        """Take in what is new, and find the text's end in the store."""
        new = tokens[self._count :]
        self._count = len(tokens)
        if self.automaton.size + len(new) > MOST_TOKENS:
            self.automaton, new = new_automaton(DEPTH), tokens[-MOST_TOKENS // 2 :]
        self.automaton.feed(new)
        if store is None:
            return
        if self._outputs != store.outputs:
            self._outputs, self.place, new = store.outputs, START, tokens
        for token in new[-DEPTH:]:
            self.place = store.automaton.advance(self.place, token)


class _Store:
    """Outputs of earlier rows; the oldest half is dropped where they become too many."""

    def __init__(self) -> None:
        self.automaton, self.outputs = new_automaton(DEPTH), 0  # outputs that were ever added
        self._texts: deque[list[int]] = deque()

    def add(self, text: list[int]) -> None:
        """Index one more text."""
        text = text[-MOST_TOKENS // 2 :]
        self.outputs += 1
        self._texts.append(text)
        new = [text]
        if self.automaton.size + len(text) > MOST_TOKENS:
            kept = sum(map(len, self._texts))
            while kept > MOST_TOKENS // 2:
                kept -= len(self._texts.popleft())
            self.automaton, new = new_automaton(DEPTH), list(self._texts)
        for tokens in new:
            self.automaton.begin()
            self.automaton.feed(tokens)
