"""Our LSTM with its states: no keys and values, the same memory per row however long it gets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from specdec.lm.base import FILL_TOKENS, CachedLM
from specdec.nn.lstm import LSTM, Cells
from specdec.nn.packed import pack_linears


@dataclass
class RowState:
    """One row. ``states[n]`` [N, 2, H] comes after its committed text and ``n`` tokens that may yet be refused.

    ``text`` and ``pending`` are their ids, in pieces: a state that was not kept can only be made anew.
    """

    states: dict[int, Tensor]
    text: list[Tensor] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)


class RecurrentLM(CachedLM):
    """An ``LSTM`` with the states of its rows. The given model is not touched.

    A state forgets nothing exactly, so that of every appended token is kept until ``keep`` says which one goes on.
    Tensors of states are never written to again: rows that move or fork share them.
    """

    mechanism = "recurrent"

    def __init__(self, model: LSTM) -> None:
        weight = model.embed_tokens.weight
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._cells = pack_linears(Cells(self.model))
        pack_linears(self.model)
        self._beginning = weight.new_zeros(model.config.num_hidden_layers, 2, model.config.hidden_size)
        self._rows: list[RowState] = []

    def keep(self, counts: Sequence[int], *, first: int = 0, paths: Sequence[Sequence[int]] | None = None) -> None:
        super().keep(counts, first=first, paths=paths)
        for row, count in zip(self._rows[first : first + len(counts)], counts, strict=True):
            row.states = {0: row.states[count]}
            if count:
                row.text.append(torch.cat(row.pending)[:count])
            row.pending = []

    def restart(self, slot: int, start: int) -> None:
        super().restart(slot, start)
        self._wipe(slot, slot + 1)

    def _reserve(self, rows: int, length: int) -> None:
        self._rows += [RowState({0: self._beginning}) for _ in range(rows - len(self._rows))]

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows = self._rows[first : first + len(tokens)]
        counts = self._counts or [tokens.shape[1]] * len(rows)
        read = [length - committed for length, committed in zip(lengths, self.lengths[first:], strict=False)]
        for row, ids, count in zip(rows, tokens, counts, strict=True):
            row.pending.append(ids[:count])
        state = torch.stack([row.states[n] for row, n in zip(rows, read, strict=True)], dim=2)
        if not needs_logits:
            return self._fill(rows, tokens, state, counts)
        hidden = []
        for t, x in enumerate(self.model.embed_tokens(tokens).unbind(1)):
            state = self._cells(x, state)
            hidden.append(state[-1, 0])
            for b, own in enumerate(state.unbind(2)):
                if t < counts[b]:
                    rows[b].states[read[b] + t + 1] = own
        return torch.stack(hidden, dim=1)

    def _fill(self, rows: list[RowState], tokens: Tensor, state: Tensor, counts: Sequence[int]) -> Tensor:
        """Read tokens [B, T] that are all kept, for the states at their ends only."""
        reading = [b for b, count in enumerate(counts) if count]
        if reading:
            embeddings = self.model.embed_tokens(tokens[reading])
            lengths = torch.tensor([counts[b] for b in reading])
            packed = pack_padded_sequence(embeddings, lengths, batch_first=True, enforce_sorted=False)
            begin = state[:, :, reading]
            _, ends = self.model.lstm(packed, (begin[:, 0].contiguous(), begin[:, 1].contiguous()))
            for b, end in zip(reading, torch.stack(ends, dim=1).unbind(2), strict=True):
                rows[b].states = {counts[b]: end}
        return state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def _copy(self, source: int, target: int, length: int) -> None:
        row = self._rows[source]
        if length == self.lengths[source]:
            self._rows[target] = RowState({0: row.states[0]}, list(row.text))
            return
        made = self._rows[target] = RowState({0: self._beginning})
        for part in torch.cat(row.text)[:length].split(FILL_TOKENS) if length else ():
            self._fill([made], part[None], made.states[0].unsqueeze(2), [len(part)])
            made.states = {0: made.states[len(part)]}
            made.text.append(part)

    def _wipe(self, first: int, last: int) -> None:
        for slot in range(first, last):
            self._rows[slot] = RowState({0: self._beginning})
