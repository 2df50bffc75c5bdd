"""Our GPT on torch: any device, a ragged cache, logits only where they are needed; and which way a GPT is run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from specdec.errors import FallbackWarning
from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache
from specdec.lm.cpu import CpuLM
from specdec.lm.recurrent import RecurrentLM
from specdec.lm.weights import PackedFrom
from specdec.machine import fast_dtype
from specdec.nn.cpu import kernels
from specdec.nn.gpt import GPT
from specdec.nn.lstm import LSTM
from specdec.nn.packed import pack_linears


def native_lm(model: GPT | LSTM) -> CachedLM:
    """``model`` with a cache: a GPT by code made for the processor or GPU where that is possible, else on torch."""
    lm = RecurrentLM(model) if isinstance(model, LSTM) else _gpt_lm(model)
    lm.packed_from = PackedFrom(model)
    return lm


def _gpt_lm(model: GPT) -> CachedLM:
    try:
        return _on_gpu(model) if model.embed_tokens.weight.is_cuda else CpuLM(model)
    except LookupError:
        return NativeLM(model)


def decoding_dtype(device: torch.device) -> torch.dtype:
    """The precision that a GPT decodes fastest in: on CPU bfloat16, half of what is read, where passes are compiled."""
    return torch.bfloat16 if device.type == "cpu" and kernels(torch.bfloat16) is not None else fast_dtype(device)


def _on_gpu(model: GPT) -> CachedLM:
    try:
        from specdec.lm.cuda import CudaLM
    except ImportError as error:  # torch comes without triton on some systems
        warnings.warn(f"torch runs the model, slower than its kernels would: {error}", FallbackWarning, stacklevel=3)
        raise LookupError(str(error)) from error
    return CudaLM(model)


class NativeLM(CachedLM):
    """A ``GPT`` with its cache. The given model is not touched: on CPU its projections are packed into a copy."""

    reads_trees = True

    def __init__(self, model: GPT) -> None:
        weight = model.embed_tokens.weight
        super().__init__(model.config.vocab_size, model.config.max_position_embeddings, weight.device, weight.dtype)
        self.model = pack_linears(copy.deepcopy(model).eval())
        self.cache = RaggedCache(weight.dtype, weight.device)
        self.feature_layers, self.feature_size = model.config.num_hidden_layers - 1, model.config.hidden_size
        self._put_out: dict[int, Tensor] = {}

    def tap(self, layers: Sequence[int]) -> None:
        new = set(layers) - set(self.tapped)
        super().tap(layers)
        for layer in new:
            self.model.layers[layer].register_forward_hook(partial(self._catch, layer))

    def _catch(self, layer: int, module: object, inputs: object, output: Tensor) -> None:
        self._put_out[layer] = output

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        self.cache.begin(lengths, tokens.shape[1], first, self._trees(first, len(tokens)))
        hidden: Tensor = self.model(tokens, self.cache)
        if self.tapped:
            self._outputs = torch.cat([self._put_out[layer] for layer in self.tapped], dim=-1)
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens)

    def project(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        self.cache.gather(slot, places, self.lengths[slot])

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)
