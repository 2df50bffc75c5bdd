"""Our GPT on torch: any device, a ragged cache, logits only where they are needed; and which way a GPT is run."""

from __future__ import annotations

import copy

from torch import Tensor

from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache
from specdec.lm.cpu import CpuLM
from specdec.nn.gpt import GPT
from specdec.nn.packed import pack_linears


def native_lm(model: GPT) -> CachedLM:
    """``model`` with a cache: compiled for the processor where that is possible, else on torch."""
    try:
        return CpuLM(model)
    except LookupError:
        return NativeLM(model)


class NativeLM(CachedLM):
    """A ``GPT`` with its cache. The given model is not touched: on CPU its projections are packed into a copy."""

    def __init__(self, model: GPT) -> None:
        weight = model.embed_tokens.weight
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self.model = pack_linears(copy.deepcopy(model).eval())
        self.cache = RaggedCache(weight.dtype, weight.device)

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        self.cache.begin(lengths, tokens.shape[1], first)
        return self.model(tokens, self.cache)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)
