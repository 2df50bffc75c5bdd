"""Hugging Face models one row at a time, with the cache that the model itself makes.

Slower than one pass for all rows, and exact by construction for what depends on a cache of one row only: recurrent
states, biases by distance, positions that the model counts itself, caches of the model's own making.

Nothing is committed until ``keep``. A cache that holds keys and values alone is cropped. Any other is a snapshot:
passes run on a copy, which becomes the snapshot when all of its tokens are kept; when not, the kept ones are read
again, at the front of the next pass.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from specdec.lm import probe
from specdec.lm.base import FILL_TOKENS, CachedLM
from specdec.lm.clock import Clock

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")  # what models call it
MECHANISMS = ("row by row", "token by token", "whole rows")
_GENERATED = 8  # tokens that the model's own ``generate`` is asked for
MOST_BEHIND = 16  # tokens that passes read again and again before the snapshot reads them once and for all


@dataclass
class RowState:
    """One row: its committed ``text``, and ``cache``, which has read all of it but the last ``behind`` tokens.

    ``pending`` tokens are read and not kept; ``work`` is the cache that has read them too. ``source`` is what an
    encoder made of the row's input.
    """

    text: list[int] = field(default_factory=list)
    cache: Any = None
    behind: int = 0
    pending: list[int] = field(default_factory=list)
    work: Any = None
    source: Any = None

    def clear(self) -> None:
        """Forget everything read; the source stays."""
        self.text, self.cache, self.behind, self.pending, self.work = [], None, 0, [], None


class RowwiseLM(CachedLM):
    """A ``PreTrainedModel`` that reads each row in passes of its own; several of them may share one model.

    mechanism: "row by row", "token by token" for models that go on from a state with single tokens only, or
    "whole rows", where no cache is used at all and each pass reads the row from its beginning. Nothing of the model,
    its config or its training flags is changed; passes run in evaluation mode. Raises ``ModelError`` for a model that
    cannot be decoded exactly this way, saying why.
    """

    def __init__(self, model: PreTrainedModel, mechanism: str = "row by row") -> None:
        super().__init__(probe.logits_width(model), probe.context_of(model), probe.device_of(model), model.dtype)
        assert mechanism in MECHANISMS, mechanism
        self.model, self.mechanism = model, mechanism
        self.cached, self.single = mechanism != "whole rows", mechanism == "token by token"
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._rows: list[RowState] = []
        self._admit()
        self.lengths, self.starts, self._pending, self._rows = [], [], [], []
        self.clock = Clock(self.device)

    def _admit(self) -> None:
        prefixes = [0, *(place for window in probe.windows(self.model) for place in (max(window - 3, 1), window + 5))]
        check = None if self.cached else self._as_generate
        probe.admit(self, self.model, lambda text, row: probe.plain_logits(self.model, text), check, prefixes)

    def _as_generate(self, tokens: Tensor, logits: Tensor, limit: float) -> str | None:
        """The reason to refuse to read whole rows of a model whose own ``generate``, with its cache, says otherwise."""
        text = self._rows[0].text
        settings = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=_GENERATED)
        with probe.evaluating(self.model):
            whole = GenerationMixin.generate(
                self.model, torch.tensor([text], device=self.device), generation_config=settings
            )
        theirs, ours = whole[0].tolist(), list(text)
        for _ in range(_GENERATED):
            found, _ = self._run(self._rows[0], None, ours, 0)
            ours.append(int(found[-1].argmax()))
        return (
            None
            if ours[: len(theirs)] == theirs
            else "transformers' generate, with the model's own cache, says something else"
        )

    def keep(self, counts: Any, *, first: int = 0, paths: Any = None) -> None:
        super().keep(counts, first=first, paths=paths)
        for slot, count in enumerate(counts, first):
            self._keep_row(self._rows[slot], count)

    def restart(self, slot: int, start: int) -> None:
        super().restart(slot, start)
        self._rows[slot].clear()

    def _reserve(self, rows: int, length: int) -> None:
        self._rows.extend(RowState() for _ in range(rows - len(self._rows)))

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Logits [B, T, V], each row's real tokens only; the places of padding are 0."""
        counts = self._counts if self._counts is not None else [tokens.shape[1]] * len(tokens)
        width = self.vocab_size if needs_logits else 0
        logits = torch.zeros(*tokens.shape, width, dtype=self.dtype, device=self.device)
        for b, (ids, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            if count:
                found = self._read_row(self._rows[first + b], ids[:count], adopt=not needs_logits)
                if needs_logits:
                    logits[b, :count] = found
        return logits

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        """The source's cache, cut to ``length`` tokens where it can be; else they are read anew when next needed."""
        old, new = copy.copy(self._rows[source]), self._rows[target]  # which may be the same
        new.clear()
        new.source, new.text = old.source, old.text[:length]
        surplus = len(old.text) - old.behind - length
        if self.cached and (surplus <= 0 or is_croppable(old.cache)) and not (old.pending and old.work is old.cache):
            new.cache = clone(old.cache)
            new.cache = cropped(new.cache, surplus, length) if surplus > 0 else new.cache
            new.behind = max(-surplus, 0)
        else:
            new.behind = length

    def _wipe(self, first: int, last: int) -> None:
        for row in self._rows[first:last]:
            row.clear()

    def _read_row(self, row: RowState, tokens: list[int], *, adopt: bool) -> Tensor:
        """Logits [T, V] of ``tokens`` behind all that the row has read; ``adopt``: they will all be kept."""
        ids = tokens
        if not self.cached and adopt:  # no cache to fill
            row.pending = row.pending + tokens
            return torch.zeros(0, 0)
        if not self.cached:
            ids = row.text + row.pending + tokens
        elif not row.pending:
            if row.behind > (0 if self.single and row.cache is not None else MOST_BEHIND):
                self._catch_up(row)
            row.work = row.cache if adopt or is_croppable(row.cache) else clone(row.cache)
            ids = row.text[len(row.text) - row.behind :] + tokens
        position = len(row.text) + len(row.pending) + len(tokens) - len(ids)
        logits, row.work = self._run(row, row.work, ids, position)
        row.pending = row.pending + tokens
        return logits[len(logits) - len(tokens) :]

    def _catch_up(self, row: RowState) -> None:
        """The snapshot reads what it is behind, in passes of bounded size."""
        while row.behind:
            begin = len(row.text) - row.behind
            ids = row.text[begin : begin + FILL_TOKENS]
            _, row.cache = self._run(row, row.cache, ids, begin)
            row.behind -= len(ids)

    def _keep_row(self, row: RowState, count: int) -> None:
        kept, refused = row.pending[:count], len(row.pending) - count
        row.text += kept
        if not self.cached:
            row.behind = len(row.text)
        elif not refused and row.pending:
            row.cache, row.behind = row.work, 0
        elif is_croppable(row.work):
            row.cache, row.behind = cropped(row.work, refused, len(row.text)), 0
        else:
            row.behind += count
        row.pending, row.work = [], None

    def _run(self, row: RowState, cache: Any, ids: list[int], position: int) -> tuple[Tensor, Any]:
        """Logits [T, V] of ``ids`` that follow ``position`` others, and the cache after them; one pass if possible."""
        if self.single and cache is not None and len(ids) > 1:
            parts = []
            for i, token in enumerate(ids):
                logits, cache = self._run(row, cache, [token], position + i)
                parts.append(logits)
            return torch.cat(parts), cache
        tokens = torch.tensor([ids], device=self.device)
        given = self._inputs(row, tokens, position)
        given["use_cache"] = self.cached
        if cache is not None:
            given[next(name for name in CACHE_NAMES if name in self._accepted)] = cache
        with probe.evaluating(self.model):
            output = self.model(return_dict=True, **given)
        if not self.cached:
            return output.logits[0], None
        found = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
        if found is None:
            raise RuntimeError(f"the model returned no cache; looked for {', '.join(CACHE_NAMES)}")
        return output.logits[0], found

    def _inputs(self, row: RowState, tokens: Tensor, position: int) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": tokens}
        if "position_ids" in self._accepted:
            given["position_ids"] = torch.arange(position, position + tokens.shape[1], device=self.device)[None]
        return given


def is_croppable(cache: Any) -> bool:
    """Whether all that the cache holds are keys and values of every token it has read."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return isinstance(cache, Cache) and bool(cache.layers) and all(type(x) is DynamicLayer for x in cache.layers)


def cropped(cache: Any, count: int, left: int) -> Any:
    """The cache without its last ``count`` tokens, changed in place; None, from which a model begins, for an empty one.

    ``left`` tokens remain.
    """
    if left == 0:
        return None
    if count:
        cache.crop(-count)
    return cache


def clone(cache: Any) -> Any:
    """A copy that shares no tensor with the original."""
    return copy.deepcopy(cache)
