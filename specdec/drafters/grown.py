"""Trees of guesses, grown by whatever can say what follows each of their nodes.

A tree grows level by level from the nodes that are likeliest to be reached, and the likeliest of all are proposed (EAGLE-2,
Li et al. 2024, arXiv 2406.16858). The target reads all of them in one pass, so a tree is worth it where a pass over many
tokens costs little more than one over few: at small batches.

Shapes: B rows, W nodes of a level, M candidates, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.draft import Draft, Outlook
from specdec.experience import Experience
from specdec.sequences import Sequences, Step

MOST_TREE_TOKENS = 48  # of one row's tree
DEEPEST = 16  # levels of a tree
WIDTH = 8  # nodes of a level that are read, and children that each of them may have
CHANCES = (0.75, 0.15, 0.05, 0.03)  # that the first, second, ... child of a node is accepted where children are drawn

_STEP = 1e-4  # what a level costs in log-probability, so that a certain child comes after its parent
_IMPOSSIBLE = -100.0  # the least log-probability of a child; sums of lower ones would be too coarse for that step
_PRIORS = [0.6 / (1 + 0.5 * rank) for rank in range(MOST_TREE_TOKENS)]  # chance that the node of a rank is reached

# Reads nodes [B, W] that hang from nodes read before (-1: from the row's last token); logits [B, W, V'] of their children.
Read = Callable[[Tensor, Tensor], Tensor]


class Surety(NamedTuple):
    """How likely the target takes a child of a node it has come to, by what the draft says of it.

    Of the draft's choice number r (from 0) with probability q, that is as q ** power / (1 + r) ** rank; and as
    exp(none) * q ** (power + doubt), with the q of choice 0, that it takes none of them.
    """

    power: float
    rank: float
    none: float
    doubt: float

    def reached(self, chances: Tensor) -> Tensor:
        """Log-probabilities [..., W] for the draft's own ones of its W likeliest choices, the likeliest first."""
        ranks = torch.arange(chances.shape[-1], device=chances.device, dtype=chances.dtype).log1p()
        found = self.power * chances - self.rank * ranks
        none = found[..., :1] + self.none + self.doubt * chances[..., :1]
        return found - torch.cat([found, none], dim=-1).logsumexp(-1, keepdim=True)


# As three distilled drafts of a target of 7 M have it, over 4,000 tokens of held-out text that the target wrote.
GREEDY = Surety(1.8, 1.4, -7.0, -1.2)
RACE = Surety(1.5, 0.65, -5.6, -1.5)  # q: of winning an exponential race whose noise both of them share


