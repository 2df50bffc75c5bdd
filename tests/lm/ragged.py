"""Drives a ``CachedLM`` and compares every logit with the model's own, on each row alone and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.lm.base import CachedLM

Plain = Callable[[list[int]], Tensor]  # a text's logits [T, V]


class Checked:
    """A ``CachedLM`` whose logits are checked as they come; ``texts[slot]`` is what the slot has committed."""

    def __init__(self, lm: CachedLM, plain: Plain, tolerance: float = 2e-5) -> None:
        self.lm, self.plain, self.tolerance = lm, plain, tolerance
        self.texts: list[list[int]] = []
        self.pending: list[list[int]] = []

    def reserve(self, rows: int, length: int) -> None:
        self.lm.reserve(rows, length)
        missing = range(rows - len(self.texts))
        self.texts += [[] for _ in missing]
        self.pending += [[] for _ in missing]

    def append(self, tokens: Tensor, counts: Sequence[int] | None = None, *, first: int = 0) -> Tensor:
        logits = self.lm.append(tokens, counts, first=first)
        for b, row in enumerate(tokens.tolist()):
            real = row if counts is None else row[: counts[b]]
            before = self.texts[first + b] + self.pending[first + b]
            self.pending[first + b] += real
            if real:
                self.check(logits[b, : len(real)], before + real)
        return logits

    def append_last(self, tokens: Tensor, counts: Sequence[int]) -> None:
        logits = self.lm.append(tokens, counts, last_only=True)
        for b, row in enumerate(tokens.tolist()):
            self.pending[b] += row[: counts[b]]
            self.check(logits[b, None], self.texts[b] + self.pending[b])

    def check(self, logits: Tensor, text: list[int]) -> None:
        """``logits`` [N, V] are those of the last N tokens of ``text``."""
        expected = self.plain(text)[-len(logits) :]
        torch.testing.assert_close(logits, expected, rtol=self.tolerance, atol=self.tolerance * float(expected.std()))

    def keep(self, counts: Sequence[int], *, first: int = 0) -> None:
        self.lm.keep(counts, first=first)
        for slot, count in enumerate(counts, first):
            self.texts[slot] += self.pending[slot][:count]
            self.pending[slot] = []
        assert self.lm.lengths == [len(text) for text in self.texts]

    def fill(self, texts: Sequence[Sequence[int]], *, first: int = 0) -> None:
        self.lm.fill(texts, first=first)
        for slot, text in enumerate(texts, first):
            self.texts[slot] += text

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.lm.copy(source, target, length)
        self.texts[target] = self.texts[source][:length]
        self.pending[target] = []

    def restart(self, slot: int) -> None:
        self.lm.restart(slot, 0)
        self.texts[slot], self.pending[slot] = [], []

    def free(self, rows: int) -> None:
        self.lm.free(rows)
        for slot in range(rows, len(self.texts)):
            self.texts[slot], self.pending[slot] = [], []


def random_walk(checked: Checked, *, steps: int, seed: int, slots: int = 4) -> None:
    """Everything that the contract allows, in random order and amounts, never beyond the model's context."""
    generator = torch.Generator().manual_seed(seed)
    lm = checked.lm

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def tokens(rows: int, width: int) -> Tensor:
        return torch.randint(lm.vocab_size, (rows, width), generator=generator)

    checked.reserve(slots, 2)  # too little: buffers must grow on the way
    for _ in range(steps):
        first = pick(slots)
        rows = 1 + pick(slots - first)
        room = [lm.context - len(text) for text in checked.texts[first : first + rows]]
        action = pick(9)
        if action < 5:
            width = 1 + pick(5)
            counts = [min(pick(width + 1), left) for left in room]
            checked.append(tokens(rows, width), counts, first=first)
            if action == 0:  # a second append goes on behind the real tokens of the first
                checked.append(
                    tokens(rows, 1), [int(c < left) for c, left in zip(counts, room, strict=True)], first=first
                )
            checked.keep([pick(len(pending) + 1) for pending in checked.pending[first : first + rows]], first=first)
        elif action == 5:
            counts = [pick(min(12, left) + 1) for left in room]
            checked.fill([tokens(1, count)[0].tolist() for count in counts], first=first)
        elif action == 6:
            target = pick(slots)
            if target != first:
                checked.copy(first, target, pick(len(checked.texts[first]) + 1))
        elif action == 7:
            checked.restart(first)
        else:
            checked.free(pick(slots + 1))
