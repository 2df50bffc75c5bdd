"""Two drafters for one row: a lookup where the text repeats itself, a model elsewhere; per step and row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.draft import Chains, Draft, Drafter, Outlook, Prices, propose
from specdec.drafters.suffix import SuffixDrafter
from specdec.experience import MOST_DRAFT_TOKENS, Experience
from specdec.sampling import one_hot
from specdec.sequences import Sequences, Step


class HybridDrafter:
    """Asks the lookup first; rows whose guess promises less than the model's draft are drafted by the model.

    Where no row needs the model it does not run at all. Unless a controller asks for the ``outlook``, a row is judged by
    its own past alone, so that its neighbours change nothing.
    """

    def __init__(self, model: Drafter, lookup: SuffixDrafter) -> None:
        self.model, self.lookup = model, lookup
        self.experience = Experience.of_positions()
        self._looks_up: NDArray[np.bool_] | None = None  # which rows the lookup speaks for in the step under way
        self._asked_model = False

    @property
    def forward_seconds(self) -> float:
        """Time spent in the draft model."""
        return float(getattr(self.model, "forward_seconds", 0.0))

    def reserve(self, rows: int, length: int) -> None:
        self.model.reserve(rows, length)
        self.lookup.reserve(rows, length)

    def outlook(self, sequences: Sequences, most: list[int], prices: Prices) -> Outlook:
        survival = self._weigh(sequences, most, prices, pooled=True)
        return Outlook(survival, ~self._spoken_for())

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        if self._looks_up is None:
            self._weigh(sequences, lengths, Prices(), pooled=False)
        looks_up = self._spoken_for().tolist()
        by_lookup = [length if looked else 0 for length, looked in zip(lengths, looks_up, strict=True)]
        by_model = [0 if looked else length for length, looked in zip(lengths, looks_up, strict=True)]
        found = self.lookup.propose(sequences, by_lookup)
        self._asked_model = any(by_model)
        if not self._asked_model:
            return found
        drafted = propose(self.model, sequences, by_model)
        return _merged(found, drafted, sequences) if found.tokens.shape[1] else drafted

    def alone(self, sequences: Sequences, lengths: list[int], rule: str) -> Chains | None:
        """The model, if it would make all of these drafts; it may go on then without the lookup."""
        if not sequences.greedy and rule != "coupled":  # how often it looks into the text must not decide what is drawn
            return None
        if self._looks_up is None:
            self._weigh(sequences, lengths, Prices(), pooled=False)
        if (self._spoken_for() & (np.array(lengths) > 0)).any() or not hasattr(self.model, "alone"):
            return None
        found: Chains | None = self.model.alone(sequences, lengths, rule)
        return found

    def observe(self, step: Step) -> None:
        """Judge the guesses; the model has read none of what the lookup proposed."""
        looks_up = [False] * len(step.rows) if self._looks_up is None else self._looks_up.tolist()
        by_model = [0 if looked else n for n, looked in zip(step.drafted, looks_up, strict=True)]
        if self._asked_model or any(by_model):
            accepted = [0 if looked else n for n, looked in zip(step.accepted, looks_up, strict=True)]
            self.model.observe(replace(step, accepted=accepted))
            self.experience.count_chains([row.id for row in step.rows], [by_model], [accepted])
        self.experience.forget(step.rows[slot].id for slot in step.finished)
        self.lookup.observe(step)
        self._looks_up, self._asked_model = None, False

    def observe_rounds(self, steps: Sequence[Step]) -> None:
        rows = [row.id for row in steps[0].rows]
        self.experience.count_chains(rows, [step.drafted for step in steps], [step.accepted for step in steps])
        self.model.observe(steps[-1])
        self.experience.forget(steps[-1].rows[slot].id for slot in steps[-1].finished)
        self.lookup.observe(steps[-1])

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.model.copy(source, target, length)
        self.lookup.copy(source, target, length)

    def free(self, rows: int) -> None:
        self.model.free(rows)
        self.lookup.free(rows)
        if rows == 0:
            self.experience.forget(list(self.experience))
            self._looks_up, self._asked_model = None, False

    def _weigh(self, sequences: Sequences, most: list[int], prices: Prices, *, pooled: bool) -> NDArray[np.float64]:
        """Let the lookup speak for rows where its guess promises at least what the model's draft is worth.

        Returns the survival of the better of both, [B, K].
        """
        rows = sequences.rows
        guesses = self.lookup.look(rows, most)
        width = min(max(most, default=0), MOST_DRAFT_TOKENS)
        looked_up = self.lookup.survival(rows, width, pooled=pooled)
        drafted = self.experience.survival([row.id for row in rows], most, pooled=pooled)[:, :width]
        better = looked_up.sum(1) - prices.alone >= (drafted - prices.token).clip(min=0).sum(1)
        self._looks_up = better & np.array([bool(guess.tokens) for guess in guesses])
        return np.where(self._looks_up[:, None], looked_up, drafted)

    def _spoken_for(self) -> NDArray[np.bool_]:
        assert self._looks_up is not None
        return self._looks_up


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
    known = drafted.probs.shape[1]
    certain[:, :known] = torch.where(is_looked_up.unsqueeze(-1), certain[:, :known], drafted.probs)
    return Draft(tokens, lengths, certain)
