"""Our GPT on CPU: the compiled pass of nn/cpu.c over rows of different lengths, with keys and values in blocks."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import c_void_p
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec import rounds
from specdec.draws import Drawing
from specdec.errors import PromptError
from specdec.lm.base import CachedLM
from specdec.lm.paged import BLOCK, PagedCache, PagedLM
from specdec.nn import cpu
from specdec.nn.gpt import GPT
from specdec.nn.onednn import OtherProducts
from specdec.rounds import Played, Rounds

MOST_TOKENS = 256  # of one compiled pass; more are read in several, so that what lies between layers stays in the cache

Integers = NDArray[np.int64]


class Tokens(NamedTuple):
    """The real tokens of a pass, those of a row side by side; arrays [M].

    ``places`` are where they lie in their row's cache; ``positions`` count the tokens before them, which is the same
    unless they are nodes of a tree. ``seen``: of a tree, see cpu.c.
    """

    ids: Integers
    places: Integers
    positions: Integers
    row_of: Integers
    seen: NDArray[np.uint64] | None = None

    def part(self, begin: int) -> Tokens:
        """As many as one pass reads, from ``begin`` on."""
        here = slice(begin, begin + MOST_TOKENS)
        seen = None if self.seen is None else self.seen[here]
        return Tokens(self.ids[here], self.places[here], self.positions[here], self.row_of[here], seen)


class CpuLM(PagedLM):
    """A ``GPT`` with its cache. The given model is not touched: its weights are packed into copies.

    A token's logits are the same bits whatever else its pass reads, so speculation changes no text, in bfloat16 either.
    Exceptions: trees, which are summed in another order, and passes of so many tokens that oneDNN's products are faster
    (on processors with matrix units).

    Raises ``LookupError`` where nothing is compiled for this processor and dtype.
    """

    reads_trees = True
    fuse: cpu.Linear | None = None  # of what a target puts out, where tokens are read beside that

    def __init__(self, model: GPT, *, in_bytes: bool = False) -> None:
        """``in_bytes``: the weights of all products rounded to 127 steps per row; another model, half the size."""
        weight = model.embed_tokens.weight
        library = cpu.kernels(weight.dtype) if weight.device.type == "cpu" and model.pattern is None else None
        if library is None:
            raise LookupError(f"no compiled pass for {weight.dtype} on {weight.device}")
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self._library, self.config = library, model.config
        self._packed = cpu.CpuModel(library, model, in_bytes=in_bytes)
        self._others = None if in_bytes else OtherProducts.where_faster(library, model)
        self.in_bytes = in_bytes
        head_size = cpu.pad(self._packed.head_dim)
        numel = self._packed.struct.layers * self._packed.groups * 2 * BLOCK * head_size
        self.cache = PagedCache(numel, weight.dtype)
        self._angles = model.frequencies.float().cpu(), model.rope_scale
        self._cosines = self._sines = torch.empty(0, 0)
        self._scratch = [torch.empty(0)] * 3
        self._point()
        self.feature_layers, self.feature_size = self._packed.struct.layers - 1, self._packed.hidden
        self._embedding = model.embed_tokens.weight.detach()
        self._tapped = np.empty(0, dtype=np.int64)

    def tap(self, layers: Sequence[int]) -> None:
        super().tap(layers)
        self._tapped = np.array(layers, dtype=np.int64)

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows)
        self._know_positions(length)

    def _know_positions(self, length: int) -> None:
        """Cosines and sines [length, D / 2] of the rotary angles."""
        if length > len(self._cosines):
            frequencies, scale = self._angles
            angles = torch.arange(2 * length).float().unsqueeze(1) * frequencies
            self._cosines, self._sines = angles.cos() * scale, angles.sin() * scale
            self._point()

    @torch.inference_mode()
    def guess(self, tokens: Tensor, counts: Sequence[int], count: int, choices: int) -> Tensor:
        found = self._chain(tokens, counts, count, choices, None, None)
        return super().guess(tokens, counts, count, choices) if found is None else found[0]

    @torch.inference_mode()
    def draw(self, tokens: Tensor, counts: Sequence[int], drawing: Drawing) -> tuple[Tensor, Tensor | None] | None:
        _, count, choices = drawing.laws.shape
        if choices > self.vocab_size or drawing.function is None:
            return None
        found = self._chain(tokens, counts, count, choices, drawing.function, drawing.asked)
        if found is None:
            return None
        chosen, number, logits = found
        return (chosen, None) if number == count else (chosen[:, :number], logits[:, None, :choices])

    @torch.inference_mode()
    def play(self, asked: Rounds, draft: CachedLM | None) -> Played | None:
        rows, drafted = len(asked.texts), asked.drafted
        more = asked.most * (drafted + 1)
        unread, other, takes = [1] * rows, None, False
        if drafted:
            if not isinstance(draft, CpuLM):
                return None
            unread, takes = [len(text) for text in asked.texts], draft.fuse is not None
            # After a draft that survived as a whole its last token and the next one are unread; beside features all are.
            most = max(drafted + 1 if takes else 2, *unread)
            other = draft._reader(rows, asked.vocab_size, most * rows, rows, more + most)
        reader = self._reader(rows, asked.vocab_size, rows * (drafted + 1), rows * (drafted + 1), more)
        if reader is None or drafted and other is None:
            return None
        # The last round of all rows may draft nothing, and take nothing.
        held = self._hold(reader, rows, max(drafted + 1, *unread) + 1 if takes else more, takes=takes)
        played = rounds.play(asked, reader, other, unread)
        self._has_played(reader)
        if self._features is not None and held is not None:
            for slot, (outputs, count) in enumerate(zip(*held, strict=True)):
                self._features.hold(slot, outputs[:count], anew=takes)
        if other is not None:
            assert isinstance(draft, CpuLM)
            draft._has_played(other)
        return played

    def _reader(self, rows: int, choices: int, tokens: int, projected: int, more: int) -> rounds.Reader | None:
        """For rounds whose passes read up to ``tokens`` tokens; each row gets room for ``more``. None: not compiled."""
        limit = MOST_TOKENS if self._others is None else self._others.least_tokens - 1
        if choices > self.vocab_size or tokens > limit:
            return None
        lengths = self.lengths[:rows]
        self._extend(lengths, [more] * rows, 0)
        cells = np.zeros(tokens, dtype=np.int64)
        first = self._described(Tokens(cells, cells, cells, np.arange(tokens) * rows // tokens), 0, True)
        following = self._described(Tokens(cells[:rows], cells[:rows], cells[:rows], np.arange(rows)), 0, True)
        width, packed, library = self._packed.head.n, self._packed, self._library
        logits, kept = torch.empty(projected, width, dtype=torch.float32), np.array(lengths, dtype=np.int64)
        given = None if self.fuse is None else torch.empty(tokens, self.fuse.k, dtype=self.dtype)
        if given is not None:
            first.features = given.data_ptr()
        reader = rounds.Reader(
            first, following, ctypes.cast(packed.reference, c_void_p), ctypes.addressof(packed.head),
            None if self.fuse is None else ctypes.addressof(self.fuse),
            *(ctypes.cast(function, c_void_p) for function in (library.forward, library.product, library.chain)),
            logits.data_ptr(), width, kept.ctypes.data, ld_x=cpu.pad(packed.hidden),
        )  # fmt: skip
        reader.kept, reader.read = (first.kept, following.kept, logits, given), kept
        return reader

    def _hold(self, reader: rounds.Reader, rows: int, most: int, *, takes: bool) -> tuple[Tensor, Integers] | None:
        """Outputs of tapped layers [B, most, F] for tokens that no drafter has taken, and of how many of each row.

        Rounds add to them; where the draft model ``takes`` them, it finds those of its unread tokens there.
        """
        if self._features is None:
            return None
        size = len(self._tapped) * self.feature_size
        outputs, counts = torch.empty(rows, most, size, dtype=self.dtype), np.zeros(rows, dtype=np.int64)
        put_out = torch.empty(reader.first.tokens, size, dtype=self.dtype)
        for slot in range(rows if takes else 0):
            for part in self._features.held(slot):
                outputs[slot, counts[slot] : counts[slot] + len(part)] = part
                counts[slot] += len(part)
        reader.first.taps, reader.first.tapped = len(self._tapped), self._tapped.ctypes.data
        reader.first.features = put_out.data_ptr()
        reader.held, reader.holding, reader.most_held = outputs.data_ptr(), counts.ctypes.data, most
        reader.feature_size, reader.feature_bytes = size, size * outputs.element_size()
        reader.kept = put_out, reader.kept
        return outputs, counts

    def _has_played(self, reader: rounds.Reader) -> None:
        self.lengths[: len(reader.read)] = reader.read.tolist()
        self.clock.add(reader.seconds)

    def _chain(
        self, tokens: Tensor, counts: Sequence[int], count: int, choices: int, function: int | None, asked: int | None
    ) -> tuple[Tensor, int, Tensor] | None:
        """Tokens [B, count] that cpu.c's ``chain`` finds, how many of a row it did, and the last logits [B, N]."""
        rows = len(tokens)
        if sum(counts) > MOST_TOKENS or self._others is not None and sum(counts) >= self._others.least_tokens:
            return None
        started = time.perf_counter()
        lengths = [length + more for length, more in zip(self.lengths[:rows], self._pending, strict=False)]
        self._extend(lengths, [more + count - 1 for more in counts], 0)
        read = _flat(tokens, lengths, counts)
        first = self._described(read, 0, True)
        following = self._described(_flat(tokens[:, :1], lengths, [1] * rows), 0, True)
        logits = torch.empty(rows, self._packed.head.n, dtype=torch.float32)
        chosen = torch.empty(rows, count, dtype=torch.long)
        self._check(first)
        self._enter(read, 0)
        number = self._library.chain(
            ctypes.byref(first), ctypes.byref(following), self._packed.reference, ctypes.c_int64(count),
            ctypes.c_int64(min(choices, self.vocab_size)), ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_void_p(chosen.data_ptr()), ctypes.c_void_p(function), ctypes.c_void_p(asked),
        )  # fmt: skip
        self._read(rows, 0, [more + min(number, count - 1) for more in counts], 0)
        self.clock.add(time.perf_counter() - started)
        return chosen, number, logits

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows, width = tokens.shape
        counts = self._counts or [width] * rows
        self._extend(lengths, counts, first)
        read = _flat(tokens, lengths, counts)
        if self._is_tree:
            read = self._as_nodes(read, lengths, first)
        if len(read.ids) == rows * width <= MOST_TOKENS:
            hidden, outputs = self._pass(read, first, needs_logits)
            self._outputs = outputs.view(rows, width, -1)
            return hidden.view(rows, width, -1)
        hidden = torch.zeros(rows * width if needs_logits else 0, cpu.pad(self._packed.hidden), dtype=self.dtype)
        outputs = torch.zeros(rows * width, len(self._tapped) * self.feature_size, dtype=self.dtype)
        cells = torch.from_numpy(read.row_of * width + read.places - np.array(lengths)[read.row_of])
        for begin in range(0, len(read.ids), MOST_TOKENS):
            states, put_out = self._pass(read.part(begin), first, needs_logits)
            outputs[cells[begin : begin + MOST_TOKENS]] = put_out
            if needs_logits:
                hidden[cells[begin : begin + MOST_TOKENS]] = states
        self._outputs = outputs.view(rows, width, -1)
        return hidden.view(rows, width, -1) if needs_logits else hidden

    def _as_nodes(self, read: Tokens, lengths: Sequence[int], first: int) -> Tokens:
        """``read`` with the positions of a tree's nodes, and what each of them sees."""
        positions, seen = read.positions.copy(), np.empty(len(read.ids), dtype=np.uint64)
        for b, length in enumerate(lengths):
            own, committed = read.row_of == b, self.lengths[first + b]
            branches = self._branches[first + b]
            positions[own] = np.array(branches.depths[length - committed :]) + committed
            seen[own] = np.array(branches.seen[length - committed :], dtype=np.uint64)
        return read._replace(positions=positions, seen=seen)

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        sources = np.array(places, dtype=np.int64)
        self._library.gather(
            self._packed.reference, ctypes.c_void_p(self.cache.address + 8 * slot * self.cache.addresses.shape[1]),
            ctypes.c_void_p(sources.ctypes.data), ctypes.c_int64(self.lengths[slot]), ctypes.c_int64(len(sources)),
        )  # fmt: skip

    def _extend(self, lengths: Sequence[int], counts: Sequence[int], first: int) -> None:
        """Make room for so many tokens more of the rows in slots ``first`` and on."""
        totals = [length + count for length, count in zip(lengths, counts, strict=True)]
        for slot, total in enumerate(totals, first):
            self.cache.extend(slot, total)
        self._know_positions(max(totals))

    def _pass(self, read: Tokens, first: int, needs_logits: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [M, pad(H)], valid until the next pass, and outputs of tapped layers [M, taps * H]."""
        count = len(read.ids)
        outputs = torch.empty(count, len(self._tapped) * self.feature_size, dtype=self.dtype)
        described = self._described(read, first, needs_logits)
        described.taps, described.tapped = len(self._tapped), self._tapped.ctypes.data
        described.features = outputs.data_ptr()
        self._check(described)
        self._enter(read, first)
        if self._others is not None and count >= self._others.least_tokens:
            self._others.forward(described, self._packed, *self._scratch)
        else:
            self._library.forward(ctypes.byref(described), self._packed.reference)
        return self._scratch[1][:count, : cpu.pad(self._packed.hidden)], outputs

    def _enter(self, read: Tokens, first: int) -> None:
        """A pass over these tokens, of slots ``first`` and on, begins."""

    def _check(self, described: cpu.Pass) -> None:
        if not self._library.readable(ctypes.byref(described), self._packed.reference):
            raise PromptError(f"a token id is not in the vocabulary; ids must be from 0 to {self.vocab_size - 1}")

    def _described(self, read: Tokens, first: int, needs_logits: bool) -> cpu.Pass:
        """The pass over these tokens as the compiled functions want it."""
        packed, count, low = self._packed, len(read.ids), int(read.row_of[0])
        rows = int(read.row_of[-1]) + 1 - low
        whole = np.empty(4 * count + 2 * rows + 1, dtype=np.int64)  # one array: asking for addresses takes time
        whole[:count], whole[count : 2 * count] = read.ids, read.positions
        whole[2 * count : 3 * count], whole[3 * count : 4 * count] = read.places, read.row_of - low
        whole[4 * count : 4 * count + rows + 1] = np.searchsorted(read.row_of, np.arange(low, low + rows + 1))
        whole[4 * count + rows + 1 :] = self.lengths[first + low : first + low + rows]
        here, stride = whole.ctypes.data, self.cache.addresses.shape[1]
        self._make_room(count)
        described = cpu.Pass(
            count, here, here + 8 * count, here + 16 * count, here + 24 * count, rows, here + 32 * count,
            self.cache.address + 8 * (first + low) * stride, stride,
            None if read.seen is None else read.seen.ctypes.data, here + 8 * (4 * count + rows + 1),
            *self._pointers, packed.widest_input, packed.widest_output,
            int(needs_logits), 0, None, None, cpu.threads_for(count * packed.multiplications),
        )  # fmt: skip
        described.kept = whole, read.seen
        return described

    def _make_room(self, count: int) -> None:
        """Scratch for passes of ``count`` tokens: residual stream, inputs and outputs of products."""
        if len(self._scratch[0]) < count:
            packed = self._packed
            widths = (cpu.pad(packed.hidden), packed.widest_input, packed.widest_output)
            dtypes = (torch.float32, self.dtype, torch.float32)
            self._scratch = [torch.zeros(count, n, dtype=t) for n, t in zip(widths, dtypes, strict=True)]
            self._point()

    def _point(self) -> None:
        """Note the addresses of what passes read and write besides weights and cache."""
        self._pointers = [part.data_ptr() for part in (self._cosines, self._sines, *self._scratch)]

    def _head(self, hidden: Tensor) -> Tensor:
        flat, head = hidden.reshape(-1, hidden.shape[-1]), self._packed.head
        logits = torch.empty(len(flat), head.n, dtype=torch.float32)
        cpu.product(self._library, head, flat, logits)
        return logits.view(*hidden.shape[:-1], head.n)[..., : self.vocab_size]

    def read_bandwidth(self) -> float:
        return max(super().read_bandwidth(), cpu.read_bandwidth())

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self._embedding)

    def embedding(self) -> Tensor:
        return self._embedding

    def project(self, hidden: Tensor) -> Tensor:
        return self._head(torch.nn.functional.pad(hidden, (0, cpu.pad(self._packed.hidden) - hidden.shape[-1])))


def _flat(tokens: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tokens:
    """Every real token of tokens [B, T], row after row; each follows the one before it."""
    rows, width = tokens.shape
    row_of, offsets = _grid(rows, width)
    ids = tokens.numpy().ravel()
    if min(counts) < width:
        real = np.nonzero(offsets < np.array(counts)[row_of])[0]
        row_of, offsets, ids = row_of[real], offsets[real], ids[real]
    places = np.array(lengths)[row_of] + offsets
    return Tokens(ids, places, places, row_of)


@lru_cache(maxsize=256)
def _grid(rows: int, width: int) -> tuple[Integers, Integers]:
    """Row and column of every cell of a table, row after row."""
    row_of, offsets = np.divmod(np.arange(rows * width), width)
    return row_of, offsets