class Nodes(NamedTuple):
    """Candidates of all levels so far: scores (log-probability of the way there), tokens, parents, all [B, M].

    A parent is a place among the candidates, -1 the row's last token; ``read`` is where it was read among the
    nodes, -1 if it was not. laws [B, M, V]: of sampled trees, what each was drawn from.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    read: Tensor
    laws: Tensor | None

    def __add__(self, other: Nodes) -> Nodes:  # type: ignore[override]
        pairs = zip(self, other, strict=True)
        joined = (None if a is None or b is None else torch.cat([a, b], dim=1) for a, b in pairs)
        return Nodes(*joined)  # type: ignore[arg-type]

    def read_by(self, read: Read, chosen: Tensor, count: int) -> Tensor:
        """Read the candidates at ``chosen`` [B, W], of whose tree ``count`` nodes were read before. Logits [B, W, V']."""
        parents = self.parents.gather(1, chosen)
        places = torch.where(parents >= 0, self.read.gather(1, parents.clamp(min=0)), -1)
        new = torch.arange(count, count + chosen.shape[1], device=chosen.device)
        self.read.scatter_(1, chosen, new.expand_as(chosen))
        return read(self.tokens.gather(1, chosen), places)


@lru_cache
def shape(count: int, deepest: int) -> list[tuple[list[int], list[int]]]:
    """A tree of ``count`` nodes for children that are drawn: per level, which nodes have children, and how many.

    Best first by ``CHANCES``, which say nothing of the tokens. Nodes are numbered level by level, -1 is the root.
    """
    heap = [(-1.0, 0, -1, 0, 1)]  # (-chance, order, parent, rank among its children, depth)
    children: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(count):
        chance, _, parent, rank, depth = heappop(heap)
        children[parent].append(node)
        if rank + 1 < len(CHANCES):
            heappush(heap, (chance * CHANCES[rank + 1] / CHANCES[rank], 2 * node + 1, parent, rank + 1, depth))
        if depth < min(deepest, DEEPEST):
            heappush(heap, (chance * CHANCES[0], 2 * node + 2, node, 0, depth + 1))
    levels, numbers, frontier = [], {-1: -1}, [-1]
    while frontier := [node for node in frontier if children[node]]:
        levels.append(([numbers[node] for node in frontier], [len(children[node]) for node in frontier]))
        frontier = [child for node in frontier for child in children[node]]
        numbers |= {node: len(numbers) - 1 + i for i, node in enumerate(frontier)}
    return levels


class Trees:
    """How trees fare whose nodes come best first: by the rank of a node, how often it was reached."""

    def __init__(self) -> None:
        self.experience = Experience(_PRIORS)

    def outlook(self, sequences: Sequences, most: list[int]) -> Outlook:
        """See ``Foresight``."""
        survival = self.experience.rates([row.id for row in sequences.rows])
        survival = np.minimum.accumulate(survival, axis=1)[:, : max(most, default=0)]
        survival[np.arange(survival.shape[1]) >= np.array(most)[:, None]] = 0
        return Outlook(survival, np.ones(len(most), dtype=bool))

    def observe(self, step: Step) -> None:
        """Learn which nodes were reached."""
        drafted = [b for b, count in enumerate(step.drafted) if count]
        if drafted:
            right = np.zeros((len(drafted), MOST_TREE_TOKENS))
            for reached, b in zip(right, drafted, strict=True):
                reached[list(range(step.accepted[b]) if step.paths is None else step.paths[b])] = 1
            tried = np.arange(MOST_TREE_TOKENS) < np.array([step.drafted[b] for b in drafted])[:, None]
            self.experience.count([step.rows[b].id for b in drafted], right, tried.astype(float))
        self.experience.forget(step.rows[slot].id for slot in step.finished)

    def free(self, rows: int) -> None:
        """Only the first ``rows`` slots are still in use."""
        if rows == 0:
            self.experience.forget(list(self.experience))


def grow(sequences: Sequences, logits: Tensor, read: Read, *, levels: int, most: int, room: int) -> Nodes:
    """Candidates for trees of up to ``most`` nodes and ``levels`` levels, behind rows with ``logits`` [B, 1, V'].

    At most ``room`` nodes of a row are read.
    """
    if sequences.only_largest or sequences.coupled:
        return _likeliest(sequences, logits, read, levels, most, room)
    return _drawn(sequences, logits, read, levels, most)


def _likeliest(sequences: Sequences, logits: Tensor, read: Read, levels: int, most: int, room: int) -> Nodes:
    """Candidates by probability, for rules under which any may be left out: greedy and coupled ones."""
    root = torch.full((len(logits), 1), -1, device=logits.device)
    nodes = _children(sequences, logits, torch.zeros(root.shape, device=root.device), root, 0)
    begin = count = 0  # of the newest level; nodes that were read
    for level in range(1, levels):
        known = nodes.scores.shape[1]
        reach = max(1, (room - count) // (levels - level))  # wider, there would be no room for the deepest level
        width = min(WIDTH, known - begin, reach)
        scores, chosen = nodes.scores[:, begin:].topk(width, dim=1)
        if known >= most:  # no child of a node could be proposed that is hardly among the best
            least = nodes.scores.topk(most, dim=1).values[:, -1:]
            hopeful = int((scores - _STEP > least).any(0).sum())
            scores, chosen = scores[:, :hopeful], chosen[:, :hopeful]
        if not chosen.shape[1] or count + chosen.shape[1] > room:
            break
        chosen = chosen + begin
        logits = nodes.read_by(read, chosen, count)
        begin, count = known, count + chosen.shape[1]
        nodes = nodes + _children(sequences, logits, scores, chosen, level)
    return nodes


def _children(sequences: Sequences, logits: Tensor, scores: Tensor, parents: Tensor, level: int) -> Nodes:
    """The likeliest children of nodes [B, W] with these ``logits`` [B, W, V'] and ``scores``; [B, W * WIDTH]."""
    fitted = sequences.fit(logits)
    children = min(WIDTH, fitted.shape[-1])
    if sequences.only_largest:
        found, tokens = fitted.topk(children, dim=-1)
        found = GREEDY.reached(found - fitted.logsumexp(-1, keepdim=True))
    else:  # what wins the race that the target will run, and by how much
        laws = sequences.draft_laws(fitted, sequences.last_tokens[:, :0])
        offsets = torch.full((len(laws), 1), level, device=laws.device)
        chances = laws / sequences.randomness.target(offsets, laws.shape[-1])
        found, tokens = chances.topk(children, dim=-1)
        found = RACE.reached((found / chances.sum(-1, keepdim=True)).log())
    scores = (scores.unsqueeze(-1) + found.clamp(min=_IMPOSSIBLE) - _STEP).flatten(1)
    parents = parents.unsqueeze(-1).expand(-1, -1, children).flatten(1)
    return Nodes(scores, tokens.flatten(1), parents, torch.full_like(parents, -1), None)


def _drawn(sequences: Sequences, logits: Tensor, read: Read, levels: int, most: int) -> Nodes:
    """Children drawn without replacement. How many a node has is settled before, and all are proposed.

    Leaving one out because of what it is would change the text's law.
    """
    nodes, count = None, 0
    for parents, numbers in shape(most, levels):
        chosen = torch.tensor(parents, device=logits.device).expand(len(logits), -1)
        if nodes is not None:
            logits = nodes.read_by(read, chosen, count)
            count += len(parents)
        new = _drawn_children(sequences, logits, chosen, count, numbers)
        nodes = new if nodes is None else nodes + new
    assert nodes is not None
    return nodes


def _drawn_children(sequences: Sequences, logits: Tensor, parents: Tensor, read: int, numbers: list[int]) -> Nodes:
    """``numbers[i]`` children of node i of [B, W], in the order in which they win an exponential race."""
    laws = sequences.draft_laws(sequences.fit(logits), sequences.last_tokens[:, :0])
    noise = sequences.randomness.branches(read, laws.shape[1], laws.shape[-1])
    tokens = (laws / noise).topk(min(max(numbers), laws.shape[-1]), dim=-1).indices
    left, drawn_from = laws, []
    for token in tokens.split(1, dim=-1):
        drawn_from.append(left)
        left = left.scatter(-1, token, 0.0)
        left = left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
    real = torch.arange(tokens.shape[-1], device=tokens.device) < torch.tensor(numbers, device=tokens.device)[:, None]
    parents = parents.unsqueeze(-1).expand_as(tokens)[:, real]
    probs = torch.stack(drawn_from, dim=2)[:, real]
    return Nodes(probs[..., 0] * 0, tokens[:, real], parents, torch.full_like(parents, -1), probs)


def best(sequences: Sequences, nodes: Nodes, lengths: list[int], most: int) -> tuple[Draft, list[list[int]]]:
    """The draft of the likeliest candidates, best first, so that parents come before their children.

    And where each of its tokens was read among the nodes, by row; -1 where it was not.
    """
    count = min(most, nodes.tokens.shape[1])
    if nodes.laws is None:
        chosen = nodes.scores.topk(count, dim=1).indices
    else:
        chosen = torch.arange(count, device=nodes.tokens.device).expand(len(lengths), -1)
    ranks = torch.full_like(nodes.parents, -1).scatter(
        1, chosen, torch.arange(count, device=chosen.device).expand_as(chosen)
    )
    parents = nodes.parents.gather(1, chosen)
    given = torch.where(parents >= 0, ranks.gather(1, parents.clamp(min=0)), -1).tolist()
    probs = None if nodes.laws is None else nodes.laws[:, :count]
    broken = nodes.scores.isnan().any(1).tolist()
    counts = [0 if wrong else min(length, count) for length, wrong in zip(lengths, broken, strict=True)]
    draft = Draft(
        nodes.tokens.gather(1, chosen).to(sequences.device),
        torch.tensor(counts, device=sequences.device),
        probs,
        [own[:length] for own, length in zip(given, counts, strict=True)],
    )
    return draft, nodes.read.gather(1, chosen).tolist()
