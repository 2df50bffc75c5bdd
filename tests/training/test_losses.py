"""Divergences against their definitions, and the weights against the expected accepted length itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specdec.nn.divergences import DIVERGENCES, forward_kl, overlap
from specdec.training.losses import Teacher, acceptance, distillation_loss, length_weights

VOCAB, HIDDEN, POSITIONS = 40, 8, 50


def laws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def gradient(name: str, p: Tensor, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_(True)
    DIVERGENCES[name](p, logits.softmax(-1)).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_for_equal_laws_only(name: str) -> None:
    p, q = laws(0, 20, VOCAB), laws(1, 20, VOCAB)
    assert torch.allclose(DIVERGENCES[name](p, p), torch.zeros(20), atol=1e-5)
    assert bool((DIVERGENCES[name](p, q) > 0.05).all())
    assert bool(torch.isfinite(DIVERGENCES[name](torch.eye(4), torch.eye(4).roll(1, 0))).all())


def test_total_variation_is_one_minus_acceptance_and_lk_is_its_logarithm() -> None:
    p, logits = laws(0, 6, VOCAB).double(), torch.randn(6, VOCAB, dtype=torch.float64)
    alpha = overlap(p, logits.softmax(-1))
    assert torch.allclose(DIVERGENCES["tv"](p, logits.softmax(-1)), (p - logits.softmax(-1)).abs().sum(-1) / 2)
    assert torch.allclose(gradient("lk", p, logits), gradient("tv", p, logits) / alpha.unsqueeze(-1))
    fading = torch.exp(-3 * alpha).unsqueeze(-1)
    mixed = fading * gradient("forward_kl", p, logits) + (1 - fading) * gradient("tv", p, logits)
    assert torch.allclose(gradient("lk_hybrid", p, logits), mixed)


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_chunked_loss_is_the_plain_one(name: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.training.objective._CHUNK_ELEMENTS", 16 * VOCAB)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    teacher = Teacher.of(torch.randn(POSITIONS, VOCAB, generator=generator), keep)
    weights = torch.rand(POSITIONS, generator=generator)
    loss = distillation_loss(hidden, head, teacher, weights, DIVERGENCES[name])
    found = torch.autograd.grad(loss, (hidden, head))
    law = teacher.seen_by(hidden @ head.T)
    plain = (DIVERGENCES[name](teacher.probs, law) * weights).sum() / weights.sum()
    assert torch.allclose(loss, plain, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(plain, (hidden, head)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(acceptance(hidden, head, teacher), overlap(teacher.probs, law))


def test_a_teacher_that_keeps_few_entries_is_on_the_safe_side() -> None:
    logits, others = torch.randn(30, VOCAB) * 2, torch.randn(30, VOCAB)
    whole = Teacher.of(logits)
    for keep in (1, 4, 16, VOCAB - 1):
        part = Teacher.of(logits, keep)
        assert part.ids is not None and part.probs.shape == (30, keep + 1)
        assert torch.allclose(part.probs.sum(-1), torch.ones(30), atol=1e-5)
        mine, all_of_it = part.seen_by(others), whole.seen_by(others)
        assert bool((forward_kl(part.probs, mine) <= forward_kl(whole.probs, all_of_it) + 1e-5).all())
        assert bool((overlap(part.probs, mine) >= overlap(whole.probs, all_of_it) - 1e-5).all())
    assert Teacher.of(logits, VOCAB).ids is None


@pytest.mark.parametrize("drafted", [1, 2, 4, 7])
def test_weights_are_the_gradient_of_the_expected_accepted_length(drafted: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logs = (torch.rand(2, 9, generator=generator, dtype=torch.float64) * 0.8 + 0.1).log().requires_grad_(True)
    length = torch.zeros((), dtype=torch.float64)
    for row, start in itertools.product(range(2), range(9)):
        reached = torch.ones((), dtype=torch.float64)
        for position in range(start, min(start + drafted, 9)):
            reached = reached * logs[row, position].exp()
            length = length + reached
    (expected,) = torch.autograd.grad(length, logs)
    found = length_weights(logs.detach().exp(), drafted)
    assert torch.allclose(found.double(), expected / expected.mean(), atol=1e-5)
