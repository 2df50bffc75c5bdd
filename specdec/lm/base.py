"""CachedLM: a language model together with the cache it owns; the only place that knows rows are ragged."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.errors import PromptError

FILL_TOKENS = 2048  # tokens of one prefill pass; bounds its memory: scores grow with pass x context


class CachedLM(ABC):
    """A model that reads tokens row by row and remembers them.

    ``append`` reads tokens and commits nothing; ``keep`` commits some of them and forgets the rest. Rows live in
    slots 0, 1, 2, ...; live rows are a contiguous prefix, so that a pass works on views. Rows whose prompts are still
    being read are in slots anywhere behind them.

    vocab_size is the width of the logits, context the longest row the model can read. ``lengths[b]`` counts the
    committed tokens of slot b, ``starts[b]`` says which token of the row's text the first of them is (more than 0
    only for a row that outgrew the context), ``forward_seconds`` is the time spent in the model. ``mechanism`` says how
    rows are run: "ragged" is one pass for all of them.
    """

    mechanism = "ragged"
    reused_tokens = 0  # how many tokens at a time rows that begin alike can share; 0 for none
    encodes = False  # whether an encoder reads a source of every row; see ``enter``

    def __init__(self, vocab_size: int, context: int, device: torch.device, dtype: torch.dtype) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.device, self.dtype = device, dtype
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.forward_seconds = 0.0
        self.weight_bytes = 0  # that a pass over one token reads; 0 where it is not known
        self._pending: list[int] = []
        self._counts: Sequence[int] | None = None  # how many tokens of each row are real in the pass under way

    @torch.inference_mode()
    def reserve(self, rows: int, length: int) -> None:
        """Make room for ``rows`` rows of ``length`` tokens, drafts included."""
        missing = rows - len(self.lengths)
        for counts in (self.lengths, self.starts, self._pending):
            counts.extend([0] * missing)
        self._reserve(rows, length)

    def enter(self, slot: int, source: Any) -> None:
        """The row that joins in ``slot`` has ``source``, what an encoder reads; None for models without one.

        ``copy`` takes it along, ``forget`` and ``restart`` keep it, ``free`` drops it.
        """
        if source is not None:
            raise PromptError("this model has no encoder, and so no use for a source; make it part of the prompt")

    @torch.inference_mode()
    def append(
        self, tokens: Tensor, counts: Sequence[int] | None = None, *, first: int = 0, last_only: bool = False
    ) -> Tensor:
        """Read tokens [B, T] in the slots ``first``, ``first + 1``, ...; return their logits [B, T, V].

        ``counts[b]`` says how many of a row's T tokens are real (all by default); the rest is padding on the right.
        Further appends go on behind the real ones. With ``last_only`` the logits of each row's last real token only,
        [B, V].
        """
        started = time.perf_counter()
        rows, width = tokens.shape
        lengths = [self.lengths[first + b] + self._pending[first + b] for b in range(rows)]
        self._counts = counts
        hidden = self._forward(tokens.to(self.device), lengths, first, needs_logits=True)
        if last_only:
            ends = torch.tensor(counts if counts is not None else [width] * rows, device=self.device) - 1
            hidden = hidden[torch.arange(rows, device=self.device), ends]
        logits = self._head(hidden)
        self._read(rows, width, counts, first)
        self.forward_seconds += time.perf_counter() - started
        return logits

    @torch.inference_mode()
    def guess(self, tokens: Tensor, counts: Sequence[int], count: int, choices: int) -> Tensor:
        """Read tokens [B, T] as ``append`` does, and ``count - 1`` more of each row; [B, count].

        These are the likeliest of the first ``choices`` ids, each after all before it; the last one is not read.
        """
        logits = self.append(tokens, counts, last_only=True)
        guessed: list[Tensor] = []
        for i in range(count):
            if i > 0:
                logits = self.append(guessed[-1])[:, 0]
            guessed.append(logits[:, :choices].float().argmax(-1, keepdim=True))
        return torch.cat(guessed, dim=1)

    @torch.inference_mode()
    def fill(self, texts: Sequence[Sequence[int]], *, first: int = 0) -> None:
        """Read and commit one text per slot, whatever their lengths, in passes of bounded size; no logits."""
        started = time.perf_counter()
        width = max(1, FILL_TOKENS // len(texts))
        for begin in range(0, max(map(len, texts)), width):
            chunks = [text[begin : begin + width] for text in texts]
            counts = [len(chunk) for chunk in chunks]
            longest = max(counts)
            tokens = torch.tensor([[*chunk, *[0] * (longest - len(chunk))] for chunk in chunks], device=self.device)
            self._counts = counts
            self._forward(tokens, self.lengths[first : first + len(texts)], first, needs_logits=False)
            self._read(len(texts), longest, counts, first)
            self.keep(counts, first=first)
        self.forward_seconds += time.perf_counter() - started

    def keep(self, counts: Sequence[int], *, first: int = 0) -> None:
        """Commit the first ``counts[b]`` appended tokens of each row; the rest was never there."""
        for b, count in enumerate(counts):
            slot = first + b
            assert 0 <= count <= self._pending[slot], (count, self._pending[slot])
            self.lengths[slot] += count
            self._pending[slot] = 0

    def restart(self, slot: int, start: int) -> None:
        """Forget the row in ``slot``; its cache begins anew at token ``start`` of its text."""
        self.lengths[slot], self.starts[slot], self._pending[slot] = 0, start, 0

    @torch.inference_mode()
    def forget(self, slot: int) -> None:
        """Empty ``slot``, what was read and refused included; its row is read anew."""
        self._wipe(slot, slot + 1)
        self.restart(slot, self.starts[slot])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Slot ``target`` becomes the first ``length`` (default: all) committed tokens of slot ``source``."""
        length = self.lengths[source] if length is None else length
        self._copy(source, target, length)
        self.lengths[target], self.starts[target], self._pending[target] = length, self.starts[source], 0

    def remember(self, slot: int, tokens: Sequence[int]) -> None:  # noqa: B027 (nothing, unless a cache can)
        """The row in ``slot`` has the text ``tokens``; another may begin alike and reuse what it has read."""

    def recall(self, slot: int, tokens: Sequence[int]) -> None:  # noqa: B027
        """An empty slot gets a row with the text ``tokens``: what is remembered of its beginning counts as read."""

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether all of ``tokens``, ``reused_tokens`` or a multiple, would be recalled."""
        return False

    @torch.inference_mode()
    def free(self, rows: int) -> None:
        """Only the first ``rows`` slots are still in use; the others are emptied."""
        read = zip(self.lengths, self._pending, strict=True)
        used = max((slot + 1 for slot, counts in enumerate(read) if any(counts)), default=0)
        if used > rows:
            self._wipe(rows, used)
        for slot in range(rows, len(self.lengths)):
            self.restart(slot, 0)

    def _read(self, rows: int, width: int, counts: Sequence[int] | None, first: int) -> None:
        for b in range(rows):
            self._pending[first + b] += width if counts is None else counts[b]

    @abstractmethod
    def _reserve(self, rows: int, length: int) -> None: ...

    @abstractmethod
    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Hidden states [B, T, ...] of tokens [B, T] that follow ``lengths[b]`` cached ones; whatever ``_head`` takes.

        Without ``needs_logits`` the result is not used, so a model whose head is part of its forward pass may skip it.
        """

    @abstractmethod
    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""

    @abstractmethod
    def _copy(self, source: int, target: int, length: int) -> None: ...

    @abstractmethod
    def _wipe(self, first: int, last: int) -> None: ...


