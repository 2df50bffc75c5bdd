"""Trees of tokens: how deep each one lies, and what it has before it.

A tree is a list of parents, each the place of an earlier token or -1, in the order in which a model reads them. Tokens
of different branches stand side by side in a cache, so that one pass reads them all; a token sees its ancestors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.sampling import Randomness, one_hot, race
from specdec.verify import Verdict

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


class Path(NamedTuple):
    """The way through a tree that survives: places [B, D] of its tokens, the first ``accepted`` [B] of them real.

    next_token [B] is the bonus or correction that follows.
    """

    places: Tensor
    accepted: Tensor
    next_token: Tensor


class Tree(NamedTuple):
    """A draft's tokens as nodes of which number 0 is the row's last committed token, and token i is node i + 1.

    parents [B, K] of each token's node, -1 where there is none; depths [B, K + 1] of the nodes; deepest of all.
    """

    parents: Tensor
    depths: Tensor
    deepest: int

    @classmethod
    def of(cls, parents: Sequence[Sequence[int]], device: torch.device) -> Tree:
        """The tree of a draft's ``parents``."""
        width = max(map(len, parents))
        depths = []
        for own in parents:
            branches = Branches()
            branches.grow(own)
            depths.append([0, *(depth + 1 for depth in branches.depths), *[0] * (width - len(own))])
        nodes = [[*(parent + 1 for parent in own), *[-1] * (width - len(own))] for own in parents]
        deepest = max(map(max, depths))
        return cls(torch.tensor(nodes, device=device), torch.tensor(depths, device=device), deepest)


def nodes_of(draft: Draft) -> list[list[int]] | None:
    """What a model is to read of a draft behind each row's last token: parents as ``CachedLM.append`` takes them."""
    if draft.parents is None:
        return None
    return [[-1, *(parent + 1 for parent in own)] for own in draft.parents]


def follow(chosen: Tensor, tree: Tree, draft: Draft) -> Path:
    """The way that the target's own tokens take: ``chosen`` [B, K + 1] follow the nodes.

    Exact for greedy laws, and for any if ``chosen`` is drawn as plain sampling would draw it (the rule ``coupled``).
    """
    rows = torch.arange(len(chosen), device=chosen.device)
    node, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    places, accepted = [], torch.zeros_like(rows)
    for _ in range(tree.deepest):
        wanted = chosen[rows, node].unsqueeze(1)
        hits = (tree.parents == node.unsqueeze(1)) & (draft.tokens == wanted)
        alive = alive & hits.any(1)
        place = hits.long().argmax(1)
        node = torch.where(alive, place + 1, node)
        accepted = accepted + alive
        places.append(place)
    return Path(torch.stack(places, dim=1), accepted, chosen[rows, node])


def coupled(target_probs: Tensor, tree: Tree, draft: Draft, randomness: Randomness) -> Path:
    """Draw after every node as plain sampling would at its position; ``target_probs`` [B, K + 1, V] by node."""
    chosen = race(target_probs, randomness.target(tree.depths, target_probs.shape[-1]))
    return follow(chosen, tree, draft)


def rejection(target_probs: Tensor, tree: Tree, draft: Draft, randomness: Randomness) -> Path:
    """Try the children of a node one after another, each against what earlier ones have left of the target's law.

    Multi-round rejection without replacement (Miao et al. 2024, arXiv 2305.09781; Chen et al. 2024, Sequoia, arXiv
    2402.12374). Without ``draft.probs`` a child is accepted with what is left of its own probability.
    """
    rows = torch.arange(len(target_probs), device=target_probs.device)
    node, accepted = torch.zeros_like(rows), torch.zeros_like(rows)
    places = torch.zeros(len(rows), tree.deepest + 1, dtype=torch.long, device=rows.device)
    left = target_probs[:, 0]
    uniforms = randomness.accept(draft.tokens.shape[1])
    for i, token in enumerate(draft.tokens.unbind(1)):
        drawn_from = draft.probs[:, i] if draft.probs is not None else one_hot(token, left.shape[-1])
        # A law with fewer tokens than children has nothing left to draw some of them from.
        tried = (tree.parents[:, i] == node) & (drawn_from[rows, token] > 0)
        if tried.is_cpu and not tried.any():  # elsewhere asking would be a synchronisation
            continue
        hit = tried & (uniforms[:, i] < left[rows, token] / drawn_from[rows, token])
        excess = (left - drawn_from).clamp_(min=0)
        mass = excess.sum(-1, keepdim=True)
        refused = (tried & ~hit).unsqueeze(-1) & (mass > 0)
        left = torch.where(hit.unsqueeze(-1), target_probs[:, i + 1], torch.where(refused, excess / mass, left))
        places[rows, accepted] = torch.where(hit, i, places[rows, accepted])
        node, accepted = torch.where(hit, i + 1, node), accepted + hit
    return Path(places[:, :-1], accepted, race(left, randomness.target(accepted, left.shape[-1])))


def along(path: Path, logits: Tensor, draft: Draft) -> tuple[Tensor, Draft, Verdict]:
    """Logits [B, D + 1, V], draft and verdict as those of a chain: what lies on the path that survives."""
    nodes = torch.nn.functional.pad(path.places + 1, (1, 0))
    followed = logits.gather(1, nodes.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    chain = Draft(draft.tokens.gather(1, path.places), draft.lengths)
    return followed, chain, Verdict(path.accepted, path.next_token)
