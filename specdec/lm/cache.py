"""Keys and values of rows of different lengths, in one preallocated buffer per layer.

Every row starts at slot 0 and owns its length: nothing is padded, shifted or realigned, and forgetting a token is
not counting it. Buffers are zero-filled, because attention multiplies masked places by 0 and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec.tree import Branches

BLOCK = 64  # live lengths are rounded up to it: kernels are prepared per shape, which may take as long as a small pass


class Memory(Protocol):
    """What is kept of rows, in slots; as ``RaggedCache`` does."""

    def reserve(self, rows: int, length: int, /) -> None:
        """Make room for so many rows of so many tokens."""

    def copy(self, source: int, target: int, length: int, /) -> None:
        """Slot ``target`` becomes the first ``length`` tokens of slot ``source``."""

    def wipe(self, first: int, last: int, /) -> None:
        """Nothing is left in slots ``first`` to ``last`` (exclusive)."""


class RaggedCache:
    """Buffers [rows, heads, capacity, head size] per layer, and the view of them that one forward pass uses.

    Shapes: B rows of the pass, T new tokens, G heads, D head size, L length of the longest live row. Layers appear
    with their first ``update``, so any model may use the cache without describing itself; each lives where its keys do.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.rows = self.capacity = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for ``rows`` rows of ``capacity`` tokens; what is stored stays."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        self.rows, self.capacity = max(rows, self.rows), max(capacity, self.capacity)
        for layer, pair in self.layers.items():
            self.layers[layer] = (self._grown(pair[0]), self._grown(pair[1]))

    def begin(
        self, lengths: list[int], new_tokens: int, first: int, trees: Sequence[tuple[int, Branches]] | None = None
    ) -> None:
        """Open a pass over rows ``first, first + 1, ...`` that hold ``lengths`` tokens and get ``new_tokens`` more.

        ``trees``: per row, how many of its tokens are committed, and how all others hang together, new ones included.
        """
        self.first, self.last = first, first + len(lengths)
        self.reserve(self.last, max(lengths) + new_tokens)
        self.live = min(-(-(max(lengths) + new_tokens) // BLOCK) * BLOCK, self.capacity)
        starts = torch.tensor(lengths, device=self.device).unsqueeze(1)
        self._places = self.positions = starts + torch.arange(new_tokens, device=self.device)
        self.key_positions: Tensor | None = None  # [B, L], where keys do not lie in the order of their positions
        self._visible = torch.arange(self.live, device=self.device) <= self.positions.unsqueeze(-1)
        if trees is not None:
            self._branch(trees, lengths)
        self._slots: dict[tuple[int, torch.device], Tensor] = {}
        self._bias: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """Which cached tokens each new one may look at: all up to itself, [B, T, L] bool; in a tree, its ancestors."""
        return self._visible

    @property
    def bias(self) -> Tensor:
        """``visible`` as an additive mask in the cache's dtype: 0 or -inf."""
        if self._bias is None:
            zeros = torch.zeros(self.visible.shape, dtype=self.dtype, device=self.device)
            self._bias = zeros.masked_fill_(~self.visible, float("-inf"))
        return self._bias

    def _branch(self, trees: Sequence[tuple[int, Branches]], lengths: Sequence[int]) -> None:
        """Positions and masks of rows whose uncommitted tokens are trees."""
        self.positions, self._visible = self._places.clone(), self._visible.clone()
        self.key_positions = torch.arange(self.live, device=self.device).repeat(len(trees), 1)
        for b, (committed, tree) in enumerate(trees):
            new = slice(lengths[b] - committed, len(tree))
            depths = committed + torch.tensor(tree.depths, device=self.device)
            seen = torch.tensor(tree.seen, device=self.device)[new, None] >> torch.arange(len(tree), device=self.device)
            count = new.stop - new.start
            self.positions[b, :count] = depths[new]
            self.key_positions[b, committed : committed + len(tree)] = depths
            self._visible[b, :count, committed : committed + len(tree)] = (seen & 1).bool()
            self._visible[b, :count, committed + len(tree) :] = False

    def gather(self, slot: int, places: Sequence[int], begin: int) -> None:
        """The tokens at ``places`` of row ``slot`` move to its places from ``begin`` on."""
        sources = torch.tensor(places, device=self.device)
        for pair in self.layers.values():
            for buffer in pair:
                buffer[slot, :, begin : begin + len(places)] = buffer[slot].index_select(1, sources.to(buffer.device))

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, D] at each row's own slots; return the rows' views [B, G, L, D]."""
        if layer not in self.layers:
            self.layers[layer] = (self._new(keys), self._new(values))
        stored = self.layers[layer]
        for buffer, new in zip(stored, (keys, values), strict=True):
            heads, size = new.shape[1], new.shape[3]
            buffer.view(-1, size).index_copy_(
                0, self._slots_of(heads, new.device), new.reshape(-1, size).to(buffer.dtype)
            )
        return (
            stored[0][self.first : self.last, :, : self.live],
            stored[1][self.first : self.last, :, : self.live],
        )

    def copy(self, source: int, target: int, length: int) -> None:
        """Row ``target`` becomes the first ``length`` tokens of row ``source``."""
        for pair in self.layers.values():
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]
                buffer[target, :, length:] = 0

    def wipe(self, first: int, last: int) -> None:
        """Zero rows ``first`` to ``last`` (exclusive), so that nothing of them can leak into their successors."""
        for pair in self.layers.values():
            for buffer in pair:
                buffer[first:last].zero_()

    def _slots_of(self, heads: int, device: torch.device) -> Tensor:
        """Flat places of the new tokens in a buffer with ``heads`` heads, [B * G * T]; shared by equal layers."""
        if (heads, device) not in self._slots:
            rows = torch.arange(self.first, self.last, device=self.device).view(-1, 1, 1)
            bases = (rows * heads + torch.arange(heads, device=self.device).view(1, -1, 1)) * self.capacity
            self._slots[heads, device] = (bases + self._places.unsqueeze(1)).reshape(-1).to(device)
        return self._slots[heads, device]

    def _new(self, like: Tensor) -> Tensor:
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _grown(self, buffer: Tensor) -> Tensor:
        rows, heads, length, size = buffer.shape
        grown = torch.zeros((self.rows, heads, self.capacity, size), dtype=buffer.dtype, device=buffer.device)
        grown[:rows, :, :length] = buffer
        return grown
