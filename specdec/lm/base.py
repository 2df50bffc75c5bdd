"""CachedLM: a language model together with the cache it owns; the only place that knows rows are ragged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.draws import Drawing
from specdec.errors import ConfigError, ModelError, PromptError
from specdec.limit import read_bandwidth
from specdec.lm.clock import Clock
from specdec.lm.features import Features
from specdec.lm.weights import PackedFrom
from specdec.rounds import Played, Rounds
from specdec.tree import Branches

FILL_TOKENS = 2048  # tokens of one prefill pass; bounds its memory: scores grow with pass x context


class CachedLM(ABC):
    """A model that reads tokens row by row and remembers them.

    ``append`` reads tokens and commits nothing; ``keep`` commits some of them and forgets the rest. Rows live in
    slots 0, 1, 2, ...; live rows are a contiguous prefix, so that a pass works on views. Rows whose prompts are still
    being read are in slots anywhere behind them.

    vocab_size is the width of the logits, context the longest row the model can read. ``lengths[b]`` counts the
    committed tokens of slot b, ``starts[b]`` says which token of the row's text the first of them is (more than 0
    only for a row that outgrew the context). ``clock`` counts the time spent in the model. ``mechanism`` says how
    rows are run: "ragged" is one pass for all of them.
    """

    mechanism = "ragged"
    reused_tokens = 0  # how many tokens at a time rows that begin alike can share; 0 for none
    encodes = False  # whether an encoder reads a source of every row; see ``enter``
    reads_trees = False  # whether ``append`` takes ``parents``
    feature_layers = 0  # how many layers, from the first on, ``tap`` may name
    feature_size = 0  # numbers per token and layer
    in_bytes = False  # whether weights are rounded to one byte each
    packed_from: PackedFrom | None = None  # whose weights were copied, or are remembered by what they made of texts

    def __init__(self, vocab_size: int, context: int, device: torch.device, dtype: torch.dtype) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.device, self.dtype = device, dtype
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.clock = Clock(device)
        self.weight_bytes = 0  # that a pass over one token reads; 0 where it is not known
        self._pending: list[int] = []
        self._counts: Sequence[int] | None = None  # how many tokens of each row are real in the pass under way
        self._branches: dict[int, Branches] = {}  # of slots whose pending tokens are no chain
        self._is_tree = False  # whether the pass under way reads trees
        self._features: Features | None = None
        self._outputs: Tensor | None = None  # of the tapped layers in the latest pass, [B, T, features]

    @property
    def forward_seconds(self) -> float:
        """Time spent in the model; asking for it waits for a GPU to finish."""
        return self.clock.seconds

    def check_weights(self) -> None:
        """Raises ``ModelError`` if the model that this one was made of has other weights by now."""
        if self.packed_from is not None and self.packed_from.has_changed:
            raise ModelError(
                "the model's weights have changed since it was loaded, and the engine has a copy of them as they were: "
                "call specdec.load again"
            )

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
        self,
        tokens: Tensor,
        counts: Sequence[int] | None = None,
        *,
        first: int = 0,
        last_only: bool = False,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Read tokens [B, T] in the slots ``first``, ``first + 1``, ...; return their logits [B, T, V].

        ``counts[b]`` says how many of a row's T tokens are real (all by default); the rest is padding on the right.
        Further appends go on behind the real ones. With ``last_only`` the logits of each row's last real token only,
        [B, V]. ``parents[b]`` makes the real tokens of row b nodes of a tree: each one's parent is a place among all
        tokens of the row that were appended since ``keep``, -1 for the last committed one.
        """
        rows, width = tokens.shape
        lengths = [self.lengths[first + b] + self._pending[first + b] for b in range(rows)]
        self._counts, self._is_tree = counts, parents is not None
        self._branch(parents, first, rows)
        with self.clock.timed():
            hidden = self._forward(self._placed(tokens), lengths, first, needs_logits=True)
            self._note(rows, first)
            if last_only:
                ends = torch.tensor(counts if counts is not None else [width] * rows) - 1
                hidden = hidden[torch.arange(rows, device=self.device), ends.to(self.device, non_blocking=True)]
            logits = self._head(hidden)
        self._read(rows, width, counts, first)
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

    def draw(self, tokens: Tensor, counts: Sequence[int], drawing: Drawing) -> tuple[Tensor, Tensor | None] | None:
        """As ``guess``, with tokens drawn as ``drawing`` says; None, and nothing read, where that is not compiled.

        Where it gets so close that torch must draw, tokens are fewer than laws; then the logits [B, 1, W] of the next
        one come along.
        """
        return None

    def play(self, asked: Rounds, draft: CachedLM | None) -> Played | None:
        """Decode rounds of rows 0 .. B - 1, with the tokens that ``draft`` proposes if any are asked for, and keep them.

        None, and nothing read, where this is no faster than single steps. Where a single step must decide something there
        are fewer rounds than asked for, or none.
        """
        return None

    @torch.inference_mode()
    def fill(self, texts: Sequence[Sequence[int]], *, first: int = 0) -> None:
        """Read and commit one text per slot, whatever their lengths, in passes of bounded size; no logits."""
        width = max(1, FILL_TOKENS // len(texts))
        for begin in range(0, max(map(len, texts)), width):
            chunks = [text[begin : begin + width] for text in texts]
            counts = [len(chunk) for chunk in chunks]
            longest = max(counts)
            tokens = torch.tensor([[*chunk, *[0] * (longest - len(chunk))] for chunk in chunks], device=self.device)
            self._counts, self._is_tree = counts, False
            with self.clock.timed():
                self._forward(tokens, self.lengths[first : first + len(texts)], first, needs_logits=False)
                self._note(len(texts), first)
                self._read(len(texts), longest, counts, first)
                self.keep(counts, first=first)

    def keep(self, counts: Sequence[int], *, first: int = 0, paths: Sequence[Sequence[int]] | None = None) -> None:
        """Commit the first ``counts[b]`` appended tokens of each row; the rest was never there.

        Of a tree, the tokens at the places ``paths[b]`` (one after another, ``counts[b]`` of them).
        """
        for b, count in enumerate(counts):
            slot = first + b
            assert 0 <= count <= self._pending[slot], (count, self._pending[slot])
            path = range(count) if paths is None else paths[b]
            assert len(path) == count, (path, count)
            if list(path) != list(range(count)):
                self._gather(slot, [self.lengths[slot] + place for place in path])
            if self._features is not None:
                self._features.keep(slot, path)
            self.lengths[slot] += count
            self._pending[slot] = 0
        self._branches.clear()

    def tap(self, layers: Sequence[int]) -> None:
        """From now on, collect what these layers put out; see ``take_features``. Numbers of layers, 0 is the first.

        Raises ``ConfigError`` where the model has no such layer, or is not run in a way that shows them.
        """
        unknown = [layer for layer in layers if not 0 <= layer < self.feature_layers]
        if unknown or not layers:
            allowed = f"0 to {self.feature_layers - 1}" if self.feature_layers else f"none ({self.mechanism})"
            raise ConfigError(f"layers whose outputs can be read here: {allowed}; got {list(layers)}")
        self._features = Features(tuple(layers))
        self.reused_tokens = 0  # of what is recalled, nothing is computed and put out

    @property
    def tapped(self) -> tuple[int, ...]:
        """The layers whose outputs are collected."""
        return () if self._features is None else self._features.layers

    def take_features(self, slot: int) -> Tensor:
        """Outputs of the tapped layers for the committed tokens of ``slot`` since they were last taken.

        [n, layers * feature_size]: those of the last n committed tokens, side by side for each token.
        """
        assert self._features is not None, "tap comes first"
        missing = torch.empty(0, len(self.tapped) * self.feature_size, dtype=self.dtype, device=self.device)
        return self._features.take(slot, missing)

    def features_held(self, slot: int) -> int:
        """For how many tokens of ``slot`` there is something to take."""
        return 0 if self._features is None else sum(map(len, self._features.held(slot)))

    def read_bandwidth(self) -> float:
        """Bytes per second that the device's memory gives, as fast as anything here reads it."""
        return read_bandwidth(self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """The model's own embeddings [..., H] of tokens [...], for drafters that share them; where ``tap`` works."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def embedding(self) -> Tensor:
        """The matrix [V, H] of what ``embed`` gives."""
        return self.embed(torch.arange(self.vocab_size, device=self.device))

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] that the model's own head makes of hidden states [..., H]; where ``tap`` works."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def restart(self, slot: int, start: int) -> None:
        """Forget the row in ``slot``; its cache begins anew at token ``start`` of its text."""
        self.lengths[slot], self.starts[slot], self._pending[slot] = 0, start, 0
        self._branches.pop(slot, None)
        if self._features is not None:
            self._features.drop(slot)

    @torch.inference_mode()
    def forget(self, slot: int) -> None:
        """Empty ``slot``, what was read and refused included; its row is read anew."""
        self._wipe(slot, slot + 1)
        self.restart(slot, self.starts[slot])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Slot ``target`` becomes the first ``length`` (default: all) committed tokens of slot ``source``.

        A slot may be its own source: tokens that were committed are forgotten again.
        """
        length = self.lengths[source] if length is None else length
        self._copy(source, target, length)
        self.lengths[target], self.starts[target], self._pending[target] = length, self.starts[source], 0
        if self._features is not None:
            self._features.copy(source, target, self.lengths[source] - length)

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

    def _placed(self, tokens: Tensor) -> Tensor:
        """Tokens where ``_forward`` wants them."""
        return tokens.to(self.device, non_blocking=True)

    def _read(self, rows: int, width: int, counts: Sequence[int] | None, first: int) -> None:
        for b in range(rows):
            self._pending[first + b] += width if counts is None else counts[b]

    def _note(self, rows: int, first: int) -> None:
        """Collect the outputs of tapped layers for the real tokens of the pass that has just run."""
        if self._features is not None and self._outputs is not None:
            for b in range(rows):
                outputs = self._outputs[b]
                self._features.add(first + b, outputs if self._counts is None else outputs[: self._counts[b]])
            self._outputs = None

    def _branch(self, parents: Sequence[Sequence[int]] | None, first: int, rows: int) -> None:
        """Note how the tokens of the coming pass hang together."""
        if parents is None:
            assert not self._branches or not any(first + b in self._branches for b in range(rows))
            return
        assert self.reads_trees, f"{type(self).__name__} reads chains"
        for slot, own in enumerate(parents, first):
            if slot not in self._branches:
                self._branches[slot] = Branches(self._pending[slot])
            self._branches[slot].grow(own)

    def _trees(self, first: int, rows: int) -> list[tuple[int, Branches]] | None:
        """Per row, how many tokens are committed and how the others hang together; None if the pass reads chains."""
        return (
            [(self.lengths[slot], self._branches[slot]) for slot in range(first, first + rows)]
            if self._is_tree
            else None
        )

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        """The tokens at ``places`` of the slot's cache, in rising order, move to its first uncommitted places."""
        raise NotImplementedError(f"{type(self).__name__} reads chains")

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
