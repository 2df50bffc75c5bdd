"""Small EAGLE-3 heads that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from block_toys import FeatureTable, features_of
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.eagle3_config import Eagle3Config
from specdec.nn.gpt import GPT


def disturbed(head: Eagle3Head, std: float = 0.25) -> Eagle3Head:
    """The head with weights so large that everything it reads matters."""
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(std=std) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    return head


def eagle3_head(target: GPT, *, seed: int = 0, **changes: Any) -> Eagle3Head:
    """An untrained head of ``target``, whose guesses differ from place to place."""
    torch.manual_seed(seed)
    return disturbed(Eagle3Head.for_target(target, **changes))


def trained_head(target: GPT, tokens: Tensor, updates: int, **changes: Any) -> Eagle3Head:
    """A head that has learned a little of ``tokens`` [B, T]."""
    torch.manual_seed(0)
    head = Eagle3Head.for_target(target, **changes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    features, logits = features_of(target, head.layers, tokens)
    for _ in range(updates):
        optimizer.zero_grad()
        head.loss(tokens, features, logits)[0].backward()
        optimizer.step()
    return head


def table_head(target: FeatureTable, vocab_size: int, draft_ids: Tensor | None = None, **changes: Any) -> Eagle3Head:
    """An untrained head for a table, which may guess the tokens ``draft_ids`` alone."""
    torch.manual_seed(0)
    width = target.feature_size
    decoder = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    size = vocab_size if draft_ids is None else len(draft_ids)
    return disturbed(Eagle3Head(Eagle3Config(decoder, (0,), width, size, **changes), draft_ids))
