"""Exact laws by enumeration, in float64: what a rule commits over every draft, every coin and every draw.

A *tree* is a context-dependent law: ``tree[t]`` [V**t, V] holds the law after each text of t tokens, texts in
lexicographic order. A target's tree is K + 1 levels deep, its draft's K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.sampling import SamplingParams, filters, law, prefix_processors, race
from specdec.verify import Rule, Verdict, block_chances, block_survival, leading, next_law, rejection_chances, trailing

Tree = list[Tensor]
_MARGIN = 1e-9  # by how much a forced token wins its race: a law that is off by more lets another token win


@dataclass(frozen=True)
class Parts:
    """A rule taken apart; calling it puts it together again, which is how the tests build wrong rules.

    chances: of every coin; count: how coins become a number of accepted tokens; next_law: of the token after them.
    """

    chances: Callable[[Tensor, Draft], Tensor]
    count: Callable[[Tensor], Tensor]
    next_law: Callable[[Tensor, Draft, Tensor], Tensor]
    wins: Callable[[Tensor, Tensor], Tensor] = torch.lt

    def __call__(self, target_probs: Tensor, draft: Draft, randomness: Forced) -> Verdict:
        chances = self.chances(target_probs, draft)
        accepted = self.count(self.wins(randomness.accept(chances.shape[1]), chances))
        following = self.next_law(target_probs, draft, accepted)
        return Verdict(accepted, race(following, randomness.target(accepted, following.shape[-1])))


def _rejection_next(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    return next_law(target_probs, draft, accepted, torch.ones(len(accepted), dtype=target_probs.dtype))


def _block_chances(target_probs: Tensor, draft: Draft) -> Tensor:
    return block_chances(target_probs, draft, block_survival(target_probs, draft))


def _block_next(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    survival = block_survival(target_probs, draft)
    return next_law(target_probs, draft, accepted, survival.gather(1, accepted.unsqueeze(1)).squeeze(1))


REJECTION = Parts(rejection_chances, leading, _rejection_next)


def _trailing(hits: Tensor) -> Tensor:
    return trailing(hits) if hits.shape[1] else torch.zeros(len(hits), dtype=torch.long)


BLOCK = Parts(_block_chances, _trailing, _block_next)


@dataclass(frozen=True)
class Forced:
    """Stands in for ``Randomness``: gives the numbers it was made with."""

    uniforms: Tensor
    noise: Tensor

    def accept(self, count: int) -> Tensor:
        assert count == self.uniforms.shape[1]
        return self.uniforms

    def target(self, offsets: Tensor, vocab_size: int) -> Tensor:
        assert vocab_size == self.noise.shape[-1]
        return self.noise


@dataclass(frozen=True)
class Committed:
    """Per group: the law of the first K + 1 tokens [G, V**(K+1)], and the expected number of accepted ones [G]."""

    law: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Batch:
    """Drafts to verify in one call; ``weights`` are their probabilities within their ``groups``."""

    draft: Draft
    target_probs: Tensor
    weights: Tensor
    groups: Tensor

    def at(self, rows: Tensor) -> tuple[Tensor, Draft]:
        """The rule's inputs for ``rows``."""
        draft = self.draft
        probs = None if draft.probs is None else draft.probs[rows]
        return self.target_probs[rows], Draft(draft.tokens[rows], draft.lengths[rows], probs)


def paths(vocab_size: int, length: int) -> Tensor:
    """Every text of ``length`` tokens, in order, [V**length, length]."""
    place = torch.arange(vocab_size**length).unsqueeze(1)
    return place // vocab_size ** torch.arange(length - 1, -1, -1) % vocab_size


def numbers(tokens: Tensor, vocab_size: int) -> Tensor:
    """The place of each text [N, t] among all texts of its length, [N]."""
    place = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        place = place * vocab_size + column
    return place


def chain(tree: Tree) -> Tensor:
    """The law of whole texts, [V**depth]."""
    joint = torch.ones(1, dtype=torch.float64)
    for level in tree:
        joint = (joint.unsqueeze(1) * level).flatten()
    return joint


def draft_batch(target: Tree, draft: Tree | None = None, *, drawn_from: Tree | None = None) -> Batch:
    """Every draft of every length 0 .. K in one batch; cells beyond a row's length hold NaN.

    One group per length, in which a draft weighs as much as ``drawn_from`` (default: ``draft``) makes it likely; or,
    without ``draft`` (certain proposals), one group per draft.
    """
    depth, vocab_size = len(target) - 1, target[0].shape[-1]
    source = drawn_from if drawn_from is not None else draft
    parts: list[tuple[Tensor, ...]] = []
    for length in range(depth + 1):
        texts = paths(vocab_size, length)
        weights = chain(source[:length]) if source is not None else torch.ones(len(texts), dtype=torch.float64)
        texts, weights = texts[weights > 0], weights[weights > 0]
        tokens = torch.nn.functional.pad(texts, (0, depth - length))
        seen = _along(target[: length + 1], texts, depth + 1, vocab_size)
        drawn = _along(draft[:length] if draft else [], texts, depth, vocab_size)
        parts.append((tokens, torch.full((len(texts),), length), seen, drawn, weights))
    tokens, lengths, seen, drawn, weights = map(torch.cat, zip(*parts, strict=True))
    groups = torch.arange(len(tokens)) if draft is None else lengths
    return Batch(Draft(tokens, lengths, None if draft is None else drawn), seen, weights, groups)


