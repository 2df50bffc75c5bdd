"""The fused loss equals the textbook one, and distillation reaches the draft only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from specdec.nn.gpt import GPT
from specdec.training import objective
from specdec.training.objective import agreement, pair_losses

VOCABULARY = 50


def model(hidden: int, *, tied: bool, seed: int) -> GPT:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=tied,
        initializer_range=0.5,  # far from uniform laws, so that every term of the gradient counts
    )
    return GPT(config)


@pytest.fixture
def pair() -> tuple[GPT, GPT]:
    return model(16, tied=True, seed=0), model(8, tied=False, seed=1)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))


def textbook(target: GPT, draft: GPT, tokens: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    labels = tokens[:, 1:].flatten()
    target_logits = target.lm_head(target(tokens[:, :-1])).flatten(0, 1)
    draft_logits = draft.lm_head(draft(tokens[:, :-1])).flatten(0, 1)
    teacher = target_logits.detach().log_softmax(-1)
    divergence = F.kl_div(draft_logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
    cross_entropy = F.cross_entropy(draft_logits, labels)
    return F.cross_entropy(target_logits, labels), (1 - weight) * cross_entropy + weight * divergence


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("chunk", [1, 2**21])
def test_losses_and_gradients_equal_autograd(
    pair: tuple[GPT, GPT], tokens: Tensor, weight: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_CHUNK_ELEMENTS", chunk)  # 1: three parts of 16, 16 and 1 positions
    weights = [weight for model in pair for weight in model.parameters()]
    expected = textbook(*pair, tokens, weight)
    expected_gradients = torch.autograd.grad(sum(expected), weights)
    losses = pair_losses(*pair, tokens, distillation=weight)
    gradients = torch.autograd.grad([losses[0], losses[1]], weights)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_the_draft_loss_sends_no_gradient_to_the_target(pair: tuple[GPT, GPT], tokens: Tensor) -> None:
    target, draft = pair
    pair_losses(target, draft, tokens, distillation=1.0)[1].backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in target.parameters())
    assert all(weight.grad is not None and weight.grad.any() for weight in draft.parameters())


def test_distillation_alone_makes_the_draft_agree(pair: tuple[GPT, GPT], tokens: Tensor) -> None:
    target, draft = pair
    before = agreement(target, draft, tokens)
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        pair_losses(target, draft, tokens, distillation=1.0)[1].backward()
        optimizer.step()
    after = agreement(target, draft, tokens)
    assert after.acceptance > max(before.acceptance, 0.6)
    assert after.target_loss == before.target_loss


def test_agreement_of_a_model_with_itself_is_one(pair: tuple[GPT, GPT], tokens: Tensor) -> None:
    measured = agreement(pair[0], pair[0], tokens)
    assert measured.acceptance == pytest.approx(1.0, abs=1e-5)
    assert measured.top1 == 1.0
    assert measured.target_loss == measured.draft_loss > 0
    assert math.isfinite(agreement(*pair, tokens).draft_loss)
