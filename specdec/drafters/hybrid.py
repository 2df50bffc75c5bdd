"""Two drafters for one row: a lookup where the text repeats itself, a model elsewhere; per step and row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from specdec.control import Acceptance
from specdec.draft import Draft, Drafter
from specdec.drafters.ngram import LONGEST_MATCH, Guess, NgramDrafter, padded
from specdec.sampling import one_hot
from specdec.sequences import Row, Sequences, Step

# What is believed before a row has shown anything: acceptance of a lookup by matched tokens, and of the model.
_LOOKUP_PRIOR = [0.0, 0.15, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8]
_MODEL_PRIOR = 0.6


@dataclass
class _Record:
    """How well each way to guess has done for a row."""

    lookup: list[Acceptance] = field(
        default_factory=lambda: [
            Acceptance(_LOOKUP_PRIOR[min(n, len(_LOOKUP_PRIOR) - 1)]) for n in range(LONGEST_MATCH + 1)
        ]
    )
    model: Acceptance = field(default_factory=lambda: Acceptance(_MODEL_PRIOR))


class HybridDrafter:
    """Asks the lookup first; rows whose guess promises less than the model's draft are drafted by the model.

    Where no row needs the model it does not run at all. A row is judged by its own past alone, so that its neighbours
    change nothing.
    """

    def __init__(self, model: Drafter, lookup: NgramDrafter) -> None:
        self.model, self.lookup = model, lookup
        self._records: dict[int, _Record] = {}
        self._guesses: list[Guess] = []
        self._asked_model = False

    @property
    def forward_seconds(self) -> float:
        """Time spent in the draft model."""
        return float(getattr(self.model, "forward_seconds", 0.0))

    def reserve(self, rows: int, length: int) -> None:
        self.model.reserve(rows, length)
        self.lookup.reserve(rows, length)

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        pairs = list(zip(sequences.rows, lengths, strict=True))
        self._guesses = [self._better_guess(row, count) for row, count in pairs]
        left = [0 if guess.matched else count for guess, (_, count) in zip(self._guesses, pairs, strict=True)]
        self._asked_model = any(left)
        looked_up = Draft(*padded([guess.tokens for guess in self._guesses], sequences.device))
        if not self._asked_model:
            return looked_up
        drafted = self.model.propose(sequences, left)
        return _merged(looked_up, drafted, sequences) if looked_up.tokens.shape[1] else drafted

    def observe(self, step: Step) -> None:
        """Judge the guesses; the model has read none of what the lookup proposed."""
        accepted_of_model = list(step.accepted)
        for b, guess in enumerate(self._guesses):  # none in a step of plain decoding
            record = self._records[step.rows[b].id]
            judged = record.lookup[guess.matched] if guess.matched else record.model
            judged.count(step.drafted[b], step.accepted[b])
            if guess.matched:
                accepted_of_model[b] = 0
        self.lookup.observe(step)
        if self._asked_model:
            self.model.observe(replace(step, accepted=accepted_of_model))
        for slot in step.finished:
            self._records.pop(step.rows[slot].id, None)
        self._guesses, self._asked_model = [], False

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.model.copy(source, target, length)
        self.lookup.copy(source, target, length)

    def free(self, rows: int) -> None:
        self.model.free(rows)
        self.lookup.free(rows)
        if rows == 0:
            self._records.clear()

    def _better_guess(self, row: Row, count: int) -> Guess:
        """What the lookup found, if it promises at least what the model does."""
        guess = self.lookup.guess(row, count)
        record = self._records.setdefault(row.id, _Record())
        promised = record.lookup[guess.matched].expected(len(guess.tokens))
        return guess if guess.matched and promised >= record.model.expected(count) else Guess([], 0)


def _merged(looked_up: Draft, drafted: Draft, sequences: Sequences) -> Draft:
    """One draft of two that propose for different rows."""
    width = max(looked_up.tokens.shape[1], drafted.tokens.shape[1])
    first, second = (torch.nn.functional.pad(d.tokens, (0, width - d.tokens.shape[1])) for d in (looked_up, drafted))
    is_looked_up = (looked_up.lengths > 0).unsqueeze(1)
    tokens = torch.where(is_looked_up, first, second)
    lengths = looked_up.lengths + drafted.lengths
    if drafted.probs is None:
        return Draft(tokens, lengths)
    certain = one_hot(tokens, sequences.vocab_size).to(drafted.probs.dtype)
    certain[:, : drafted.probs.shape[1]] = torch.where(
        is_looked_up.unsqueeze(-1), certain[:, : drafted.probs.shape[1]], drafted.probs
    )
    return Draft(tokens, lengths, certain)
