"""Small models that the tests share: tabular ones whose laws are known exactly, and tiny Transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from specdec.lm.base import CachedLM
from specdec.lm.native import native_lm
from specdec.nn.gpt import GPT
from specdec.nn.lstm import LSTM, LSTMConfig


class TableLM(CachedLM):
    """A language model that is a table: the logits after a text depend on its last two tokens.

    table [V, V, W]: ``table[a, b]`` are the logits after ...ab; a text of one token counts as preceded by token 0.
    It keeps the tokens of its rows as its cache, so a wrong keep, copy or restart changes its logits.
    """

    reads_trees = True

    def __init__(self, table: Tensor, context: int = 64) -> None:
        super().__init__(table.shape[-1], context, torch.device("cpu"), torch.float32)
        self.table = table
        self.memory = torch.zeros(0, 0, dtype=torch.long)

    def _reserve(self, rows: int, length: int) -> None:
        grown = torch.zeros(max(rows, len(self.memory)), max(length, self.memory.shape[1]), dtype=torch.long)
        grown[: self.memory.shape[0], : self.memory.shape[1]] = self.memory
        self.memory = grown

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows, width = tokens.shape
        self._reserve(first + rows, max(lengths) + width)
        slots = torch.arange(first, first + rows).unsqueeze(1)
        positions = torch.tensor(lengths).unsqueeze(1) + torch.arange(width)
        self.memory[slots, positions] = tokens
        previous = positions - 1
        if self._is_tree:
            for b, length in enumerate(lengths):
                committed, seen = self.lengths[first + b], self._branches[first + b].seen
                for i, bits in enumerate(seen[length - committed :]):  # the last ancestor, or the last committed token
                    ancestors = bits & ~(1 << (length - committed + i))
                    previous[b, i] = committed + ancestors.bit_length() - 1
        before = torch.where(previous >= 0, self.memory[slots, previous.clamp(min=0)], 0)
        return self.table[before, tokens]

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        begin = self.lengths[slot]
        self.memory[slot, begin : begin + len(places)] = self.memory[slot, list(places)]

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        self.memory[target, :length] = self.memory[source, :length]
        self.memory[target, length:] = 0

    def _wipe(self, first: int, last: int) -> None:
        self.memory[first:last] = 0


def random_table(vocab_size: int, seed: int, spread: float = 1.5) -> Tensor:
    """Logits [V, V, V] of a context-dependent law."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, vocab_size, vocab_size, generator=generator) * spread


def tiny_gpt(
    seed: int = 0, vocab_size: int = 61, context: int = 256, layers: int = 2, heads: tuple[int, int] = (4, 2)
) -> GPT:
    """A random GPT, with weights large enough that its greedy text does not fall into a loop at once."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8 * heads[0],
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=8,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return GPT(config).eval().requires_grad_(False)


def tiny_lstm(seed: int = 0, vocab_size: int = 61, context: int = 2**30, layers: int = 2) -> LSTM:
    """A random LSTM, with weights so large that tokens long past still have a visible effect."""
    torch.manual_seed(seed)
    model = LSTM(LSTMConfig(vocab_size, 24, layers, max_position_embeddings=context))
    for weight in model.parameters():
        weight.data.mul_(2)
    return model.eval().requires_grad_(False)


Model = TypeVar("Model", bound=nn.Module)


def noisy(model: Model, scale: float = 0.03, seed: int = 1) -> Model:
    """A copy of ``model`` with disturbed weights: a draft that is right some of the time."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in result.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator).to(weight.device) * scale)
    return result


def native(model: GPT) -> CachedLM:
    """``model`` with a cache of its own, run in the fastest way that this machine has."""
    return native_lm(model)
