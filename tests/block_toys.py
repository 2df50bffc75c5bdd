"""Small block drafters, and targets whose features they read, that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.nn.block import BlockConfig, BlockHead
from specdec.nn.gpt import GPT
from toys import TableLM


def block_head(target: GPT, size: int, *, seed: int = 0, **changes: Any) -> BlockHead:
    """An untrained head of ``target``, whose guesses differ from place to place."""
    torch.manual_seed(seed)
    return disturbed(BlockHead.for_target(target, block_size=size, markov_rank=8, **changes))


def disturbed(head: BlockHead) -> BlockHead:
    """The head with weights so large that everything it reads matters."""
    with torch.no_grad():
        for weight in head.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return head


def features_of(model: GPT, layers: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, len(layers) * H] of a GPT's layers for tokens [B, T], and its logits, without any cache."""
    found: dict[int, Tensor] = {}
    hooks = [
        model.layers[layer].register_forward_hook(lambda _, __, output, layer=layer: found.__setitem__(layer, output))
        for layer in layers
    ]
    with torch.no_grad():
        logits = model.lm_head(model(tokens))
    for hook in hooks:
        hook.remove()
    return torch.cat([found[layer] for layer in layers], dim=-1), logits


class FeatureTable(TableLM):
    """A ``TableLM`` with one layer of features: a fixed vector [H] per pair of the last two tokens."""

    feature_layers, feature_size = 1, 16

    def __init__(self, table: Tensor, context: int = 64) -> None:
        super().__init__(table, context)
        generator = torch.Generator().manual_seed(7)
        size, width = len(table), self.feature_size
        self._pairs = torch.randn(size, size, width, generator=generator)
        self._embedding = torch.randn(size, width, generator=generator)
        self._projection = torch.randn(width, size, generator=generator) * 0.3

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        logits = super()._forward(tokens, lengths, first, needs_logits=needs_logits)
        slots = torch.arange(first, first + len(tokens)).unsqueeze(1)
        positions = torch.tensor(lengths).unsqueeze(1) + torch.arange(tokens.shape[1])
        before = torch.where(positions > 0, self.memory[slots, (positions - 1).clamp(min=0)], 0)
        self._outputs = self._pairs[before, tokens]
        return logits

    def embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens]

    def project(self, hidden: Tensor) -> Tensor:
        return hidden @ self._projection

    def head(self, size: int, **changes: Any) -> BlockHead:
        """An untrained head for this target."""
        torch.manual_seed(0)
        vocab_size, width = self._embedding.shape
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
        config = BlockConfig(
            width, vocab_size, (0,), **sizes, num_hidden_layers=1, block_size=size, markov_rank=4, **changes
        )
        return disturbed(BlockHead(config))
