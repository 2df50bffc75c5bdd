"""Any Hugging Face causal LM, unpatched, with a ragged cache.

Three things make rows of different lengths exact. The *cache* handed to the model is ours: its layers write each
row's keys and values at that row's own slots. *Positions* are given per row. *Masks* are the model's own: its code
hands an index-based function (causal, sliding window, chunked, ...) to the mask builder registered for its attention
implementation, and while a pass of ours runs, that builder gets the function on every row's own positions.

No architecture is named here, and one that does not play along would be wrong in silence. So a model is admitted by a
probe: some ragged passes of the model itself, compared with each row alone and without a cache.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specdec.errors import FallbackWarning, ModelError
from specdec.lm import probe
from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache
from specdec.lm.clock import Clock
from specdec.lm.encdec import EncoderDecoderLM
from specdec.lm.rowwise import MECHANISMS, RowwiseLM
from specdec.lm.weights import PackedFrom
from specdec.nn.packed import packed_copy

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> may it look there

ATTENTION = ("sdpa", "eager")  # implementations whose masks say for every pair of tokens who may look at whom
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "dummy")  # those that can forget a token
SKEW = 100_000  # tokens; beyond all thresholds at which models change what they do with long texts

_running: ContextVar[HFLM | None] = ContextVar("specdec_running", default=None)  # whose pass runs here


class HFLM(CachedLM):
    """A ``PreTrainedModel`` with a cache of ours; several of them may share one model.

    Nothing of the model, its config or its training flags is changed; passes run in evaluation mode. Raises
    ``ModelError`` for a model that cannot be decoded exactly this way, saying why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = _check_supported(model)
        super().__init__(probe.logits_width(model), probe.context_of(model), probe.device_of(model), model.dtype)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._trims_logits = "logits_to_keep" in accepted
        _stand_in_for_mask_builders()
        self._admit(model)
        self._clear()
        self.feature_layers, self.feature_size = self._layers - 1, model.get_input_embeddings().embedding_dim

    def _admit(self, model: PreTrainedModel) -> None:
        """Run a twin of ``model`` with packed weights; the model itself if that is not exact."""
        for candidate in (packed_copy(model), model):
            self.model, self.packed = candidate, candidate is not model
            self._clear()
            try:
                probe.admit(self, model, partial(_plain, model), self._more_to_ask)
                self.packed_from = PackedFrom(model) if self.packed else None
                return
            except probe.Refused:
                if not self.packed:
                    raise

    @cached_property
    def reads_trees(self) -> bool:  # type: ignore[override]
        """Asked of a second view of the model, because rows may live in this one."""
        twin = copy.copy(self)
        twin._clear()
        twin._branches, twin._features, twin.reads_trees = {}, None, True
        return self._takes_positions and probe.reads_trees(twin, self.model, partial(_plain, self.model))

    def _clear(self) -> None:
        self.lengths, self.starts, self._pending = [], [], []
        self.clock = Clock(self.device)
        self.cache = RaggedCache(self.dtype, self.device)
        self.mask_functions: list[MaskFunction] = []  # what the model has asked for in the latest pass
        self.skew = 0  # added to the length that the model is told; only the probe does
        self._hf_cache = Cache(layers=[_RaggedLayer(self, layer) for layer in range(self._layers)])

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Logits [B, T, V]; of the last token only where none are needed, because the head is inside the model."""
        self.cache.begin(lengths, tokens.shape[1], first, self._trees(first, len(tokens)))
        given: dict[str, Any] = {"past_key_values": self._hf_cache, "use_cache": True}
        if self._takes_positions:
            # Padding columns may lie past the context, where a table of positions has no row.
            given["position_ids"] = self.cache.positions.clamp(max=self.context - 1)
        if self._trims_logits and not needs_logits:
            given["logits_to_keep"] = 1
        self.mask_functions.clear()
        token = _running.set(self)
        try:
            with probe.evaluating(self.model):
                found = self.model(input_ids=tokens, return_dict=True, output_hidden_states=bool(self.tapped), **given)
            if self.tapped:
                states = [found.hidden_states[layer + 1].to(self.device) for layer in self.tapped]
                self._outputs = torch.cat(states, dim=-1)
            logits: Tensor = found.logits
            return logits.to(self.device)
        finally:
            _running.reset(token)

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def project(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    def _gather(self, slot: int, places: Sequence[int]) -> None:
        self.cache.gather(slot, places, self.lengths[slot])

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)

    def _more_to_ask(self, tokens: Tensor, logits: Tensor, limit: float) -> str | None:
        """What the probe asks of ragged passes besides their logits; the reason to refuse, or None."""
        if hidden := _hidden_window(self):
            return f"its config has {hidden} and its masks have no window, so it must have one of its own making"
        if not probe.distance(_told_another_length(self, tokens, logits), logits.float()) <= limit:
            return "its logits depend on the length of its cache, which is that of no single row"
        return None


def _plain(model: PreTrainedModel, text: Tensor, row: int) -> Tensor:
    """Logits [T, V] of ``text`` alone and without a cache."""
    return probe.plain_logits(model, text)


class _RaggedLayer(CacheLayerMixin):
    """One layer of the cache that the model sees; all state is in the ``RaggedCache`` of its ``HFLM``.

    A window lives in the mask and not here, so that forgetting is exact.
    """

    is_sliding = False

    def __init__(self, lm: HFLM, layer: int) -> None:
        super().__init__()
        self.lm, self.layer, self.is_initialized = lm, layer, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers appear with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.lm.cache.update(self.layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lm.cache.live, 0

    def get_seq_length(self) -> int:
        """Of the longest row; where a row is, only ``position_ids`` and masks tell."""
        return self.lm.cache.live - self.lm.cache.positions.shape[1] + self.lm.skew

    def get_max_length(self) -> int:
        return -1


class _RaggedMasks:
    """A mask builder of transformers that, during a pass of ours, sees every row at its own positions."""

    def __init__(self, builder: Callable[..., Any]) -> None:
        self.builder = builder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lm = _running.get()
        if lm is None or kwargs.get("allow_is_bidirectional_skip"):  # not our pass, or not a causal mask
            return self.builder(*args, **kwargs)
        mask_function: MaskFunction = kwargs["mask_function"]
        positions, visible, keys = lm.cache.positions, lm.cache.visible, lm.cache.key_positions
        lm.mask_functions.append(mask_function)

        def on_own_positions(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = visible[row, query, key]
            return mask_function(row, head, positions[row, query], key if keys is None else keys[row, key]) & seen

        ours = {"mask_function": on_own_positions, "attention_mask": None, "allow_is_causal_skip": False}
        sizes = {"q_length": positions.shape[1], "q_offset": 0, "kv_length": lm.cache.live, "kv_offset": 0}
        return self.builder(*args, **{**kwargs, **ours, **sizes})


def _stand_in_for_mask_builders() -> None:
    """Wrap the registered mask builders, once in a process; outside our passes they do what they did."""
    for name in ATTENTION:
        builder = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not isinstance(builder, _RaggedMasks):
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, _RaggedMasks(builder))


# --- Which way a model is run


def hf_lm(model: PreTrainedModel) -> CachedLM:
    """``model`` with a cache, in the fastest way that the probe finds exact; ``mechanism`` says which.

    "ragged": one pass for all rows. "row by row": a pass per row, with the model's own cache. "token by token": a pass
    per token. "whole rows": a pass per row over all of its text, without a cache. Anything but the first is said once
    per class, with ``FallbackWarning``.
    Raises ``ModelError`` for a model that none of them runs exactly.
    """
    if model.get_output_embeddings() is None:
        raise _refused(model, "it has no language-model head. Load it with AutoModelForCausalLM")
    encodes = model.config.is_encoder_decoder
    ways: list[Callable[[], CachedLM]] = [] if encodes else [partial(HFLM, model)]
    ways += [partial(EncoderDecoderLM if encodes else RowwiseLM, model, mechanism) for mechanism in MECHANISMS]
    refused: list[probe.Refused] = []
    for way in ways:
        try:
            lm = way()
        except probe.Refused as error:
            refused.append(error)
            continue
        if refused:
            _say_once(model, lm.mechanism, refused[0].reason)
        return lm
    reasons = "; ".join(f"{error.mechanism}: {error.reason}" for error in refused)
    raise ModelError(
        f"{type(model).__name__} cannot be decoded exactly in any way. {reasons}. "
        "What specdec cannot run, transformers' own generate can"
    )


_said: set[tuple[type, str]] = set()  # fall-backs that this process has been told of


def _say_once(model: PreTrainedModel, mechanism: str, reason: str) -> None:
    if (type(model), mechanism) not in _said:
        _said.add((type(model), mechanism))
        message = (
            f"{type(model).__name__} is decoded {mechanism}, which is exact, and slower than in one pass for all rows"
        )
        message += f" ({reason})"
        warnings.warn(message, FallbackWarning, stacklevel=3)


# --- What can be told without running a model


def _check_supported(model: PreTrainedModel) -> int:
    """Refuse what is known not to work; the number of layers of all others."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refused(model, "it is an encoder-decoder")
    if model.get_output_embeddings() is None:
        raise _refused(model, "it has no language-model head. Load it with AutoModelForCausalLM")
    if config._attn_implementation not in ATTENTION:
        raise _refused(
            model,
            f"its attention is {config._attn_implementation!r}, not one of {', '.join(ATTENTION)}. "
            'Load it with attn_implementation="sdpa"',
        )
    layer_types = get_layer_types_and_kwargs(config)[0]
    others = sorted(set(layer_types) - set(LAYER_TYPES))
    if others or model._is_stateful:
        raise _refused(
            model,
            f"its layers of type {', '.join(others) or 'recurrent'} keep a state that cannot forget a token; "
            f"allowed are {', '.join(LAYER_TYPES[:-1])}",
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _refused(model, "its forward pass takes no past_key_values, so that it cannot remember what it has read")
    return len(layer_types)


def _refused(model: PreTrainedModel, reason: str) -> probe.Refused:
    return probe.Refused(model, reason, HFLM.mechanism)


# --- What only running it tells


def _told_another_length(lm: HFLM, tokens: Tensor, logits: Tensor) -> Tensor:
    """The last pass again, with the same positions, by a model that believes its cache to be much longer.

    Those that only size a mask by it, which is then thrown away, may fail: they give ``logits``.
    """
    lm.skew = SKEW
    try:
        return lm.append(tokens)
    except RuntimeError:
        return logits


def _hidden_window(lm: HFLM) -> str | None:
    """Name of a window in the config that none of the model's mask functions knows.

    Windows are longer than the probe, so that what it reads cannot tell whether they are applied as they should.
    """
    config = lm.model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None) is not None:
        return None  # says itself which layers have one, and those ask for such masks
    zero = torch.zeros((), dtype=torch.long, device=lm.device)
    for name, window in config.to_dict().items():
        if name.endswith(probe.WINDOWS) and type(window) is int:
            seen = [bool(mask(zero, zero, zero + window, zero)) for mask in lm.mask_functions]
            if 0 < window < lm.context and all(seen):
                return f"{name} of {window}"
    return None
