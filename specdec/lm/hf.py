"""Any Hugging Face causal LM, unpatched, with a ragged cache.

Three public extension points make it work. The *cache* handed to the model is ours: its layers write each row's keys
and values at that row's own slots. *Positions* are given per row. For *masks* the model's own code is asked: it hands
an index-based mask function (causal, sliding window, chunked, ...) to the builder registered for its attention
implementation, and while one of our passes runs, that builder evaluates the function on every row's own positions.

No architecture is named here. A model is admitted by a probe: some ragged steps on the model itself, compared with
plain forwards without a cache.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specdec.errors import ModelError
from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache

ATTENTION = ("sdpa", "eager")  # implementations whose mask builder we know how to stand in for
UNBOUNDED = 1 << 20  # context of a model whose configuration names none
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}

_pass: ContextVar[RaggedCache | None] = ContextVar("specdec_pass", default=None)
_admitted: dict[tuple[str, ...], str | None] = {}


class HFLM(CachedLM):
    """A ``PreTrainedModel`` with a cache of ours. Nothing of the model, its config or its caches is changed.

    Raises ``ModelError`` for a model that cannot be decoded exactly this way, saying why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None) or UNBOUNDED
        super().__init__(_logits_width(model), int(context), model.device, model.dtype)
        _check_supported(model)
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._trims_logits = "logits_to_keep" in accepted
        self._layers = int(config.num_hidden_layers)
        _stand_in_for_mask_builders()
        self._clear()
        self._admit()

    def _clear(self) -> None:
        self.cache = RaggedCache(self.dtype, self.device)
        self._hf_cache = Cache(layers=[_RaggedLayer(self.cache, layer) for layer in range(self._layers)])

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Logits [B, T, V]; of the last token only where none are needed, because the head is inside the model."""
        self.cache.begin(lengths, tokens.shape[1], first)
        arguments: dict[str, Any] = {"input_ids": tokens, "past_key_values": self._hf_cache, "use_cache": True}
        if self._takes_positions:
            # Padding columns may lie past the context, where a table of positions has no row.
            arguments["position_ids"] = self.cache.positions.clamp(max=self.context - 1)
        if self._trims_logits and not needs_logits:
            arguments["logits_to_keep"] = 1
        token = _pass.set(self.cache)
        try:
            with _evaluating(self.model):
                logits: Tensor = self.model(**arguments).logits
        finally:
            _pass.reset(token)
        return logits

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)

    def _admit(self) -> None:
        """Raise unless the probe, run once per class, configuration and library version, finds the model exact."""
        settings = json.dumps(self.model.config.to_dict(), sort_keys=True, default=str)
        key = (type(self.model).__qualname__, settings, transformers.__version__, str(self.dtype))
        if key not in _admitted:
            _admitted[key] = self._probe()
        reason = _admitted[key]
        if reason is not None:
            raise ModelError(
                f"{type(self.model).__name__} cannot be decoded exactly in ragged batches: {reason}. "
                "Use it with transformers' own generate"
            )

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """What differs between ragged cached steps and plain forwards; None when nothing does."""
        generator = torch.Generator().manual_seed(0)
        length = min(24, self.context)
        texts = torch.randint(self.vocab_size, (2, length), generator=generator).to(self.device)
        try:
            with _evaluating(self.model):
                plain = [self.model(input_ids=text[None], use_cache=False).logits[0].float() for text in texts]
            found = self._ragged(texts)
        except Exception as error:  # noqa: BLE001  whatever a model raises on our cache is the reason to refuse it
            return f"its forward pass raised {type(error).__name__}: {error}"
        finally:
            self.free(0)
            self._clear()
        scale = max(float(logits.std()) for logits in plain)
        for row, begin, logits in found:
            expected = plain[row][begin : begin + len(logits)]
            difference = float((logits.float() - expected).abs().max())
            if not difference <= _TOLERANCE.get(self.dtype, 1e-1) * max(scale, 1e-3):
                return f"logits differ by {difference:.2g} (their spread is {scale:.2g}) from a plain forward pass"
        return None

    def _ragged(self, texts: Tensor) -> list[tuple[int, int, Tensor]]:
        """Read two texts in steps of 3 that keep different amounts; (row, position, logits) of every step."""
        found = []
        self.reserve(2, texts.shape[1] + 3)
        self.fill([texts[0, :2].tolist(), texts[1, :5].tolist()])
        for keep in ([3, 1], [0, 3], [2, 2], [3, 1]) * 2:
            if max(self.lengths[:2]) + 3 > texts.shape[1]:
                break
            starts = list(self.lengths[:2])
            window = torch.stack([texts[row, start : start + 3] for row, start in enumerate(starts)])
            logits = self.append(window)
            found += [(row, start, logits[row]) for row, start in enumerate(starts)]
            self.keep(keep)
        return found


class _RaggedLayer(CacheLayerMixin):
    """One layer of the cache that the model sees; all state is in the shared ``RaggedCache``."""

    def __init__(self, cache: RaggedCache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer, self.is_initialized = cache, layer, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers appear with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.update(self.layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.live, 0

    def get_seq_length(self) -> int:
        return self.cache.live - self.cache.positions.shape[1]

    def get_max_length(self) -> int:
        return -1


def _stand_in_for_mask_builders() -> None:
    """Wrap the registered mask builders once; outside our passes they do what they did."""
    for name in ATTENTION:
        builder = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(builder, "specdec_original"):
            ALL_MASK_ATTENTION_FUNCTIONS[name] = _ragged_builder(builder, additive=name == "eager")


def _ragged_builder(original: Callable[..., Any], *, additive: bool) -> Callable[..., Any]:
    def build(*args: Any, mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        cache = _pass.get()
        if cache is None or mask_function is None or kwargs.get("allow_is_bidirectional_skip"):
            given = {} if mask_function is None else {"mask_function": mask_function}
            return original(*args, **given, **kwargs)
        allowed = _on_own_positions(mask_function, cache)
        if not additive:
            return allowed
        dtype = kwargs.get("dtype", torch.float32)
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)

    build.specdec_original = original  # type: ignore[attr-defined]
    return build


def _on_own_positions(mask_function: Callable[..., Any], cache: RaggedCache) -> Tensor:
    """The model's mask function on every row's own positions, [B, 1, T, L] bool; a query always sees itself."""
    queries = cache.positions[:, None, :, None]
    keys = torch.arange(cache.live, device=cache.device).view(1, 1, 1, -1)
    rows = torch.arange(len(queries), device=cache.device).view(-1, 1, 1, 1)
    heads = torch.zeros_like(rows)
    allowed: Tensor = mask_function(rows, heads, queries, keys)
    return (allowed & cache.visible.unsqueeze(1)) | (queries == keys)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while a pass runs; modules that were training are training again afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_supported(model: PreTrainedModel) -> None:
    """What can be told without running the model."""
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; specdec runs decoder-only causal language models")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head; load it as a causal language model")
    attention = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
    if attention not in ATTENTION:
        raise ModelError(
            f"{name} runs with attention {attention!r}; specdec needs one of {', '.join(ATTENTION)}. "
            'Load it with attn_implementation="sdpa"'
        )


def _logits_width(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(model.config.get_text_config(decoder=True).vocab_size)