def _along(tree: Tree, texts: Tensor, width: int, vocab_size: int) -> Tensor:
    """The tree's laws after each prefix of ``texts`` [N, t]: [N, width, V], NaN beyond the tree's depth."""
    laws = torch.full((len(texts), width, vocab_size), torch.nan, dtype=torch.float64)
    for t, level in enumerate(tree):
        laws[:, t] = level[numbers(texts[:, :t], vocab_size)]
    return laws


def committed(rule: Rule | Parts, parts: Parts, target: Tree, batch: Batch) -> Committed:
    """Run ``rule`` on every draft of ``batch`` with every pattern of coins and every next token.

    ``parts`` says where the rule's thresholds lie. A coin succeeds by one float64 step and fails by none (the uniform
    is the chance itself); a token wins its race by 1e-9. So a rule whose chances or laws differ from its parts by
    more commits something else. Texts shorter than K + 1 go on with the target's law.
    """
    depth, vocab_size = len(target) - 1, target[0].shape[-1]
    patterns = paths(2, depth).bool()
    count = len(batch.weights)

    rows = torch.arange(count).repeat_interleave(len(patterns))
    coins = patterns.repeat(count, 1)
    chances = parts.chances(batch.target_probs, batch.draft).nan_to_num(0.0)[rows]
    weights = batch.weights[rows] * torch.where(coins, chances, 1 - chances).prod(1)
    uniforms = torch.where(coins, torch.nextafter(chances, torch.full_like(chances, -1.0)), chances)
    following = parts.next_law(*batch.at(rows), parts.count(coins & (chances > 0)))

    possible = weights > 0
    rows, weights, uniforms, following = rows[possible], weights[possible], uniforms[possible], following[possible]
    tokens = torch.arange(vocab_size).repeat(len(rows))
    rows, weights, uniforms, following = (
        values.repeat_interleave(vocab_size, 0) for values in (rows, weights, uniforms, following)
    )
    weights = weights * following.gather(1, tokens.unsqueeze(1)).squeeze(1)
    noise = torch.where(following > 0, following, 1.0)  # a dead heat, but for one token's head start
    noise = torch.where(tokens.unsqueeze(1) == torch.arange(vocab_size), noise * (1 - _MARGIN), noise)
    target_probs, draft = batch.at(rows)
    verdict = rule(target_probs, draft, Forced(uniforms, noise))  # type: ignore[arg-type]
    groups = int(batch.groups.max()) + 1
    expected = torch.zeros(groups, dtype=torch.float64)
    expected.index_add_(0, batch.groups[rows], weights * verdict.accepted)
    total = torch.zeros(groups, 1, dtype=torch.float64)
    for accepted in range(depth + 1):
        total = (total.unsqueeze(-1) * target[accepted]).flatten(1)  # texts that ended earlier go on
        chosen = verdict.accepted == accepted
        text = torch.cat([draft.tokens[chosen, :accepted], verdict.next_token[chosen, None]], dim=1)
        place = batch.groups[rows][chosen] * vocab_size ** (accepted + 1) + numbers(text, vocab_size)
        total.view(-1).index_add_(0, place, weights[chosen])
    return Committed(total, expected)


def random_tree(vocab_size: int, depth: int, seed: int, support: Sequence[int] | None = None) -> Tree:
    """Random laws on the tokens of ``support`` (default: all)."""
    generator = torch.Generator().manual_seed(seed)
    tree = []
    for t in range(depth):
        logits = torch.randn(vocab_size**t, vocab_size, generator=generator, dtype=torch.float64) * 1.5
        if support is not None:
            logits[:, [v for v in range(vocab_size) if v not in support]] = -torch.inf
        tree.append(logits.softmax(-1))
    return tree


def sparse_tree(vocab_size: int, depth: int, seed: int) -> Tree:
    """Random laws, each of which forbids some tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    tree = []
    for t in range(depth):
        allowed = torch.rand(vocab_size**t, vocab_size, generator=generator) < 0.6
        allowed[torch.arange(vocab_size**t), torch.randint(vocab_size, (vocab_size**t,), generator=generator)] = True
        logits = torch.randn(vocab_size**t, vocab_size, generator=generator, dtype=torch.float64)
        tree.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1))
    return tree


def one_hot_tree(vocab_size: int, depth: int, seed: int) -> Tree:
    """Certain laws: a greedy model."""
    tree = random_tree(vocab_size, depth, seed)
    return [torch.nn.functional.one_hot(level.argmax(-1), vocab_size).double() for level in tree]


def filtered_tree(logits: Tree, params: SamplingParams, prompt: Sequence[int], eos: Sequence[int] = ()) -> Tree:
    """The laws that ``params`` make of a tree of logits, through specdec's own filters, renormalised in float64."""
    processors = prefix_processors(params, len(prompt), eos, torch.device("cpu"))
    tree = []
    for t, level in enumerate(logits):
        texts = paths(level.shape[-1], t)
        prefix = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
        found = law(processors(prefix, level.float()), filters(params)).double()
        tree.append(found / found.sum(-1, keepdim=True))
    return tree


def table_tree(
    table: Tensor, prompt: Sequence[int], depth: int, params: SamplingParams, eos: Sequence[int] = ()
) -> Tree:
    """The laws of a ``TableLM`` after ``prompt``."""
    before = torch.tensor([0, *prompt])[-2:]
    logits = []
    for t in range(depth):
        texts = paths(table.shape[-1], t)
        last = torch.cat([before.expand(len(texts), -1), texts], dim=1)[:, -2:]
        logits.append(table[last[:, 0], last[:, 1]])
    return filtered_tree(logits, params, prompt, eos)
