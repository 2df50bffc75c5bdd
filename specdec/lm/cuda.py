"""Our GPT on a GPU: passes of a few tokens recorded as CUDA graphs, whole drafts too; keys and values in blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from specdec.draws import Drawing
from specdec.graphs import Graphs, Results
from specdec.lm.base import CachedLM
from specdec.lm.paged import BLOCK, PagedCache, PagedLM
from specdec.nn import cuda
from specdec.nn.cuda import CHUNK, MOST_TOKENS, CudaModel, Pass
from specdec.nn.gpt import GPT
from specdec.rounds import Played, Rounds
from specdec.sampling import Randomness, is_law, largest

# Rows of recorded passes, and tokens of each: recording takes as long as a hundred passes, so what is in between is made up.
SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, MOST_TOKENS)
MOST_PASSES = 8  # of one chain of the target's; a row that ends in it waits for its end


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
        self._spare = self.cache.new_block()  # places count from it; rows that only make up a number have this one
        self._graphs = Graphs(weight.device)

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows)
        self._know_positions(length)

    def _know_positions(self, length: int) -> None:
        if self.model.know_positions(length):
            self._graphs.clear()

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Logits [B, T, V]; without ``needs_logits`` hidden states instead."""
        rows, width = tokens.shape
        shape = self._shape(rows, width, max(lengths))
        numbers = self._numbers(shape, lengths, [shape.width] * rows, first)
        found, *kept = self._graphs.run(
            ("pass", shape, self.tapped, needs_logits, tokens.is_cpu),
            partial(_read, self.model, self._spare, shape, self.tapped, needs_logits),
            *self._told(shape, tokens, numbers),
            records=shape.is_small,
        )
        if self.tapped:
            self._outputs = torch.cat(kept, dim=-1).view(shape.rows, shape.width, -1)[:rows, :width]
        return found.view(shape.rows, shape.width, -1)[:rows, :width].clone()  # the next such pass writes over it

    def _placed(self, tokens: Tensor) -> Tensor:
        return tokens  # those that the host knows go to the GPU with all else that a pass is told

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _told(self, shape: Shape, tokens: Tensor, numbers: NDArray[np.int64]) -> Results:
        """``numbers``, with tokens [b, T] in them, or behind them where these are on the GPU."""
        if not tokens.is_cpu:
            return torch.from_numpy(numbers), shape.fitted(functional.pad(tokens, (0, shape.width - tokens.shape[1])))
        shape.parts(numbers).ids[: len(tokens), : tokens.shape[1]] = tokens.numpy()
        return (torch.from_numpy(numbers),)

    @torch.inference_mode()
    def guess(self, tokens: Tensor, counts: Sequence[int], count: int, choices: int) -> Tensor:
        found = self._chain(tokens, counts, Chain(count, choices))
        return super().guess(tokens, counts, count, choices) if found is None else found[0].clone()

    @torch.inference_mode()
    def draw(self, tokens: Tensor, counts: Sequence[int], drawing: Drawing) -> tuple[Tensor, Tensor | None] | None:
        _, count, choices = drawing.laws.shape
        if choices > self.vocab_size:
            return None
        given = drawing.temperatures, drawing.seeds, drawing.text_lengths
        found = self._chain(tokens, counts, Chain(count, choices, True, drawing.coupled), *given)
        if found is None:
            return None
        drawing.laws.copy_(found[1])
        return found[0].clone(), None

    @torch.inference_mode()
    def play(self, asked: Rounds, draft: CachedLM | None) -> Played | None:
        if asked.drafted or self.tapped or asked.vocab_size > self.vocab_size:
            return None
        started = time.perf_counter()
        rows, count = len(asked.texts), min(MOST_PASSES, 1 << asked.most.bit_length() - 1)
        chain = Chain(count, asked.vocab_size, asked.temperatures is not None, coupled=True, is_own=True)
        given = (
            () if asked.temperatures is None else (torch.tensor(asked.temperatures), asked.seeds, asked.text_lengths)
        )
        last = torch.tensor([text[-1:] for text in asked.texts])
        found = self._chain(last, [1] * rows, chain, *given)
        if found is None:
            return None
        tokens = found[0].tolist()
        sound = min(own.index(-1) if -1 in own else count for own in tokens)
        self.keep([sound] * rows)
        found_tokens = [[own[i : i + 1] for own in tokens] for i in range(sound)]
        nothing = [[0] * rows] * sound
        return Played(found_tokens, nothing, nothing, time.perf_counter() - started)

    def _chain(self, tokens: Tensor, counts: Sequence[int], chain: Chain, *given: Tensor) -> Results | None:
        """Tokens [B, count] of a chain, and their laws if they are drawn; None where it is not worth being recorded."""
        rows, width = tokens.shape
        lengths = [length + more for length, more in zip(self.lengths[:rows], self._pending, strict=False)]
        self._is_tree = False
        asked, chain = chain.steps, chain._replace(steps=_size(chain.steps))
        shape = self._shape(rows, width, max(lengths) + chain.steps - 1)
        if not shape.is_small:
            return None
        with self.clock.timed():
            room = [max(shape.width, more + chain.steps - 1) for more in counts]
            numbers = self._numbers(shape, lengths, room, 0, counts)
            found = self._graphs.run(
                ("chain", shape, chain),
                partial(_go_on, self.model, self._spare, shape, chain),
                *self._told(shape, tokens.cpu(), numbers),
                *map(shape.fitted, given),
            )
        self._read(rows, 0, [more + asked - 1 for more in counts], 0)
        return tuple(part[:rows, :asked] for part in found)

    def embed(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.model.embedding)

    def project(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # rows of a slice may lie apart
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self.model.logits(flat).view(*hidden.shape[:-1], -1)

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
        while bound < longest + _size(width):
            bound *= 2
        return Shape(_size(rows), _size(width), bound, self._is_tree)

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
        given.committed[:rows] = self.lengths[first : first + rows]
        given.counts[:rows] = shape.width if counts is None else counts
        known = min(given.blocks.shape[1], self.cache.addresses.shape[1])
        addresses = self.cache.addresses[first : first + rows, :known].view(np.int64)
        given.blocks[:rows, :known] = (addresses - self._spare.data_ptr()) // self.dtype.itemsize
        given.seen.fill(-1)  # padding looks at all there is; at nothing, its mean would be NaN
        for b, (committed, tree) in enumerate(self._trees(first, rows) or ()):
            here = slice(lengths[b] - committed, len(tree))
            given.depths[b, : len(tree) - here.start] = tree.depths[here]
            given.seen[b, : len(tree) - here.start] = np.array(tree.seen[here], dtype=np.uint64).view(np.int64)
        return numbers


def _size(count: int) -> int:
    """The number of rows, or of tokens, that passes are recorded for which have ``count``."""
    return next(size for size in SIZES if size >= count)


class Numbers(NamedTuple):
    """Parts of what a pass is told, all arrays or all tensors: as in ``nn.cuda.Pass``, and real tokens of each row [B]."""

    lengths: Any
    committed: Any
    counts: Any
    ids: Any
    blocks: Any
    depths: Any
    seen: Any


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
        return self.rows * (3 + self.width + self.longest // BLOCK + (2 * self.width if self.is_tree else 0))

    def parts(self, numbers: NDArray[np.int64] | Tensor) -> Numbers:
        """Views of ``numbers`` [size]."""
        rows, blocks, nodes = self.rows, self.longest // BLOCK, self.width if self.is_tree else 0
        found, begin = [], 0
        for size in (1, 1, 1, self.width, blocks, nodes, nodes):
            end = begin + rows * size
            found.append(numbers[begin:end])
            begin = end
        return Numbers(*found[:3], *(part.reshape(rows, len(part) // rows) for part in found[3:]))

    def fitted(self, given: Tensor) -> Tensor:
        """given [b, ...] as [B, ...]."""
        missing = self.rows - len(given)
        return torch.cat([given, given[:1].expand(missing, *given.shape[1:])]) if missing else given

    def described(self, given: Numbers, memory: Tensor) -> Pass:
        """The pass with what it is told, on the model's device."""
        tree = (given.depths, given.seen) if self.is_tree else (None, None)
        return Pass(given.ids, given.lengths, given.committed, memory, given.blocks, self.longest, *tree)


class Chain(NamedTuple):
    """``steps`` tokens, one after another, of the first ``choices`` ids: the likeliest, or drawn (see ``Drawing``).

    Where ``is_own`` they are no guesses but the model's text: -1 stands where none can be drawn, and laws are not kept.
    """

    steps: int
    choices: int
    drawn: bool = False
    coupled: bool = False
    is_own: bool = False


def _read(
    model: CudaModel,
    memory: Tensor,
    shape: Shape,
    taps: tuple[int, ...],
    needs_logits: bool,
    numbers: Tensor,
    *ids: Tensor,
) -> Results:
    """Logits [B * T, V] or hidden states, and outputs of tapped layers."""
    told = shape.parts(numbers)
    told = told._replace(ids=ids[0]) if ids else told
    hidden, kept = model.forward(shape.described(told, memory), taps)
    return model.logits(hidden) if needs_logits else hidden, *kept


def _go_on(model: CudaModel, memory: Tensor, shape: Shape, chain: Chain, numbers: Tensor, *given: Tensor) -> Results:
    """The tokens [B, count] of ``chain``, and their laws if they are drawn."""
    told = shape.parts(numbers)
    hidden, _ = model.forward(shape.described(told, memory))
    rows = torch.arange(shape.rows, device=numbers.device)
    hidden = hidden.view(shape.rows, shape.width, -1)[rows, told.counts - 1]
    single, lengths = shape._replace(width=1), told.lengths + told.counts
    drawn = Randomness(given[1], given[2], coupled=chain.coupled) if chain.drawn else None
    chosen: list[Tensor] = []
    laws: list[Tensor] = []
    for place in range(chain.steps):
        if place > 0:
            ids = chosen[-1].clamp(min=0) if chain.is_own else chosen[-1]
            here = told._replace(ids=ids, lengths=lengths, committed=lengths)
            hidden, _ = model.forward(single.described(here, memory))
            lengths = lengths + 1
        logits = model.logits(hidden)[:, : chain.choices]
        if drawn is None:
            chosen.append(largest(logits.unsqueeze(1)) if chain.is_own else logits.argmax(-1, keepdim=True))
            continue
        # As torch divides by a number on a GPU: plain passes give the same bits.
        laws.append((logits * given[0].reciprocal().unsqueeze(1)).softmax(-1).unsqueeze(1))
        token = drawn.draft(place, laws[-1])
        chosen.append(torch.where(is_law(laws[-1]), token, -1) if chain.is_own else token)
    return torch.cat(chosen, dim=1), *([torch.cat(laws, dim=1)] if laws and not chain.is_own else [])
