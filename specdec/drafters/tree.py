"""A small language model proposes a tree: where it is unsure, several tokens side by side; see grown.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from specdec.draft import Draft, Outlook, Prices
from specdec.drafters.grown import DEEPEST, MOST_TREE_TOKENS, Trees, best, grow
from specdec.drafters.model import ModelDrafter
from specdec.lm.base import CachedLM
from specdec.sequences import Sequences, Step
from specdec.tree import MOST_NODES


class TreeDrafter(ModelDrafter):
    """Drafts with a ``CachedLM`` as ``ModelDrafter`` does; ``lengths[b]`` counts the nodes of row b's tree.

    Where trees cannot be read or verified, it drafts chains.
    """

    drafts_trees = True
    most_draft_tokens = MOST_TREE_TOKENS

    def __init__(self, lm: CachedLM) -> None:
        super().__init__(lm)
        self.trees = Trees()
        self._read: list[list[int]] | None = None  # per row and proposed token, where the model has read it

    def outlook(self, sequences: Sequences, most: list[int], prices: Prices) -> Outlook:
        return self.trees.outlook(sequences, most)

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self._read = None
        if not (sequences.takes_trees and self.lm.reads_trees) or max(lengths) <= 1:
            return super().propose(sequences, lengths)
        levels = min(DEEPEST, max(lengths), self.lm.context // 2)
        unread, counts = self._new_tokens(sequences, levels)
        draft, self._read = behind(self.lm, self._own, sequences, lengths, levels, unread, counts)
        return draft

    def observe(self, step: Step) -> None:
        self.trees.observe(step)
        if self._read is not None:
            kept = []
            for unread, path, places in zip(
                self._unread, step.paths or [[]] * len(self._read), self._read, strict=True
            ):
                known = [places[i] for i in path if places[i] >= 0]  # a node is read after its parent
                kept.append([*range(unread), *(unread + place for place in known)])
            self.lm.keep([len(own) for own in kept], paths=kept)
            self._unread, self._read = [], None
        super().observe(step)

    def free(self, rows: int) -> None:
        super().free(rows)
        self._read = None
        self.trees.free(rows)


def behind(
    lm: CachedLM, own: Callable[[Tensor], Tensor], sequences: Sequences, lengths: list[int], levels: int,
    unread: Tensor, counts: list[int],
) -> tuple[Draft, list[list[int]]]:  # fmt: skip
    """Trees of up to ``lengths[b]`` nodes behind tokens [B, T], ``counts[b]`` of them real, all as ``lm`` guesses them.

    ``own`` makes the model's ids of the target's. And where each node was read among the row's, -1 if it was not.
    """
    most = min(max(lengths), MOST_TREE_TOKENS)
    logits = lm.append(unread, counts, last_only=True).unsqueeze(1)

    def read(tokens: Tensor, parents: Tensor) -> Tensor:
        given = [[count + place for place in nodes] for count, nodes in zip(counts, parents.tolist(), strict=True)]
        return lm.append(own(tokens), parents=given)

    nodes = grow(sequences, logits, read, levels=levels, most=most, room=MOST_NODES - max(counts))
    return best(sequences, nodes, lengths, most)
