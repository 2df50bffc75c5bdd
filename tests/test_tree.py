"""The rules for trees of tokens keep the target's law; wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec import Draft
from specdec.sampling import Randomness
from specdec.tree import Path, Tree, along, coupled, follow, rejection
from test_law import ALPHA, p_value

ROWS, VOCAB = 60_000, 5
PARENTS = [-1, -1, 0, -1, 0, 1]  # three children of the root, two of the first, one of the second
Rule = Callable[[Tensor, Tree, Draft, Randomness], Path]


def random_laws(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 1.5).softmax(-1)


def children_drawn(laws: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [ROWS, K] of ``PARENTS`` drawn without replacement, and the laws [ROWS, K, V] they were drawn from.

    laws [V + 1, V]: those of the draft after the root (the last) and after each token.
    """
    tokens = torch.zeros(ROWS, len(PARENTS), dtype=torch.long)
    drawn_from = torch.zeros(ROWS, len(PARENTS), VOCAB)
    for i, parent in enumerate(PARENTS):
        law = laws[tokens[:, parent] if parent >= 0 else torch.full((ROWS,), VOCAB)].clone()
        for sibling in range(i):
            if PARENTS[sibling] == parent:
                law.scatter_(1, tokens[:, sibling : sibling + 1], 0)
        drawn_from[:, i] = law / law.sum(-1, keepdim=True)
        tokens[:, i] = drawn_from[:, i].multinomial(1, generator=generator).squeeze(1)
    return tokens, drawn_from


def committed(rule: Rule, *, certain: bool = False, planted: str = "") -> tuple[Tensor, Tensor]:
    """Counts [V, V] of the first two tokens that a rule commits (the second drawn plainly if it must), and their law."""
    target, draft = random_laws(VOCAB + 1, VOCAB, seed=1), random_laws(VOCAB + 1, VOCAB, seed=2)
    generator = torch.Generator().manual_seed(3)
    if certain:
        tokens, probs = torch.tensor([[1, 3, 2, 0, 4, 1]]).expand(ROWS, -1), None
    else:
        tokens, probs = children_drawn(draft, generator)
        if planted == "with replacement":
            root = torch.full((ROWS, 1), VOCAB)
            known = torch.cat([tokens, root], dim=1)
            probs = torch.stack([draft[known[:, parent]] for parent in PARENTS], dim=1)
    proposal = Draft(tokens, torch.full((ROWS,), len(PARENTS)), probs, [PARENTS] * ROWS)
    laws = target[torch.cat([torch.full((ROWS, 1), VOCAB), tokens], dim=1)]
    if planted == "one node off":
        laws = laws.roll(1, dims=1)
    randomness = Randomness(torch.arange(ROWS), torch.full((ROWS,), 7))
    tree = Tree.of([PARENTS] * ROWS, torch.device("cpu"))
    path = rule(laws, tree, proposal, randomness)
    _, chain, verdict = along(path, laws, proposal)
    text = torch.cat([chain.tokens, torch.zeros(ROWS, 1, dtype=torch.long)], dim=1)
    text.scatter_(1, verdict.accepted.unsqueeze(1), verdict.next_token.unsqueeze(1))
    plain = target[text[:, 0]].multinomial(1, generator=generator).squeeze(1)
    second = torch.where(verdict.accepted > 0, text[:, 1], plain)
    counts = (text[:, 0] * VOCAB + second).bincount(minlength=VOCAB**2).double()
    return counts, (target[VOCAB].unsqueeze(1) * target[:VOCAB]).flatten().double()


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("rule", [rejection, coupled])
def test_what_is_committed_follows_the_targets_law(rule: Rule, certain: bool) -> None:
    assert p_value(*committed(rule, certain=certain)) > ALPHA


@pytest.mark.parametrize("planted", ["with replacement", "one node off"])
def test_a_wrong_law_is_noticed(planted: str) -> None:
    """The negative control."""
    assert p_value(*committed(rejection, planted=planted)) < ALPHA


def test_more_children_are_accepted_more_often() -> None:
    target, draft = random_laws(VOCAB + 1, VOCAB, seed=1), random_laws(VOCAB + 1, VOCAB, seed=2)
    tokens, probs = children_drawn(draft, torch.Generator().manual_seed(3))
    laws = target[torch.cat([torch.full((ROWS, 1), VOCAB), tokens], dim=1)]
    randomness = Randomness(torch.arange(ROWS), torch.full((ROWS,), 7))
    found = []
    for places in ([0], [0, 1], [0, 1, 3]):
        parents = [[-1] * len(places)] * ROWS
        proposal = Draft(tokens[:, places], torch.full((ROWS,), len(places)), probs[:, places], parents)
        tree = Tree.of(parents, torch.device("cpu"))
        path = rejection(laws[:, [0, *(i + 1 for i in places)]], tree, proposal, randomness)
        found.append(float(path.accepted.double().mean()))
    overlap = float(torch.minimum(target[VOCAB], draft[VOCAB]).sum())
    assert found[0] == pytest.approx(overlap, abs=0.01)
    assert found[1] > found[0] + 0.02 and found[2] > found[1] + 0.02


def test_a_token_of_probability_0_is_never_taken() -> None:
    """Three children of a law with two tokens: the third was drawn of nothing."""
    law, target = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.1, 0.2, 0.7])
    parents = [[-1, -1, -1]]
    probs = torch.stack([law, torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)])[None]
    draft = Draft(torch.tensor([[0, 1, 2]]), torch.tensor([3]), probs, parents)
    tree = Tree.of(parents, torch.device("cpu"))
    laws = target.expand(1, 4, 3)
    for seed in range(200):
        path = rejection(laws, tree, draft, Randomness(torch.tensor([seed]), torch.tensor([0])))
        assert int(path.accepted) == 0 or int(path.places[0, 0]) < 2


def test_the_way_of_given_tokens() -> None:
    """Rows of different trees; the walk goes as deep as the tokens agree and names the one that follows."""
    parents = [[-1, -1, 1, 2], [-1], []]
    draft = Draft(torch.tensor([[5, 6, 7, 8], [5, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([4, 1, 0]), None, parents)
    tree = Tree.of(parents, torch.device("cpu"))
    assert tree.depths.tolist() == [[0, 1, 1, 2, 3], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]] and tree.deepest == 3
    chosen = torch.tensor([[6, 1, 7, 9, 2], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0]])
    path = follow(chosen, tree, draft)
    assert path.accepted.tolist() == [2, 0, 0] and path.next_token.tolist() == [9, 0, 0]
    assert path.places[0, :2].tolist() == [1, 2]
