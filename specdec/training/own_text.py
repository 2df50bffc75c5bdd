"""Text that a target writes itself, for drafts and heads to learn from: it is what they will meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specdec.engine import Engine


def own_text(engine: Engine, prompts: Tensor, *, new_tokens: int, draft_tokens: int, seed: int) -> Tensor:
    """Rows [N, P + new_tokens] of prompts [N, P] and what the target goes on with, half greedy and half sampled.

    They come in random order. The engine drafts ``draft_tokens`` at a time, so it is faster the better its drafter is.
    """
    output = engine.generate(
        prompts.tolist(),
        max_new_tokens=new_tokens,
        temperature=[i % 2 for i in range(len(prompts))],
        num_draft_tokens=draft_tokens,
        eos_token_id=None,
        seed=seed,
    )
    texts = torch.cat([prompts, torch.tensor(output.token_ids)], dim=1)
    return texts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
