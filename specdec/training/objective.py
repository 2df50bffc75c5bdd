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
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from specdec.nn.documents import Documents
from specdec.nn.lstm import Trainable
from specdec.nn.train import losses_and_gradients

_CHUNK_ELEMENTS = 2**21  # 8 MB of float32 logits at a time: cache-sized on CPU, big enough to keep matrix units busy


class Pair(nn.Module):
    """Target and draft as one module, so that what wraps a module (DDP, FSDP2) wraps both.

    Without a draft the target is trained alone. The models may live on two devices; on one GPU, with ``overlap``, the
    draft works in a stream of its own: autograd runs a backward pass in the stream of its forward pass, so that the
    draft's small kernels fill what the target's leave idle.
    """

    def __init__(
        self, target: Trainable, draft: Trainable | None, *, distillation: float, overlap: bool = False
    ) -> None:
        super().__init__()
        self.target, self.draft, self.distillation = target, draft, distillation
        self.stream = torch.cuda.Stream() if overlap else None

    def forward(self, tokens: Tensor, end_of_text: int | None = None, positions: float | None = None) -> Tensor:
        """Losses [1 or 2] of tokens [B, T + 1]: sums over all positions, divided by ``positions`` or their number.

        With ``end_of_text``, documents in a row do not see each other, and what follows an end is not learned.
        """
        inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        documents = None if end_of_text is None else Documents(inputs, end_of_text)
        hidden = self._hidden(inputs, documents)
        if documents is not None:
            learned = documents.learned.flatten()
            labels, hidden = labels[learned], [states[learned] for states in hidden]
        heads = [model.lm_head.weight.to(tokens.device) for model in self._models()]
        states = [part for pair in zip(hidden, heads, strict=True) for part in pair]
        losses: Tensor = _PairLoss.apply(labels, self.distillation, positions or len(labels), *states)
        return losses

    def _models(self) -> list[Trainable]:
        return [self.target] if self.draft is None else [self.target, self.draft]

    def _hidden(self, inputs: Tensor, documents: Documents | None) -> list[Tensor]:
        """Hidden states [B*T, H] of both models, on the device of ``inputs``."""
        if self.draft is None:
            return [self.target(inputs, documents=documents).flatten(0, 1)]
        own = inputs.to(self.draft.embed_tokens.weight.device)
        there = documents if own.device == inputs.device or documents is None else documents.to(own.device)
        if self.stream is None:
            target = self.target(inputs, documents=documents)
            draft = self.draft(own, documents=there)
        else:
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                draft = self.draft(own, documents=there)
            target = self.target(inputs, documents=documents)
            current.wait_stream(self.stream)
            draft.record_stream(current)
        return [target.flatten(0, 1), draft.flatten(0, 1).to(inputs.device)]


def pair_losses(target: Trainable, draft: Trainable, tokens: Tensor, *, distillation: float) -> tuple[Tensor, Tensor]:
    """Mean losses of target and draft (nats per token, float32 scalars) on tokens [B, T + 1], all positions at once.

    The draft's loss sends no gradient to the target. ``distillation`` is w above (Hinton et al. 2015).
    """
    losses = Pair(target, draft, distillation=distillation)(tokens)
    return losses[0], losses[1]


