"""How far a draft's law is from the target's, at one position.

p is the target's law and q the draft's (temperature 1); alpha = sum(min(p, q)) is the probability that a drafted token
is accepted (Leviathan et al. 2023, theorem 3.5), and 1 - alpha is their total variation.

- forward_kl: sum p log(p / q). reverse_kl: sum q log(q / p). Hinton et al. 2015; Zhou et al. 2024 (arXiv 2310.08461).
- tv: 1 - alpha; its gradient vanishes where the laws hardly overlap.
- lk: -log alpha, whose gradient is that of tv divided by alpha. lk_hybrid: w forward_kl + (1 - w) tv with
  w = exp(-3 alpha), held fixed: KL while the laws are far apart, total variation as they meet (arXiv 2602.23881).

Laws may miss some outcomes of p, as those of a draft with a trimmed vocabulary do: p is then given without these
outcomes and not normalised anew, which would overstate alpha.

Shapes: N positions, M outcomes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FADING = 3.0  # how fast lk_hybrid turns from KL to total variation
_TINY = 1e-9  # keeps logarithms of probabilities that rounded to 0 finite


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """alpha, [N], of laws [N, M]."""
    return torch.minimum(p, q).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), [N]."""
    return (p * (p.clamp(min=_TINY).log() - q.clamp(min=_TINY).log())).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """sum q log(q / p), [N]."""
    return forward_kl(q, p)


def tv(p: Tensor, q: Tensor) -> Tensor:
    """1 - alpha, [N]."""
    return 1 - overlap(p, q)


def lk(p: Tensor, q: Tensor) -> Tensor:
    """-log alpha, [N]."""
    return -overlap(p, q).clamp(min=_TINY).log()


def lk_hybrid(p: Tensor, q: Tensor) -> Tensor:
    """KL that turns into total variation as the laws meet, [N]."""
    alpha = overlap(p, q)
    fading = torch.exp(-_FADING * alpha.detach())
    return fading * forward_kl(p, q) + (1 - fading) * (1 - alpha)


Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl, "reverse_kl": reverse_kl, "tv": tv, "lk": lk, "lk_hybrid": lk_hybrid
}  # fmt: skip
