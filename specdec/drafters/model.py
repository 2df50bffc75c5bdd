"""A small language model proposes a chain of tokens, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.lm.base import CachedLM, catch_up, window_start
from specdec.sequences import Sequences, Step, has_law

_SLACK = 8  # unread tokens that the first drafting pass takes along; more get passes of their own


class ModelDrafter:
    """Drafts with any ``CachedLM`` that shares the target's vocabulary.

    Its laws go through the same filters as the target's, so that a filter never lowers acceptance. Its context may be
    shorter than the target's: it then reads a window of the row's latest tokens.
    """

    def __init__(self, lm: CachedLM) -> None:
        self.lm = lm
        self._count = 0
        self._unread: list[int] = []

    @property
    def forward_seconds(self) -> float:
        """Time spent in the draft model."""
        return self.lm.forward_seconds

    def reserve(self, rows: int, length: int) -> None:
        self.lm.reserve(rows, min(length, self.lm.context) + _SLACK)

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        count = min(max(lengths), self.lm.context // 2)
        if count <= 0:
            return Draft.empty(len(sequences), sequences.device)
        allowed = torch.tensor(lengths, device=sequences.device).clamp(max=count)
        tokens = torch.zeros(len(sequences), 0, dtype=torch.long, device=sequences.device)
        probs: list[Tensor] = []
        logits = self._read_new_tokens(sequences, count)
        for i in range(count):
            if i > 0:
                logits = self.lm.append(tokens[:, -1:], last_only=True)
            scores = sequences.scores(sequences.fit(logits).unsqueeze(1), tokens, at=i)
            # A broken law may not be drawn from; deciding before its token is drawn keeps the text's law exact.
            allowed = torch.where(has_law(scores).squeeze(1), allowed, allowed.clamp(max=i))
            law = sequences.laws(scores).squeeze(1)
            tokens = torch.cat([tokens, sequences.randomness.draft(i, law).unsqueeze(1)], dim=1)
            probs.append(law)
        return Draft(tokens, allowed, None if sequences.greedy else torch.stack(probs, dim=1))

    def observe(self, step: Step) -> None:
        """Keep what was read of the committed text: the last drafted token was proposed but never read."""
        if not self._unread:
            return
        pairs = zip(self._unread, step.accepted, strict=True)
        self.lm.keep([unread + min(accepted, self._count - 1) for unread, accepted in pairs])
        self._unread = []

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        read = self.lm.lengths[source]
        if length is not None:
            read = max(0, min(read, length - self.lm.starts[source]))
        self.lm.copy(source, target, read)

    def free(self, rows: int) -> None:
        self.lm.free(rows)

    def _read_new_tokens(self, sequences: Sequences, count: int) -> Tensor:
        """Read every row's unread text; logits [B, W] of what follows it."""
        texts = [row.tokens for row in sequences.rows]
        starts = [window_start(len(text) + count, self.lm.context) for text in texts]
        catch_up(self.lm, texts, starts, _SLACK)
        unread = [text[start + self.lm.lengths[b] :] for b, (text, start) in enumerate(zip(texts, starts, strict=True))]
        self._count, self._unread = count, [len(tokens) for tokens in unread]
        width = max(self._unread)
        padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in unread], device=self.lm.device)
        return self.lm.append(padded, self._unread, last_only=True)
