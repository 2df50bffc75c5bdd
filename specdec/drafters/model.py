"""A small language model proposes a chain of tokens, one pass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.draft import Chains, Draft
from specdec.lm.base import CachedLM, catch_up, window_start
from specdec.sampling import is_law
from specdec.sequences import Sequences, Step
from specdec.verify import leading

_SLACK = 8  # unread tokens that the first drafting pass takes along; more get passes of their own


class ModelDrafter:
    """Drafts with any ``CachedLM`` that shares the target's vocabulary.

    Its laws go through the same filters as the target's, so that a filter never lowers acceptance. Its context may be
    shorter than the target's: it then reads a window of the row's latest tokens.
    """

    draws_itself = True  # a model's own softmax is the law, and its ids are the target's

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
        return self.behind(sequences, lengths, count, *self._new_tokens(sequences, count))

    def behind(self, sequences: Sequences, lengths: list[int], count: int, unread: Tensor, counts: list[int]) -> Draft:
        """Up to ``count`` guesses, ``lengths[b]`` of row b, behind tokens [B, T], ``counts[b]`` of them real."""
        self._count, self._unread = count, counts
        if sequences.only_largest:
            return self._guess(sequences, unread, count, lengths)
        tokens = torch.empty(len(sequences), count, dtype=torch.long, device=sequences.device)
        probs = torch.empty(*tokens.shape, sequences.vocab_size, dtype=torch.float32, device=sequences.device)
        done, logits = self._draw_itself(sequences, unread, tokens, probs)
        for i in range(done, count):
            if logits is None:
                logits = self.lm.append(self._own(tokens[:, i - 1 : i]))
            law = self._law(sequences, logits, tokens[:, :i])
            probs[:, i : i + 1] = law
            tokens[:, i : i + 1] = sequences.randomness.draft(i, law)
            logits = None
        # What was drawn of no law is not proposed. That depends on the text before it alone, so the text's law is kept.
        most = torch.tensor(lengths).to(sequences.device, non_blocking=True)
        allowed = most.minimum(leading(is_law(probs)))
        return Draft(tokens, allowed, None if sequences.greedy else probs)

    def observe(self, step: Step) -> None:
        """Keep what was read of the committed text: the last drafted token was proposed but never read."""
        if self._unread:
            pairs = zip(self._unread, step.accepted, strict=True)
            self.lm.keep([unread + min(accepted, self._count - 1) for unread, accepted in pairs])
            self._unread = []
        for slot in step.finished:
            self.lm.remember(slot, step.rows[slot].tokens)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        read = self.lm.lengths[source]
        if length is not None:
            read = max(0, min(read, length - self.lm.starts[source]))
        self.lm.copy(source, target, read)

    def free(self, rows: int) -> None:
        self._unread = []  # of a draft that nobody judged: its step was interrupted
        self.lm.free(rows)

    def alone(self, sequences: Sequences, lengths: list[int], rule: str) -> Chains | None:
        """This drafter, but not those derived from it: they do more."""
        return self if type(self) is ModelDrafter else None

    def room(self, sequences: Sequences) -> int:
        """How many tokens each row may get, drafts included, before the model must begin a new window of one."""
        ends = zip(sequences.rows, self.lm.starts, strict=False)
        return min(start + self.lm.context - len(row.tokens) for row, start in ends)

    def unread(self, sequences: Sequences) -> list[int] | None:
        """How many tokens of each row the model has not read; None if it is far behind, or knows too few ids."""
        rows = zip(sequences.rows, self.lm.starts, self.lm.lengths, strict=False)
        counts = [len(row.tokens) - start - length for row, start, length in rows]
        return counts if max(counts) <= _SLACK + 1 and sequences.vocab_size <= self.lm.vocab_size else None

    def _new_tokens(self, sequences: Sequences, count: int) -> tuple[Tensor, list[int]]:
        """Every row's unread text, padded to [B, T], and how many tokens it has; the rest has been read. Not on a GPU."""
        texts = self._texts(sequences)
        starts = [window_start(len(text) + count, self.lm.context) for text in texts]
        for slot, row in enumerate(sequences.rows):
            if self.lm.lengths[slot] == 0:  # new, or forgotten
                if self.lm.encodes:
                    self.lm.enter(slot, _unencoded(row.request.source))
                elif starts[slot] == 0:
                    self.lm.recall(slot, texts[slot][:-1])
        catch_up(self.lm, texts, starts, _SLACK)
        unread = [text[start + self.lm.lengths[b] :] for b, (text, start) in enumerate(zip(texts, starts, strict=True))]
        self._count, self._unread = count, [len(tokens) for tokens in unread]
        width = max(self._unread)
        padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in unread])
        return padded, self._unread

    def _texts(self, sequences: Sequences) -> list[list[int]]:
        """Every row's text in ids of the draft model."""
        return [self._readable(row.tokens, sequences.vocab_size) for row in sequences.rows]

    def _guess(self, sequences: Sequences, unread: Tensor, count: int, lengths: list[int]) -> Draft:
        """What the draft model itself goes on with, behind its ``unread`` tokens [B, T]."""
        guessed = self.lm.guess(unread, self._unread, count, sequences.vocab_size)
        allowed = torch.tensor(lengths).clamp(max=count).to(sequences.device, non_blocking=True)
        return Draft(guessed.to(sequences.device), allowed)

    def _draw_itself(
        self, sequences: Sequences, unread: Tensor, tokens: Tensor, probs: Tensor
    ) -> tuple[int, Tensor | None]:
        """Read ``unread`` [B, T], and what a compiled model can draw by itself after it, into tokens and laws.

        How many tokens of a row that are, and the logits [B, 1, W] of the next one unless that is all.
        """
        drawing = sequences.drawing(probs) if self.draws_itself else None
        drawn = None if drawing is None else self.lm.draw(unread, self._unread, drawing)
        if drawn is None:
            return 0, self.lm.append(unread, self._unread, last_only=True).unsqueeze(1)
        found, logits = drawn
        tokens[:, : found.shape[1]] = found
        return found.shape[1], logits

    def _law(self, sequences: Sequences, logits: Tensor, tokens: Tensor) -> Tensor:
        """The laws [B, 1, V] of the draft model's logits [B, 1, W] after ``tokens`` [B, i], which were drafted."""
        return sequences.draft_laws(sequences.fit(logits), tokens)

    def _own(self, tokens: Tensor) -> Tensor:
        """Drafted tokens [B, 1] in ids of the draft model, which is to read them."""
        return tokens

    def _readable(self, tokens: list[int], vocab_size: int) -> list[int]:
        """Ids that pad the target's vocabulary beyond the draft's are unknown here; a wrong guess is all they cost."""
        top = self.lm.vocab_size - 1
        return tokens if vocab_size <= top + 1 else [min(token, top) for token in tokens]


def _unencoded(source: Any) -> Any:
    """The source without what the target's encoder has made of it, if there is anything else to read."""
    if not isinstance(source, Mapping) or source.keys() <= {"encoder_outputs", "attention_mask"}:
        return source
    return {name: value for name, value in source.items() if name != "encoder_outputs"}
