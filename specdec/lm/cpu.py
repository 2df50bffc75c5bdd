"""Our GPT on CPU: the compiled pass of nn/cpu.c over rows of different lengths, with keys and values in blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import PromptError
from specdec.lm.base import CachedLM
from specdec.lm.paged import BLOCK, PagedCache
from specdec.nn import cpu
from specdec.nn.gpt import GPT

MOST_TOKENS = 256  # of one compiled pass; more are read in several, so that what lies between layers stays in the cache

Integers = NDArray[np.int64]


class CpuLM(CachedLM):
    """A ``GPT`` with its cache. The given model is not touched: its weights are packed into copies.

    A token's logits are the same bits whatever else is read in the same pass, as long as passes are compiled ones; so
    speculation changes no text, in bfloat16 neither. Passes of many tokens go through oneDNN's products where these are
    faster (on processors with matrix units).

    Raises ``LookupError`` where nothing is compiled for this processor and dtype.
    """

    reused_tokens = BLOCK

    def __init__(self, model: GPT) -> None:
        weight = model.embed_tokens.weight
        library = cpu.kernels(weight.dtype) if weight.device.type == "cpu" else None
        if library is None:
            raise LookupError(f"no compiled pass for {weight.dtype} on {weight.device}")
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self._library, self._packed, self.config = library, cpu.CpuModel(model), model.config
        self._others = cpu.OtherProducts.where_faster(library, model)
        head_size = cpu.pad(self._packed.head_dim)
        numel = self._packed.struct.layers * self._packed.groups * 2 * BLOCK * head_size
        self.cache = PagedCache(numel, weight.dtype)
        self._angles = model.frequencies.float().cpu(), model.rope_scale
        self._cosines = self._sines = torch.empty(0, 0)
        self._scratch = [torch.empty(0)] * 3
        self._point()

    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        if self.starts[slot] == 0:
            self.cache.remember(slot, tokens[: self.lengths[slot]])

    def recall(self, slot: int, tokens: Sequence[int]) -> None:
        self.lengths[slot] = self.cache.recall(slot, tokens)

    def knows(self, tokens: Sequence[int]) -> bool:
        return self.cache.knows(tokens)

    def restart(self, slot: int, start: int) -> None:
        super().restart(slot, start)
        self.cache.drop(slot)  # others may read the blocks: what comes next goes into new ones

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

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows, width = tokens.shape
        counts = self._counts
        for b, length in enumerate(lengths):
            self.cache.extend(first + b, length + (width if counts is None else counts[b]))
        self._know_positions(max(lengths) + width)
        row_of, offsets = _grid(rows, width)
        ids = tokens.numpy().ravel()
        real = None if counts is None or min(counts) == width else np.nonzero(offsets < np.array(counts)[row_of])[0]
        if real is not None:
            row_of, offsets, ids = row_of[real], offsets[real], ids[real]
        positions = np.array(lengths)[row_of] + offsets
        if real is None and len(ids) <= MOST_TOKENS:
            return self._pass(ids, positions, row_of, first, needs_logits).view(rows, width, -1)
        hidden = torch.zeros(rows * width if needs_logits else 0, cpu.pad(self._packed.hidden), dtype=self.dtype)
        places = torch.from_numpy(np.arange(rows * width) if real is None else real)
        for begin in range(0, len(ids), MOST_TOKENS):
            part = slice(begin, begin + MOST_TOKENS)
            states = self._pass(ids[part], positions[part], row_of[part], first, needs_logits)
            if needs_logits:
                hidden[places[part]] = states
        return hidden.view(rows, width, -1) if needs_logits else hidden

    def _pass(self, ids: Integers, positions: Integers, row_of: Integers, first: int, needs_logits: bool) -> Tensor:
        """Hidden states [M, pad(H)] of M tokens, those of a row side by side; valid until the next pass."""
        packed, count, low = self._packed, len(ids), int(row_of[0])
        rows = int(row_of[-1]) + 1 - low
        whole = np.empty(3 * count + rows + 1, dtype=np.int64)  # one array, because asking for addresses takes time
        whole[:count], whole[count : 2 * count], whole[2 * count : 3 * count] = ids, positions, row_of - low
        whole[3 * count :] = np.searchsorted(row_of, np.arange(low, low + rows + 1))
        here, table = whole.ctypes.data, self.cache.addresses
        x, h, wide = self._buffers(count)
        described = cpu.Pass(
            count, here, here + 8 * count, here + 16 * count, rows, here + 24 * count,
            self.cache.address + 8 * (first + low) * table.shape[1], table.shape[1],
            *self._pointers, packed.widest_input, packed.widest_output,
            int(needs_logits), cpu.threads_for(count * packed.multiplications),
        )  # fmt: skip
        reference = ctypes.byref(described)
        if not self._library.readable(reference, packed.reference):
            raise PromptError(f"token ids must be from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        if self._others is not None and count >= self._others.least_tokens:
            self._others.forward(described, packed, x, h, wide)
        else:
            self._library.forward(reference, packed.reference)
        return h[:count, : cpu.pad(packed.hidden)]

    def _buffers(self, count: int) -> list[Tensor]:
        """Scratch for passes of ``count`` tokens: residual stream, inputs and outputs of products."""
        if len(self._scratch[0]) < count:
            packed = self._packed
            widths = (cpu.pad(packed.hidden), packed.widest_input, packed.widest_output)
            dtypes = (torch.float32, self.dtype, torch.float32)
            self._scratch = [torch.zeros(count, n, dtype=t) for n, t in zip(widths, dtypes, strict=True)]
            self._point()
        return self._scratch

    def _point(self) -> None:
        """Note the addresses of what passes read and write besides weights and cache."""
        self._pointers = [part.data_ptr() for part in (self._cosines, self._sines, *self._scratch)]

    def _head(self, hidden: Tensor) -> Tensor:
        flat, head = hidden.reshape(-1, hidden.shape[-1]), self._packed.head
        logits = torch.empty(len(flat), head.n, dtype=torch.float32)
        cpu.product(self._library, head, flat, logits)
        return logits.view(*hidden.shape[:-1], head.n)[..., : self.vocab_size]

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        for slot in range(first, last):
            self.cache.drop(slot)


@lru_cache(maxsize=256)
def _grid(rows: int, width: int) -> tuple[Integers, Integers]:
    """Row and column of every cell of a table, row after row."""
    row_of, offsets = np.divmod(np.arange(rows * width), width)
    return row_of, offsets
