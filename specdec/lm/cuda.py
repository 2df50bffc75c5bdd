"""Our GPT on a GPU: passes of a few tokens recorded as CUDA graphs, whole drafts too; keys and values in blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.lm.paged import BLOCK, PagedCache, PagedLM
from specdec.nn import cuda
from specdec.nn.cuda import CHUNK, MOST_TOKENS, CudaModel, Pass
from specdec.nn.gpt import GPT

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of recorded passes: each is recorded for one number of rows
_MOST_GRAPHS = 256

Results = tuple[Tensor, ...]


class CudaLM(PagedLM):
    """A ``GPT`` with its cache; it shares the model's weights.

    Raises ``LookupError`` where there are no kernels for the model.
    """

    reads_trees = True

    def __init__(self, model: GPT) -> None:
        weight = model.embed_tokens.weight
        if not cuda.readable(model):
            raise LookupError(f"no kernels for {weight.dtype} on {weight.device}")
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self.model = CudaModel(model, BLOCK)
        self.cache = PagedCache(self.model.block_numel, weight.dtype, device=weight.device)
        self.feature_layers, self.feature_size = len(self.model.layers) - 1, model.config.hidden_size
        self._spare = self.cache.new_block()  # for rows that only make up the number of a recorded pass
        self._graphs = Graphs(weight.device)

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows)
        self._know_positions(length)

    def _know_positions(self, length: int) -> None:
        if self.model.know_positions(length):
            self._graphs.clear()

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows, width = tokens.shape
        counts = [width] * rows
        shape = self._shape(rows, width, max(lengths))
        numbers = self._numbers(shape, lengths, counts, first)
        taps = self.tapped
        hidden, *kept = self._graphs.run(
            ("pass", shape, taps),
            partial(_read, self.model, shape, taps),
            shape.fitted(tokens),
            torch.from_numpy(numbers),
            records=shape.is_small,
        )
        if taps:
            self._outputs = torch.cat(kept, dim=-1).view(shape.rows, width, -1)[:rows]
        return hidden.view(shape.rows, width, -1)[:rows]

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden.reshape(-1, hidden.shape[-1]))
        return logits.view(*hidden.shape[:-1], -1)

    @torch.inference_mode()
    def guess(self, tokens: Tensor, counts: Sequence[int], count: int, choices: int) -> Tensor:
        rows, width = tokens.shape
        lengths = [length + more for length, more in zip(self.lengths[:rows], self._pending, strict=False)]
        shape = self._shape(rows, width, max(lengths) + count - 1)
        if not shape.is_small:
            return super().guess(tokens, counts, count, choices)
        self._is_tree = False
        with self.clock.timed():
            numbers = self._numbers(shape, lengths, [max(width, more + count - 1) for more in counts], 0, counts)
            (chosen,) = self._graphs.run(
                ("guess", shape, count, choices),
                partial(_guess, self.model, shape, count, choices),
                shape.fitted(tokens),
                torch.from_numpy(numbers),
            )
        self._read(rows, 0, [more + count - 1 for more in counts], 0)
        return chosen[:rows].clone()

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.model.embedding)

    def project(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        blocks = [block.view(-1, BLOCK, self.model.head_dim) for block in self.cache.rows[slot]]
        found = torch.stack([blocks[place // BLOCK][:, place % BLOCK] for place in places])
        for target, kept in enumerate(found, self.lengths[slot]):
            blocks[target // BLOCK][:, target % BLOCK] = kept

    def _shape(self, rows: int, width: int, longest: int) -> Shape:
        """That of a pass over tokens [B, T] of rows that hold up to ``longest`` before it."""
        if rows * width > MOST_TOKENS:
            return Shape(rows, width, -(-(longest + width) // BLOCK) * BLOCK, self._is_tree)
        bound = CHUNK
        while bound < longest + width:
            bound *= 2
        return Shape(next(n for n in ROWS if n >= rows), width, bound, self._is_tree)

    def _numbers(
        self,
        shape: Shape,
        lengths: Sequence[int],
        room: Sequence[int],
        first: int,
        counts: Sequence[int] | None = None,
    ) -> NDArray[np.int64]:
        """What a pass is told besides its tokens; every row gets ``room`` for more of them."""
        for slot, (length, more) in enumerate(zip(lengths, room, strict=True), first):
            self.cache.extend(slot, length + more)
        self._know_positions(max(length + more for length, more in zip(lengths, room, strict=True)))
        rows = len(lengths)
        numbers = np.zeros(shape.size, dtype=np.int64)
        given = shape.parts(numbers)
        given.lengths[:rows] = lengths
        given.places[:] = given.positions[:] = given.lengths[:, None] + np.arange(shape.width)
        given.committed[:rows] = self.lengths[first : first + rows]
        given.counts[:rows] = shape.width if counts is None else counts
        known = min(given.blocks.shape[1], self.cache.addresses.shape[1])
        given.blocks[:rows, :known] = self.cache.addresses[first : first + rows, :known].view(np.int64)
        given.blocks[rows:, 0] = self._spare.data_ptr()
        for b, tree in enumerate(self._trees(first, rows) or ()):
            begin = lengths[b] - tree[0]
            here = slice(0, len(tree[1]) - begin)
            given.positions[b, here] = tree[0] + np.array(tree[1].depths[begin:])
            given.seen[b, here] = np.array(tree[1].seen[begin:], dtype=np.uint64).view(np.int64)
        return numbers


class Numbers(NamedTuple):
    """Parts of what a pass is told, numpy's or torch's: as in ``nn.cuda.Pass``, and real tokens of each row [B]."""

    places: NDArray[np.int64]
    positions: NDArray[np.int64]
    seen: NDArray[np.int64]
    lengths: NDArray[np.int64]
    committed: NDArray[np.int64]
    counts: NDArray[np.int64]
    blocks: NDArray[np.int64]


class Shape(NamedTuple):
    """What a recorded pass is recorded for: B rows of T tokens, rows of at most ``longest`` tokens, trees or chains."""

    rows: int
    width: int
    longest: int
    is_tree: bool

    @property
    def is_small(self) -> bool:
        """Whether it is worth being recorded."""
        return self.rows * self.width <= MOST_TOKENS

    @property
    def size(self) -> int:
        """How many ``Numbers`` there are."""
        return self.rows * (3 * self.width + 3 + self.longest // BLOCK)

    def parts(self, numbers: NDArray[np.int64] | Tensor) -> Numbers:
        """Views of ``numbers`` [size]."""
        table = self.rows, self.width
        sizes = [table, table, table, (self.rows,), (self.rows,), (self.rows,), (self.rows, self.longest // BLOCK)]
        found, begin = [], 0
        for size in sizes:
            end = begin + int(np.prod(size))
            found.append(numbers[begin:end].reshape(size))
            begin = end
        return Numbers(*found)

    def fitted(self, tokens: Tensor) -> Tensor:
        """tokens [b, T] as [B, T]."""
        missing = self.rows - len(tokens)
        return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens

    def described(self, ids: Tensor, given: Numbers) -> Pass:
        """The pass over ``ids`` with what it is told, on the model's device."""
        seen = given.seen if self.is_tree else None
        fixed = given.places, given.positions, given.lengths, given.committed, given.blocks
        return Pass(ids, *fixed, self.longest, seen)


