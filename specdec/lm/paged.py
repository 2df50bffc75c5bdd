"""Keys and values of rows of different lengths, in blocks of 64 tokens: memory is what the rows' lengths sum up to.

Rows that begin alike share full blocks, which never change again; so do rows with texts that were read before, as long
as there is room to remember them. A block goes when nobody holds it any more. Where a drafter reads what layers put out,
that is remembered with a block, as long as the drafter had not taken it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from specdec.lm.base import CachedLM

BLOCK = 64  # tokens of a block; as in nn/cpu.c
REMEMBERED_BYTES = 256 * 2**20  # of blocks that no row holds


class Remembered(NamedTuple):
    """A block, and what the tapped layers put out for its tokens, [64, F], if any are tapped."""

    block: torch.Tensor
    outputs: torch.Tensor | None


class PagedCache:
    """The blocks of every row. A block holds its tokens' keys and values of all layers, ``numel`` numbers."""

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        remembered_bytes: int = REMEMBERED_BYTES,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (it never changes)
    ) -> None:
        self.numel, self.dtype, self.device = numel, dtype, device
        self.rows: list[list[torch.Tensor]] = []
        self.addresses = np.zeros((0, 0), dtype=np.uint64)  # [rows, blocks]
        self.address = 0  # of this table
        self._remembered: OrderedDict[bytes, Remembered] = OrderedDict()  # the latest used last
        self._remembered_bytes = remembered_bytes
        self.tap(0)

    def tap(self, size: int) -> None:
        """From now on, rows may come with so many outputs of layers per token; what is remembered has others, or none."""
        self._remembered.clear()
        self._most_remembered = self._remembered_bytes // ((self.numel + BLOCK * size) * self.dtype.itemsize)

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows; blocks come as tokens do."""
        self.rows.extend([] for _ in range(rows - len(self.rows)))
        self._fit(self.addresses.shape[1])

    def extend(self, slot: int, length: int) -> None:
        """Give the row in ``slot`` blocks for ``length`` tokens, zeros where they are new."""
        row, needed = self.rows[slot], -(-length // BLOCK)
        if len(row) < needed:
            new = [self.new_block() for _ in range(needed - len(row))]
            self._take(slot, row + new)

    def new_block(self) -> torch.Tensor:
        """A block without tokens."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Row ``target`` becomes the first ``length`` tokens of row ``source``: full blocks are shared, the last copied."""
        full, rest = divmod(length, BLOCK)
        blocks = self.rows[source][:full]
        if rest:
            blocks.append(self.rows[source][full].clone())
        self._take(target, blocks)

    def drop(self, slot: int) -> None:
        """The row in ``slot`` is no more."""
        self.rows[slot] = []

    def remember(self, slot: int, tokens: Sequence[int], outputs: torch.Tensor | None = None) -> None:
        """Keep the full blocks of the row in ``slot``, whose text is ``tokens``, for rows that begin alike.

        ``outputs`` [n, F]: of tapped layers, for all of them.
        """
        for i, (key, block) in enumerate(zip(_keys(tokens), self.rows[slot], strict=False)):
            if key not in self._remembered:
                own = None if outputs is None else outputs[i * BLOCK : (i + 1) * BLOCK].clone()
                self._remembered[key] = Remembered(block, own)
            self._remembered.move_to_end(key)
        while len(self._remembered) > self._most_remembered:
            self._remembered.popitem(last=False)

    def recall(self, slot: int, tokens: Sequence[int]) -> list[Remembered]:
        """Begin the row in ``slot`` with the remembered blocks of ``tokens``."""
        found = []
        for key in _keys(tokens):
            if key not in self._remembered:
                break
            self._remembered.move_to_end(key)
            found.append(self._remembered[key])
        self._take(slot, [one.block for one in found])
        return found

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether all full blocks of ``tokens`` are remembered."""
        return all(key in self._remembered for key in _keys(tokens))

    def _take(self, slot: int, blocks: list[torch.Tensor]) -> None:
        self.rows[slot] = blocks
        self._fit(len(blocks))
        self.addresses[slot, : len(blocks)] = [block.data_ptr() for block in blocks]

    def _fit(self, blocks: int) -> None:
        rows, known = self.addresses.shape
        if len(self.rows) > rows or blocks > known:
            grown = np.zeros((len(self.rows), known if blocks <= known else max(2 * known, blocks)), dtype=np.uint64)
            grown[:rows, :known] = self.addresses
            self.addresses, self.address = grown, grown.ctypes.data


class PagedLM(CachedLM):
    """A model whose ``cache`` is a ``PagedCache``."""

    reused_tokens = BLOCK
    cache: PagedCache

    def tap(self, layers: Sequence[int]) -> None:
        before = self.tapped
        super().tap(layers)
        if self.tapped != before:
            self.cache.tap(len(layers) * self.feature_size)
        self.reused_tokens = BLOCK

    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        outputs = None
        if self._features is not None:
            outputs = self._features.whole(slot, self.lengths[slot])
            if outputs is None:  # some were taken, and are known nowhere else
                return
        if self.starts[slot] == 0:
            self.cache.remember(slot, tokens[: self.lengths[slot]], outputs)

    def recall(self, slot: int, tokens: Sequence[int]) -> None:
        found = self.cache.recall(slot, tokens)
        self.lengths[slot] = len(found) * BLOCK
        outputs = [one.outputs for one in found if one.outputs is not None]
        if self._features is not None and outputs:
            self._features.hold(slot, torch.cat(outputs), anew=True)

    def knows(self, tokens: Sequence[int]) -> bool:
        return self.cache.knows(tokens)

    def restart(self, slot: int, start: int) -> None:
        super().restart(slot, start)
        self.cache.drop(slot)  # others may read the blocks: what comes next goes into new ones

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        for slot in range(first, last):
            self.cache.drop(slot)


class Window:
    """The first block and the latest ones of every row of a ``PagedCache``, as a pass sees them (attention sinks and a
    window: Xiao et al. 2023, arXiv 2309.17453)."""

    def __init__(self, cache: PagedCache, blocks: int) -> None:
        self.cache, self.blocks = cache, blocks
        self.skipped = np.zeros(0, dtype=np.int64)  # per row, tokens between the first block and the latest
        self.addresses = np.zeros((0, 1 + blocks), dtype=np.uint64)
        self.address = 0

    def extend(self, slot: int, length: int) -> None:
        """Give the row in ``slot`` room for ``length`` tokens, and look at its end."""
        self.cache.extend(slot, length)
        if len(self.skipped) < len(self.cache.rows):
            self.skipped = np.zeros(len(self.cache.rows), dtype=np.int64)
            self.addresses = np.zeros((len(self.cache.rows), 1 + self.blocks), dtype=np.uint64)
            self.address = self.addresses.ctypes.data
        end, known = -(-length // BLOCK), self.cache.addresses[slot]
        begin = max(1, end - self.blocks)
        self.addresses[slot, 0] = known[0]
        self.addresses[slot, 1 : 1 + end - begin] = known[begin:end]
        self.skipped[slot] = (begin - 1) * BLOCK


def _keys(tokens: Sequence[int]) -> Iterator[bytes]:
    """What names each full block of a text: its tokens, and all before them."""
    key = b""
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        part = np.array(tokens[end - BLOCK : end], dtype=np.int64).tobytes()
        key = hashlib.blake2b(key + part, digest_size=16).digest()
        yield key
