"""The passes of a block drafter's head: over ragged buffers on torch, or compiled for the processor.

Either keeps, per slot, keys and values of the committed tokens (the context), which come as the target's features. A block
is read behind them and leaves nothing. Shapes: B rows, K places of a block, F features of a token, H hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from specdec.lm.cache import Memory, RaggedCache
from specdec.lm.cpu import CpuLM, Tokens
from specdec.nn import cpu
from specdec.nn.block import BlockHead
from specdec.nn.gpt import GPT
from specdec.nn.packed import pack_linears


class Blocks(Memory, Protocol):
    """What both ways can do."""

    def write(self, taken: Sequence[Tensor], begins: Sequence[int], first: int) -> None:
        """Features [n, F] of rows in slots ``first`` and on, of the committed tokens from ``begins[b]`` on."""

    def read(self, anchors: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states [B, K, H] of blocks that begin with ``anchors`` [B, 1], after ``lengths[b]`` committed tokens.

        They are valid until the next pass.
        """


def blocks_of(head: BlockHead) -> Blocks:
    """The passes of ``head``, compiled where that is possible; its own linear layers are packed on the way."""
    try:
        return CompiledBlocks(head)
    except LookupError:
        return TorchBlocks(head)


class TorchBlocks(RaggedCache):
    """Passes on torch, on any device."""

    def __init__(self, head: BlockHead) -> None:
        super().__init__(head.masks.dtype, head.masks.device)
        self.head = pack_linears(head)

    def write(self, taken: Sequence[Tensor], begins: Sequence[int], first: int) -> None:
        padded = pad_sequence(list(taken), batch_first=True)
        self.begin(list(begins), padded.shape[1], first)
        for layer, (keys, values) in enumerate(self.head.context(padded, self.positions)):
            self.update(layer, keys, values)

    def read(self, anchors: Tensor, lengths: list[int]) -> Tensor:
        self.begin(lengths, self.head.config.block_size, 0)
        return self.head(anchors, _BothWays(self))


class _BothWays:
    """A pass of a cache in which new tokens see all of the row and each other, later ones too."""

    def __init__(self, cache: RaggedCache) -> None:
        self.positions, self.update = cache.positions, cache.update
        is_seen = torch.arange(cache.live, device=cache.device) <= cache.positions[:, -1:]
        zeros = torch.zeros(is_seen.shape, dtype=cache.dtype, device=cache.device)
        self.bias = zeros.masked_fill_(~is_seen, float("-inf")).unsqueeze(1)


class CompiledBlocks(CpuLM):
    """Passes of nn/cpu.c: the head's layers are those of a ``GPT``, whose input are embeddings that each pass brings.

    Raises ``LookupError`` where nothing is compiled for this processor and dtype.
    """

    def __init__(self, head: BlockHead) -> None:
        with torch.device("meta"):
            shell = GPT(head.config.decoder)
        shell.layers, shell.norm = head.blocks, head.norm
        for name in ("embed_tokens", "lm_head"):  # both stay unused
            setattr(shell, name, nn.Linear(head.config.hidden_size, 1, bias=False, dtype=head.masks.dtype))
        super().__init__(shell)
        head.blocks = nn.ModuleList()  # the packed ones are enough
        for name in ("fuse", "to_context", "markov_out", "confidence"):
            setattr(head, name, cpu.CompiledLinear(self._library, getattr(head, name)))
        self.head, size = head, head.config.head_dim
        self._queries, self._keys = head.config.num_attention_heads * size, head.config.num_key_value_heads * size
        self._inputs = torch.empty(0, head.config.block_size, head.config.hidden_size, dtype=self.dtype)
        # Of a model's last layer, a pass that nobody asks for states only stores keys and values.
        self._models = [cpu.Model.from_buffer_copy(self._packed.struct) for _ in self._packed.layers]
        for layer, model in enumerate(self._models):
            model.layers = layer + 1

    def write(self, taken: Sequence[Tensor], begins: Sequence[int], first: int) -> None:
        counts = [len(features) for features in taken]
        for slot, (begin, count) in enumerate(zip(begins, counts, strict=True), first):
            if begin == 0 and count:
                self.cache.drop(slot)  # others may share what an older row has read here
        self._extend(begins, counts, first)
        places = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
        tokens = Tokens(places, places, places, np.repeat(np.arange(len(taken)), counts))
        described = self._described(tokens, first, False)
        wide, width = self._scratch[2][: len(places)], self._keys
        keys, values = self.head.context_heads(torch.cat(list(taken))).chunk(2, dim=-1)
        for layer, model in enumerate(self._models):
            here = slice(layer * width, (layer + 1) * width)
            wide[:, self._queries : self._queries + width] = keys[:, here]
            wide[:, self._queries + width : self._queries + 2 * width] = values[:, here]
            self._library.stage(
                ctypes.byref(described), ctypes.byref(model), ctypes.c_int64(layer), ctypes.c_int64(cpu.ATTEND)
            )

    def read(self, anchors: Tensor, lengths: list[int]) -> Tensor:
        rows, size = len(anchors), self.head.config.block_size
        if rows > len(self._inputs):
            masks = self.head.masks.expand(rows, -1, -1)
            self._inputs = torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1)
        self._inputs[:rows, :1] = self.head.shared.embed_tokens(anchors)
        self.lengths[:rows] = lengths
        self._extend(lengths, [size] * rows, 0)
        places = (np.array(lengths)[:, None] + np.arange(size)).ravel()
        count = len(places)
        seen = np.full(count, 2**size - 1, dtype=np.uint64)
        tokens = Tokens(np.arange(count), places, places, np.repeat(np.arange(rows), size), seen)
        self._packed.struct.embedding, self._packed.struct.vocabulary = self._inputs.data_ptr(), count
        hidden, _ = self._pass(tokens, 0, True)
        return hidden[:, : self.head.config.hidden_size].unflatten(0, (rows, size))

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        assert length is not None
        self.cache.extend(source, length)  # what is not yet taken has no place so far
        self.cache.copy(source, target, length)

    def wipe(self, first: int, last: int) -> None:
        self._wipe(first, last)