class _PairLoss(torch.autograd.Function):
    """Hidden states [N, H] and head [V, H] of each model, in turn -> their losses, gradients included."""

    @staticmethod
    def forward(ctx: FunctionCtx, labels: Tensor, weight: float, positions: float, *states: Tensor) -> Tensor:
        models = list(zip(states[::2], states[1::2], strict=True))
        hidden_gradients = [torch.empty_like(hidden) for hidden, _ in models]
        head_gradients: list[Tensor | None] = [None] * len(models)
        losses = torch.zeros(len(models), dtype=torch.float32, device=labels.device)
        for part in parts(len(labels), len(models[0][1])):
            logits = [hidden[part] @ head.T for hidden, head in models]
            part_losses, gradients = _losses_and_gradients(logits, labels[part], weight, positions)
            losses += part_losses
            for i, ((hidden, head), gradient) in enumerate(zip(models, gradients, strict=True)):
                torch.mm(gradient, head, out=hidden_gradients[i][part])
                head_gradients[i] = _added(head_gradients[i], gradient.T @ hidden[part])
        heads = [
            torch.zeros_like(head) if gradient is None else gradient.to(head.dtype)  # None: nothing was to be learned
            for gradient, (_, head) in zip(head_gradients, models, strict=True)
        ]
        ctx.save_for_backward(*(part for pair in zip(hidden_gradients, heads, strict=True) for part in pair))
        return losses.div_(positions)

    @staticmethod
    def backward(ctx: FunctionCtx, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors  # type: ignore[attr-defined]
        factors = output_gradients[0].repeat_interleave(2).unbind()
        return None, None, None, *(part * factor for part, factor in zip(gradients, factors, strict=True))


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """``total`` + ``part``, in float32 as soon as there are two to add."""
    return part if total is None else total.float().add_(part)


def _losses_and_gradients(
    logits: list[Tensor], labels: Tensor, weight: float, positions: float
) -> tuple[Tensor, list[Tensor]]:
    """Summed losses of one or two models and their gradients by the logits [N, V] / ``positions``, for labels [N].

    d target / d logits = target_probs - onehot;  d draft / d logits = draft_probs - (1 - w) onehot - w target_probs.
    Overwrites the logits.
    """
    if (found := losses_and_gradients(logits, labels, weight, 1 / positions)) is not None:
        return found.sum(1), logits
    dtypes, labels, logits = [x.dtype for x in logits], labels[:, None], [x.float() for x in logits]
    target_logs = torch.log_softmax(logits[0], dim=-1)
    losses, draft_gradient = [-target_logs.gather(1, labels).sum()], None
    target_probs = torch.exp(target_logs, out=logits[0])
    if len(logits) > 1:
        draft_logs = torch.log_softmax(logits[1], dim=-1)
        draft_loss = -(1 - weight) * draft_logs.gather(1, labels).sum()
        if weight:
            divergence = torch.dot(target_probs.flatten(), target_logs.sub_(draft_logs).flatten())
            draft_loss = draft_loss + weight * divergence
        losses.append(draft_loss)
        draft_gradient = draft_logs.exp_().sub_(target_probs, alpha=weight)
        draft_gradient.scatter_add_(1, labels, torch.full_like(labels, -(1 - weight), dtype=torch.float32))
    target_gradient = target_probs.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=torch.float32))
    gradients = [target_gradient] if draft_gradient is None else [target_gradient, draft_gradient]
    return torch.stack(losses), [x.div_(positions).to(dtype) for x, dtype in zip(gradients, dtypes, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """How target and draft do on text neither was trained on, averaged over its positions.

    ``acceptance`` is the sum over the vocabulary of min(target_probs, draft_probs) at temperature 1: the probability
    that one drafted token is accepted (Leviathan et al. 2023, theorem 3.5). ``top1`` is the same for greedy decoding:
    how often both models have the same most probable token. ``acceptance_per_position``: of drafts that would begin at
    every token and propose what the text says, the expected share accepted up to position 1, 2, ..., that is the mean
    product of as many neighbouring acceptance probabilities.
    """

    target_loss: float
    draft_loss: float
    acceptance: float
    top1: float
    acceptance_per_position: list[float]


@torch.no_grad()  # not inference mode: what a model keeps of such a pass (rotary frequencies) is trained with again
def agreement(target: Trainable, draft: Trainable, windows: Tensor, *, drafted: int = 4) -> Agreement:
    """Cross-entropies and agreement on windows [M, T + 1], with drafts of ``drafted`` tokens.

    The models are put into evaluation mode; they may be on two devices.
    """
    target.eval()
    draft.eval()
    sums, reached = torch.zeros(4, dtype=torch.float64), torch.zeros(drafted, dtype=torch.float64)
    for tokens in windows.split(4):
        labels, inputs = tokens[:, 1:].reshape(-1), tokens[:, :-1]
        hidden = [model(inputs.to(model.embed_tokens.weight.device)).flatten(0, 1) for model in (target, draft)]
        alphas = []
        for part in parts(len(labels), target.config.vocab_size):
            target_logits = target.lm_head(hidden[0][part]).float()
            draft_logits = draft.lm_head(hidden[1][part]).float().to(target_logits.device)
            alphas.append(torch.minimum(target_logits.softmax(-1), draft_logits.softmax(-1)).sum(-1))
            same = (target_logits.argmax(-1) == draft_logits.argmax(-1)).sum()
            losses = [
                F.cross_entropy(logits, labels[part], reduction="sum") for logits in (target_logits, draft_logits)
            ]
            sums += torch.stack([*losses, alphas[-1].sum(), same.float()]).double().cpu()
        reached += _reached(torch.cat(alphas).view(inputs.shape).double().cpu(), drafted)
    target_loss, draft_loss, overlap, same_mean = (sums / (windows.shape[0] * (windows.shape[1] - 1))).tolist()
    starts = windows.shape[0] * max(windows.shape[1] - drafted, 1)
    return Agreement(target_loss, draft_loss, overlap, same_mean, (reached / starts).tolist())


def _reached(alphas: Tensor, drafted: int) -> Tensor:
    """Sum over all starts in rows of acceptance probabilities [B, T] of their products up to 1, ..., ``drafted``."""
    return alphas.unfold(1, drafted, 1).cumprod(-1).sum((0, 1))


def parts(length: int, vocabulary: int) -> Iterator[slice]:
    """Slices of ``length`` positions whose logits fit the processor's cache together."""
    size = max(_CHUNK_ELEMENTS // vocabulary, 16)
    return (slice(start, start + size) for start in range(0, length, size))
