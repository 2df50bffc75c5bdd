"""What drafters that read a target's features do alike: taking them, and following rows from slot to slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from specdec.draft import Outlook, Prices
from specdec.drafters.grown import MOST_TREE_TOKENS, Trees
from specdec.lm.base import CachedLM
from specdec.lm.cache import Memory
from specdec.sequences import Sequences, Step

SLACK = 16  # new features of a row that are read side by side with those of others; padding costs little up to here
_PART = 512  # of one row alone; bounds the memory of a pass


class FeatureDrafter(ABC):
    """A drafter with a cache of its own over the tokens that the target has committed.

    What it takes of a slot are always the features of the last tokens there, all of them if the target has read the row
    anew. So the place of the first is known, and nothing of a row that is gone is left.
    """

    def __init__(self, target: CachedLM, layers: tuple[int, ...], memory: Memory) -> None:
        target.tap(layers)
        self.target, self.layers, self._memory = target, layers, memory
        self._rows = 0  # slots that may hold something

    @torch.inference_mode()
    def reserve(self, rows: int, length: int) -> None:
        if self.target.tapped != self.layers:  # another drafter has tapped it since
            self.target.tap(self.layers)
        self._memory.reserve(rows, min(length, self.target.context) + SLACK)

    def observe(self, step: Step) -> None:  # noqa: B027
        """Nothing to learn: what was committed comes as the target's features."""

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int | None = None) -> None:
        read = self.target.lengths[source]
        if length is not None:
            read = max(0, min(read, length - self.target.starts[source]))
        self._rows = max(self._rows, target + 1)
        self._memory.copy(source, target, read)

    @torch.inference_mode()
    def free(self, rows: int) -> None:
        if rows < self._rows:
            self._memory.wipe(rows, self._rows)
            self._rows = rows

    def _take(self, sequences: Sequences) -> list[int]:
        """Read all features that are new; how many there were of each row."""
        rows = len(sequences)
        self._rows = max(self._rows, rows)
        taken = [self.target.take_features(slot) for slot in range(rows)]
        counts = list(map(len, taken))
        begins = [self.target.lengths[slot] - count for slot, count in enumerate(counts)]
        for slot, features in enumerate(taken):
            if len(features) > SLACK:
                for i, part in enumerate(features[:-1].split(_PART)):
                    self._read(sequences, [part], [begins[slot] + i * _PART], slot)
                taken[slot], begins[slot] = features[-1:], self.target.lengths[slot] - 1
        if any(map(len, taken)):
            self._read_last(sequences, taken, begins)
        return counts

    @abstractmethod
    def _read(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
        """Read features [n, F] of rows in slots ``first`` and on, whose first token is at place ``begins[b]``."""

    def _read_last(self, sequences: Sequences, taken: list[Tensor], begins: list[int]) -> None:
        """The same of all rows, of the last token at least that is new in each."""
        self._read(sequences, taken, begins, 0)


class TreesOfHead(FeatureDrafter):
    """Goes before a chain drafter among the bases of one that proposes trees: ``lengths[b]`` counts nodes of row b's."""

    drafts_trees = True
    most_draft_tokens = MOST_TREE_TOKENS

    def __init__(self, *given: Any, **settings: Any) -> None:
        """Takes what the chain drafter takes."""
        super().__init__(*given, **settings)
        self.trees = Trees()

    @classmethod
    def of(cls, drafter: FeatureDrafter) -> Self:
        """In place of the chain ``drafter``, whose head and memory it takes over."""
        found = cls.__new__(cls)
        vars(found).update(vars(drafter), trees=Trees())
        return found

    def outlook(self, sequences: Sequences, most: list[int], prices: Prices) -> Outlook:
        return self.trees.outlook(sequences, most)

    def observe(self, step: Step) -> None:
        self.trees.observe(step)

    def free(self, rows: int) -> None:
        super().free(rows)
        self.trees.free(rows)