def _read(model: CudaModel, shape: Shape, taps: tuple[int, ...], ids: Tensor, numbers: Tensor) -> Results:
    """Hidden states [B * T, hidden], and outputs of tapped layers."""
    hidden, kept = model.forward(shape.described(ids, shape.parts(numbers)), taps)
    return hidden, *kept


def _guess(model: CudaModel, shape: Shape, count: int, choices: int, ids: Tensor, numbers: Tensor) -> Results:
    """See ``CachedLM.guess``; [B, count]."""
    given = shape.parts(numbers)
    hidden, _ = model.forward(shape.described(ids, given))
    rows = torch.arange(shape.rows, device=ids.device)
    hidden = hidden.view(shape.rows, shape.width, -1)[rows, given.counts - 1]
    chosen = [model.logits(hidden)[:, :choices].argmax(-1, keepdim=True)]
    lengths = given.lengths + given.counts
    single = shape._replace(width=1)
    for _ in range(count - 1):
        places = lengths.unsqueeze(1)
        told = given._replace(places=places, positions=places, lengths=lengths, committed=lengths)
        hidden, _ = model.forward(single.described(chosen[-1], told))
        chosen.append(model.logits(hidden)[:, :choices].argmax(-1, keepdim=True))
        lengths = lengths + 1
    return (torch.cat(chosen, dim=1),)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Results
    results: Results


class Graphs:
    """Functions of tensors on a GPU, recorded when they are asked for again: then one call starts all their kernels.

    What ``run`` returns is valid until the same function runs again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._records = device, device.type == "cuda"
        self._asked: set[object] = set()
        self._recorded: OrderedDict[object, _Recorded] = OrderedDict()  # the latest used last
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    def clear(self) -> None:
        """Something has moved that recorded kernels read."""
        self._recorded.clear()

    def run(self, key: object, function: Callable[..., Results], *inputs: Tensor, records: bool = True) -> Results:
        """What ``function`` makes of ``inputs``; ``key`` names it and their shapes. It has no other inputs that move."""
        if not self._records:
            return function(*inputs)
        with torch.cuda.device(self._device):
            known = self._recorded.get(key)
            if known is not None:
                self._recorded.move_to_end(key)
                for kept, given in zip(known.inputs, inputs, strict=True):
                    kept.copy_(given, non_blocking=True)
                known.graph.replay()
                return known.results
            placed = [given.to(self._device, non_blocking=True) for given in inputs]
            results = function(*placed)
            if records and key in self._asked:  # its kernels are compiled by now
                self._record(key, function, placed)
            self._asked.add(key)
            return results

    def _record(self, key: object, function: Callable[..., Results], inputs: list[Tensor]) -> None:
        kept = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = function(*kept)
        self._recorded[key] = _Recorded(graph, kept, results)
        while len(self._recorded) > _MOST_GRAPHS:
            self._recorded.popitem(last=False)
