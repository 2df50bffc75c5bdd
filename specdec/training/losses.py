"""What a draft minimises when it learns from a fixed target: the divergences of ``nn.divergences``, position by position.

Shapes: B rows, T positions, N = B * T, V vocabulary, M entries kept of a teacher's law, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from specdec.nn.divergences import Divergence, overlap
from specdec.training.objective import parts

_TINY = 1e-9  # keeps logarithms of probabilities that rounded to 0 finite


@dataclass(frozen=True)
class Teacher:
    """The target's laws at N positions: probs [N, V], or the largest M of each and what they sum to.

    ids [N, M] name the kept entries; None when all are kept. With ids, everything else is one more outcome: divergences
    of laws coarsened like this never exceed the true ones, and the acceptance rate never falls below the true one.
    """

    probs: Tensor
    ids: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, keep: int = 0) -> Teacher:
        """From logits [N, V]; the ``keep`` largest entries, or all for 0."""
        probs = logits.float().softmax(-1)
        if not 0 < keep < probs.shape[-1]:
            return cls(probs)
        kept, ids = probs.topk(keep, dim=-1)
        return cls(_with_rest(kept), ids)

    def __getitem__(self, part: slice) -> Teacher:
        return Teacher(self.probs[part], None if self.ids is None else self.ids[part])

    def __len__(self) -> int:
        return len(self.probs)

    def seen_by(self, logits: Tensor) -> Tensor:
        """The draft's law of logits [N, V], over the same outcomes as ``probs``."""
        law = logits.float().softmax(-1)
        return law if self.ids is None else _with_rest(law.gather(-1, self.ids))


def _with_rest(kept: Tensor) -> Tensor:
    return torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)


def distillation_loss(
    hidden: Tensor, head: Tensor, teacher: Teacher, weights: Tensor, divergence: Divergence
) -> Tensor:
    """Weighted mean divergence of the draft with hidden states [N, H] and head [V, H]; weights [N].

    Logits exist a chunk at a time, so memory does not grow with N x V.
    """

    def part(hidden: Tensor, head: Tensor, rows: slice) -> Tensor:
        law = teacher[rows].seen_by(F.linear(hidden, head))
        return (divergence(teacher.probs[rows], law) * weights[rows]).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in parts(len(hidden), len(head)):
        total = total + checkpoint(part, hidden[rows], head, rows, use_reentrant=False)
    return total / weights.sum().clamp(min=_TINY)


@torch.no_grad()
def acceptance(hidden: Tensor, head: Tensor, teacher: Teacher) -> Tensor:
    """alpha of every position, [N]."""
    found = [
        overlap(teacher.probs[rows], teacher[rows].seen_by(F.linear(hidden[rows], head)))
        for rows in parts(len(hidden), len(head))
    ]
    return torch.cat(found)


def length_weights(alpha: Tensor, drafted: int) -> Tensor:
    """How much each position matters to the accepted length of drafts of ``drafted`` tokens, [B, T], mean 1.

    A draft that begins at s is accepted k tokens far with probability A_k = alpha_s ... alpha_{s+k-1}, and its expected
    accepted length is sum A_k. The derivative of that length, summed over all s, by log alpha_t is the weight of t: the
    gradient of -sum(weight * log alpha) is that of the expected length (as in D-PACE, SpecForge).
    """
    rows, positions = alpha.shape
    ahead = F.pad(alpha.float(), (0, drafted - 1)).unfold(1, drafted, 1)  # [B, T, K]: alpha from each start on
    reached = ahead.cumprod(-1).flip(-1).cumsum(-1).flip(-1)  # sum over k >= j of A_k
    weights = torch.zeros(rows, positions, device=alpha.device)
    for j in range(drafted):
        weights[:, j:] += reached[:, : positions - j, j]
    return weights / weights.mean().clamp(min=_TINY)
