"""What a model says of texts that are given, in one pass over each, and whether drawn tokens follow what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.lm.base import CachedLM

LEAST_EXPECTED = 5.0  # in a cell of a chi-square test; rarer ones are pooled
RANKS = (1, 2, 4, 8, 16, 64)  # where classes of tokens end, by rank in their law; the rest is one more
_LOGITS = 2**26  # of one scoring pass; bounds its memory


class Text(NamedTuple):
    """A prompt, the tokens that follow it, and what an encoder reads, if there is one."""

    prompt: Sequence[int]
    new: Sequence[int]
    source: Any = None


@torch.inference_mode()
def scored(lm: CachedLM, texts: Sequence[Text], vocab_size: int | None = None) -> Iterator[Tensor]:
    """For each text the float32 logits [new tokens, V] that its new tokens follow, of one pass over all of it.

    Raises ``ConfigError`` while a stream is open on this model.
    """
    if any(lm.lengths):
        raise ConfigError("this model is in the middle of a stream; finish or close it before scoring")
    width = max((len(text.prompt) + len(text.new) for text in texts), default=1)
    rows = max(1, _LOGITS // (width * lm.vocab_size))
    for begin in range(0, len(texts), rows):
        group = texts[begin : begin + rows]
        for text, logits in zip(group, _one_pass(lm, group), strict=True):
            first = len(text.prompt) - 1
            yield logits[first : first + len(text.new), :vocab_size].float()


def _one_pass(lm: CachedLM, texts: Sequence[Text]) -> Tensor:
    """Logits [B, T, V] of all texts but their last tokens."""
    read = [[*text.prompt, *text.new][:-1] for text in texts]
    longest = max(map(len, read))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in read], device=lm.device)
    try:
        lm.reserve(len(texts), longest)
        for slot, text in enumerate(texts):
            lm.restart(slot, 0)
            lm.enter(slot, text.source)
        return lm.append(tokens, list(map(len, read)))
    finally:
        lm.free(0)


class ChiSquare(NamedTuple):
    """A statistic and its degrees of freedom; independent ones add up."""

    statistic: float = 0.0
    freedom: int = 0

    def plus(self, other: ChiSquare) -> ChiSquare:
        """Both together."""
        return ChiSquare(self.statistic + other.statistic, self.freedom + other.freedom)

    @property
    def p_value(self) -> float:
        """The chance of a larger statistic; 1 where there is nothing to test."""
        if not self.freedom or math.isinf(self.statistic):
            return float(not math.isinf(self.statistic))
        half = torch.tensor([self.freedom / 2, self.statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


IMPOSSIBLE = ChiSquare(math.inf, 1)  # something came that cannot


def pearson(observed: Tensor, expected: Tensor) -> ChiSquare:
    """Of counts [N] against expected ones [N]; cells of which little is expected are pooled, with more if need be."""
    if float(observed[expected <= 0].sum()) > 0:
        return IMPOSSIBLE
    expected, order = expected.double().sort()
    observed = observed.double()[order]
    pooled = int((expected < LEAST_EXPECTED).sum())
    if 0 < pooled < len(expected) and float(expected[:pooled].sum()) < LEAST_EXPECTED:
        pooled += 1
    if pooled:
        observed, expected = (torch.cat([x[:pooled].sum()[None], x[pooled:]]) for x in (observed, expected))
    return ChiSquare(float(((observed - expected).square() / expected).sum()), len(expected) - 1)


def pair_test(pairs: Tensor, first_law: Tensor, second_laws: dict[int, Tensor]) -> ChiSquare:
    """Of pairs of tokens [N, 2] against the law [V] of the first and laws [V] of the second, by first token.

    Pairs that begin with a token without a second law are one cell.
    """
    observed, expected = [], []
    for first, second_law in second_laws.items():
        observed.append(pairs[pairs[:, 0] == first, 1].bincount(minlength=len(second_law)))
        expected.append(len(pairs) * first_law[first].double() * second_law)
    known = sum(float(cells.sum()) for cells in expected)
    observed.append(torch.tensor([len(pairs) - sum(int(cells.sum()) for cells in observed)]))
    expected.append(torch.tensor([max(len(pairs) - known, 1e-6)], dtype=torch.float64))
    return pearson(torch.cat(observed), torch.cat(expected))


def rank_test(texts: Sequence[Text], laws: Iterable[Tensor]) -> ChiSquare:
    """Whether tokens of every rank in their laws [T, V] come as often as these say, at all positions of all texts.

    Given the text before it every token has its own law, so counts less what was expected are a martingale whose
    covariances add up; the statistic is the difference's square, measured by their sum.
    """
    edges, count = torch.tensor(RANKS), len(RANKS) + 1
    difference, expected = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    covariance = torch.zeros(count, count, dtype=torch.float64)
    for text, probs in zip(texts, laws, strict=True):
        tokens = torch.tensor(text.new, device=probs.device)[:, None]
        if float(probs.gather(1, tokens).min()) <= 0:
            return IMPOSSIBLE
        ordered, order = probs.double().sort(-1, descending=True)
        classes = torch.bucketize(torch.arange(1, probs.shape[-1] + 1), edges)
        masses = torch.zeros(len(probs), count, dtype=torch.float64).index_add_(1, classes, ordered.cpu())
        masses /= masses.sum(-1, keepdim=True)
        ranks = (order == tokens).long().argmax(-1).cpu()
        difference += torch.nn.functional.one_hot(classes[ranks], count).sum(0) - masses.sum(0)
        expected += masses.sum(0)
        covariance += masses.sum(0).diag() - masses.T @ masses
    pooling = _pooling(expected)[1:]  # counts add up to the number of tokens: one class follows from the others
    apart = pooling @ difference
    inner = torch.linalg.pinv(pooling @ covariance @ pooling.T, hermitian=True)
    return ChiSquare(float(apart @ inner @ apart), len(pooling))


def _pooling(expected: Tensor) -> Tensor:
    """A matrix [M, N] of zeros and ones that adds rare classes to their neighbours until enough is expected of each."""
    pooling = torch.eye(len(expected), dtype=torch.float64)
    while len(pooling) > 1 and float((pooling @ expected).min()) < LEAST_EXPECTED:
        rare = int((pooling @ expected).argmin())
        pooling[rare - 1 if rare else 1] += pooling[rare]
        pooling = torch.cat([pooling[:rare], pooling[rare + 1 :]])
    return pooling
