"""Trees of tokens: how deep each one lies, and what it has before it.

A tree is a list of parents, each the place of an earlier token or -1, in the order in which a model reads them. Tokens
of different branches stand side by side in a cache, so that one pass reads them all; a token sees its ancestors alone.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_NODES = 63  # of one row at a time: ancestors are bits of a signed 64-bit word


class Branches:
    """The tokens that one row has read and not committed, as a tree. Roots follow the committed text.

    ``depths[i]`` counts the ancestors of token i; ``seen[i]`` has a bit for each of them and for i itself.
    """

    def __init__(self, chain: int = 0) -> None:
        """``chain``: how many tokens there are already, each the parent of the next."""
        self.depths = list(range(chain))
        self.seen = [(2 << i) - 1 for i in range(chain)]

    def __len__(self) -> int:
        return len(self.depths)

    def grow(self, parents: Iterable[int]) -> None:
        """Add tokens behind the others; a parent is the place of any token before, or -1."""
        for parent in parents:
            place = len(self.depths)
            assert -1 <= parent < place, (parent, place)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            self.seen.append((self.seen[parent] if parent >= 0 else 0) | 1 << place)
        assert len(self) <= MOST_NODES, f"{len(self)} tokens at once; a tree has at most {MOST_NODES}"
