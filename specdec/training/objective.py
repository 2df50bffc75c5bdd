"""What target and draft minimise, and how well they agree.

target: cross-entropy with the text.
draft:  (1 - w) * cross-entropy + w * KL(target || draft), the target's law taken from the same pass and held fixed.

Autograd would record several float32 tensors [B*T, V] per step; the gradients of these losses are so simple that they
are computed together with the losses, a few positions at a time, and the logits never leave the processor's cache.

Shapes: B rows, T tokens, N positions (B*T), H hidden size (it may differ between the models), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from specdec.nn.gpt import GPT

_CHUNK_ELEMENTS = 2**21  # 8 MB of float32 logits at a time: cache-sized on CPU, big enough to keep matrix units busy


def pair_losses(target: GPT, draft: GPT, tokens: Tensor, *, distillation: float) -> tuple[Tensor, Tensor]:
    """Mean losses of target and draft (nats per token, float32 scalars) on tokens [B, T + 1], all positions at once.

    The draft's loss sends no gradient to the target. ``distillation`` is w above (Hinton et al. 2015).
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    losses: tuple[Tensor, Tensor] = _PairLoss.apply(
        target(inputs).flatten(0, 1),
        target.lm_head.weight,
        draft(inputs).flatten(0, 1),
        draft.lm_head.weight,
        labels,
        distillation,
    )
    return losses


class _PairLoss(torch.autograd.Function):
    """Hidden states [N, H] and heads [V, H] of both models -> both losses, gradients included."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        target_hidden: Tensor,
        target_head: Tensor,
        draft_hidden: Tensor,
        draft_head: Tensor,
        labels: Tensor,
        weight: float,
    ) -> tuple[Tensor, Tensor]:
        models = ((target_hidden, target_head), (draft_hidden, draft_head))
        hidden_gradients = [torch.empty_like(hidden) for hidden, _ in models]
        head_gradients = [torch.zeros_like(head, dtype=torch.float32) for _, head in models]
        losses = torch.zeros(2, dtype=torch.float32, device=labels.device)
        for part in _parts(len(labels), target_head.shape[0]):
            logits = [(hidden[part] @ head.T).float() for hidden, head in models]
            part_losses, gradients = _losses_and_gradients(logits[0], logits[1], labels[part, None], weight)
            losses += part_losses
            for i, (hidden, head) in enumerate(models):
                gradient = gradients[i].div_(len(labels)).to(hidden.dtype)
                hidden_gradients[i][part] = gradient @ head
                head_gradients[i] += gradient.T @ hidden[part]
        heads = [gradient.to(head.dtype) for gradient, (_, head) in zip(head_gradients, models, strict=True)]
        ctx.save_for_backward(hidden_gradients[0], heads[0], hidden_gradients[1], heads[1])
        losses /= len(labels)
        return losses[0].clone(), losses[1].clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        target_hidden, target_head, draft_hidden, draft_head = ctx.saved_tensors  # type: ignore[attr-defined]
        target, draft = output_gradients
        return target_hidden * target, target_head * target, draft_hidden * draft, draft_head * draft, None, None


def _losses_and_gradients(
    target_logits: Tensor, draft_logits: Tensor, labels: Tensor, weight: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Summed losses [2] and their gradients by the logits [N, V], for labels [N, 1]. Overwrites the logits.

    d target / d logits = target_probs - onehot;  d draft / d logits = draft_probs - (1 - w) onehot - w target_probs.
    """
    target_logs = torch.log_softmax(target_logits, dim=-1)
    draft_logs = torch.log_softmax(draft_logits, dim=-1)
    target_loss = -target_logs.gather(1, labels).sum()
    draft_loss = -(1 - weight) * draft_logs.gather(1, labels).sum()
    target_probs = torch.exp(target_logs, out=target_logits)
    if weight:
        divergence = torch.dot(target_probs.flatten(), target_logs.sub_(draft_logs).flatten())
        draft_loss = draft_loss + weight * divergence
    draft_gradient = draft_logs.exp_().sub_(target_probs, alpha=weight)
    draft_gradient.scatter_add_(1, labels, torch.full_like(labels, -(1 - weight), dtype=torch.float32))
    target_gradient = target_probs.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=torch.float32))
    return torch.stack([target_loss, draft_loss]), (target_gradient, draft_gradient)


@dataclass(frozen=True)
class Agreement:
    """How target and draft do on text neither was trained on, averaged over its positions.

    ``acceptance`` is the sum over the vocabulary of min(target_probs, draft_probs) at temperature 1: the probability
    that one drafted token is accepted (Leviathan et al. 2023, theorem 3.5). ``top1`` is the same for greedy decoding:
    how often both models have the same most probable token.
    """

    target_loss: float
    draft_loss: float
    acceptance: float
    top1: float


@torch.inference_mode()
def agreement(target: GPT, draft: GPT, windows: Tensor) -> Agreement:
    """Cross-entropies and agreement on windows [M, T + 1]; the models are put into evaluation mode."""
    target.eval()
    draft.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for tokens in windows.split(4):
        labels = tokens[:, 1:].reshape(-1)
        hidden = [model(tokens[:, :-1]).flatten(0, 1) for model in (target, draft)]
        for part in _parts(len(labels), target.config.vocab_size):
            target_logits = target.lm_head(hidden[0][part]).float()
            draft_logits = draft.lm_head(hidden[1][part]).float()
            overlap = torch.minimum(target_logits.softmax(-1), draft_logits.softmax(-1)).sum()
            same = (target_logits.argmax(-1) == draft_logits.argmax(-1)).sum()
            losses = [
                F.cross_entropy(logits, labels[part], reduction="sum") for logits in (target_logits, draft_logits)
            ]
            sums += torch.stack([*losses, overlap, same.float()]).double().cpu()
    target_loss, draft_loss, overlap_mean, same_mean = (sums / (windows.shape[0] * (windows.shape[1] - 1))).tolist()
    return Agreement(target_loss, draft_loss, overlap_mean, same_mean)


def _parts(length: int, vocabulary: int) -> Iterator[slice]:
    size = max(_CHUNK_ELEMENTS // vocabulary, 16)
    return (slice(start, start + size) for start in range(0, length, size))