def window_start(length: int, context: int) -> int:
    """Where the window of a text of ``length`` tokens begins, in a model that can read ``context`` of them.

    0 while the text fits; past that the window hops, each time forgetting the older half, so that most tokens are
    read with a cache. It depends on the length alone, so drafting cannot change what the target has seen.
    """
    if length <= context:
        return 0
    hop = context - context // 2
    return -(-(length - context) // hop) * hop


def catch_up(lm: CachedLM, texts: Sequence[Sequence[int]], starts: Sequence[int], slack: int) -> None:
    """Bring the caches of slots 0, 1, ... up to the last token of their texts, which stays unread.

    Rows with at most ``slack`` unread tokens are left as they are; the others read theirs in bounded passes, rows in
    neighbouring slots together. ``starts[b]`` is where row b's window must begin; a row whose cache begins elsewhere
    is read anew.
    """
    behind: list[list[Sequence[int]]] = []
    places: list[int] = []
    for slot, (text, start) in enumerate(zip(texts, starts, strict=True)):
        if lm.starts[slot] != start:
            lm.restart(slot, start)
        read = start + lm.lengths[slot]
        if len(text) - 1 - read < slack:
            continue
        unread = text[read:-1]
        if places and places[-1] + len(behind[-1]) == slot:
            behind[-1].append(unread)
        else:
            places.append(slot)
            behind.append([unread])
    for slot, group in zip(places, behind, strict=True):
        lm.fill(group, first=slot)
