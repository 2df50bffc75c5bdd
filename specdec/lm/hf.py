"""Any Hugging Face causal LM, unpatched, with a ragged cache.

Three things make rows of different lengths exact. The *cache* handed to the model is ours: its layers write each
row's keys and values at that row's own slots. *Positions* are given per row. *Masks* are the model's own: its code
hands an index-based function (causal, sliding window, chunked, ...) to the mask builder registered for its attention
implementation, and while a pass of ours runs, that builder gets the function on every row's own positions.

No architecture is named here, and one that does not play along would be wrong in silence. So a model is admitted by a
probe: some ragged passes of the model itself, compared with each row alone and without a cache.
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
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specdec.errors import ModelError
from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> may it look there

ATTENTION = ("sdpa", "eager")  # implementations whose masks say for every pair of tokens who may look at whom
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "dummy")  # those that can forget a token
UNBOUNDED = 1 << 20  # context of a model whose configuration names none

_running: ContextVar[HFLM | None] = ContextVar("specdec_running", default=None)  # whose pass runs here


class HFLM(CachedLM):
    """A ``PreTrainedModel`` with a cache of ours; several of them may share one model.

    Nothing of the model, its config or its training flags is changed; passes run in evaluation mode. Raises
    ``ModelError`` for a model that cannot be decoded exactly this way, saying why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = _check_supported(model)
        super().__init__(_logits_width(model), _context(model), model.device, model.dtype)
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._trims_logits = "logits_to_keep" in accepted
        _stand_in_for_mask_builders()
        self._clear()
        _admit(self)
        self._clear()

    def _clear(self) -> None:
        self.lengths, self.starts, self._pending = [], [], []
        self.forward_seconds = 0.0
        self.cache = RaggedCache(self.dtype, self.device)
        self.mask_functions: list[MaskFunction] = []  # what the model has asked for in the latest pass
        self.skew = 0  # added to the length that the model is told; only the probe does
        self._hf_cache = Cache(layers=[_RaggedLayer(self, layer) for layer in range(self._layers)])

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        """Logits [B, T, V]; of the last token only where none are needed, because the head is inside the model."""
        self.cache.begin(lengths, tokens.shape[1], first)
        given: dict[str, Any] = {"past_key_values": self._hf_cache, "use_cache": True}
        if self._takes_positions:
            # Padding columns may lie past the context, where a table of positions has no row.
            given["position_ids"] = self.cache.positions.clamp(max=self.context - 1)
        if self._trims_logits and not needs_logits:
            given["logits_to_keep"] = 1
        self.mask_functions.clear()
        token = _running.set(self)
        try:
            return _logits(self.model, tokens, given)
        finally:
            _running.reset(token)

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)


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
        positions, visible = lm.cache.positions, lm.cache.visible
        lm.mask_functions.append(mask_function)

        def on_own_positions(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask_function(row, head, positions[row, query], key) & visible[row, query, key]

        ours = {"mask_function": on_own_positions, "attention_mask": None, "allow_is_causal_skip": False}
        sizes = {"q_length": positions.shape[1], "q_offset": 0, "kv_length": lm.cache.live, "kv_offset": 0}
        return self.builder(*args, **{**kwargs, **ours, **sizes})


def _stand_in_for_mask_builders() -> None:
    """Wrap the registered mask builders, once in a process; outside our passes they do what they did."""
    for name in ATTENTION:
        builder = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not isinstance(builder, _RaggedMasks):
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, _RaggedMasks(builder))


def _logits(model: PreTrainedModel, tokens: Tensor, given: dict[str, Any]) -> Tensor:
    """The model's own logits of tokens [B, T], in evaluation mode."""
    with _evaluating(model):
        logits: Tensor = model(input_ids=tokens, return_dict=True, **given).logits
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while a pass runs; modules that were training are training again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- What can be told without running a model


def _check_supported(model: PreTrainedModel) -> int:
    """Refuse what is known not to work; the number of layers of all others."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refusal(model, "it is an encoder-decoder, and only decoder-only models can be")
    if model.get_output_embeddings() is None:
        raise _refusal(model, "it has no language-model head. Load it with AutoModelForCausalLM")
    if config._attn_implementation not in ATTENTION:
        raise _refusal(
            model,
            f"its attention is {config._attn_implementation!r}, not one of {', '.join(ATTENTION)}. "
            'Load it with attn_implementation="sdpa"',
        )
    layer_types = get_layer_types_and_kwargs(config)[0]
    others = sorted(set(layer_types) - set(LAYER_TYPES))
    if others or model._is_stateful:
        raise _refusal(
            model,
            f"its layers of type {', '.join(others) or 'recurrent'} keep a state that cannot forget a token; "
            f"allowed are {', '.join(LAYER_TYPES[:-1])}",
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "its forward pass takes no past_key_values, so that it cannot remember what it has read")
    return len(layer_types)


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot be decoded exactly in ragged batches: {reason}. "
        "What specdec cannot run, transformers' own generate can"
    )


def _logits_width(model: PreTrainedModel) -> int:
    width = getattr(model.get_output_embeddings(), "out_features", None)
    return int(width or model.config.get_text_config(decoder=True).vocab_size)


def _context(model: PreTrainedModel) -> int:
    """Positions up to which a row's logits depend on that row alone.

    With longrope one row past the length of the pretraining changes the rotary frequencies of the whole batch.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None)]
    settings = getattr(config, "rope_parameters", None) or {}
    for rope in [settings, *(part for part in settings.values() if isinstance(part, dict))]:  # or one per layer type
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=UNBOUNDED)


# --- What only running it tells

# Tokens that each of two rows keeps of each pass of the probe. The first pass is padded, the others read wrong tokens
# behind the kept ones.
_KEPT = ((2, 1), (1, 3), (3, 0), (1, 3))
_WIDTH = 3
_SKEW = 100_000  # tokens; beyond all thresholds at which models change what they do with long texts
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_exact: set[tuple[object, ...]] = set()  # what the probe has found exact in this process


def _admit(lm: HFLM) -> None:
    """Raise unless the probe, run once per class, configuration and library version, finds the model exact."""
    model = lm.model
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    key = (type(model), settings, attention, transformers.__version__, lm.dtype, lm.device.type)
    if key in _exact:
        return
    try:
        reason = _difference(lm)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code raises on our cache is the reason to refuse it
        raise _refusal(model, f"its forward pass raised {type(error).__name__}: {error}") from error
    if reason is not None:
        raise _refusal(model, reason)
    _exact.add(key)


@torch.inference_mode()
def _difference(lm: HFLM) -> str | None:
    """How two rows in ragged passes differ from each of them alone and without a cache; None when they do not."""
    texts = _random_tokens(lm.model, 2, sum(kept[0] for kept in _KEPT), seed=0).to(lm.device)
    plain = torch.stack([_logits(lm.model, text[None], {"use_cache": False})[0].float() for text in texts])
    if plain.shape[-1] != lm.vocab_size:
        return f"its logits have {plain.shape[-1]} entries where its head has {lm.vocab_size}"
    limit = _tolerance(lm) * float((plain - plain.mean(-1, keepdim=True)).square().mean().sqrt())
    lm.reserve(2, texts.shape[1])
    for turn, kept in enumerate(_KEPT):
        tokens = _random_tokens(lm.model, 2, _WIDTH, seed=1 + turn).to(lm.device)
        for row, count in enumerate(kept):
            tokens[row, :count] = texts[row, lm.lengths[row] : lm.lengths[row] + count]
        logits = lm.append(tokens, kept if turn == 0 else None)
        for row, count in enumerate(kept):
            expected = plain[row, lm.lengths[row] : lm.lengths[row] + count]
            error = _distance(logits[row, :count], expected)
            if not error <= limit:
                return (
                    f"logits of ragged passes differ by {error:.2g} from those of each row alone, allowed {limit:.2g}"
                )
        lm.keep(kept if turn < len(_KEPT) - 1 else (0, 0))
    if hidden := _hidden_window(lm):
        return f"its config has {hidden} and its masks have no window, so it must have one of its own making"
    if not _distance(_told_another_length(lm, tokens, logits), logits.float()) <= limit:
        return "its logits depend on the length of its cache, which is that of no single row"
    return None


def _told_another_length(lm: HFLM, tokens: Tensor, logits: Tensor) -> Tensor:
    """The last pass again, with the same positions, by a model that believes its cache to be much longer.

    Those that only size a mask by it, which is then thrown away, may fail: they give ``logits``.
    """
    lm.skew = _SKEW
    try:
        return lm.append(tokens)
    except RuntimeError:
        return logits


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Root mean square over the vocabulary, of the worst position."""
    errors = (logits.float() - expected).square().mean(-1).sqrt()
    return float(errors.max()) if errors.numel() else 0.0


def _hidden_window(lm: HFLM) -> str | None:
    """Name of a window in the config that none of the model's mask functions knows.

    Windows are longer than the probe, so that what it reads cannot tell whether they are applied as they should.
    """
    config = lm.model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None) is not None:
        return None  # says itself which layers have one, and those ask for such masks
    zero = torch.zeros((), dtype=torch.long, device=lm.device)
    for name, window in config.to_dict().items():
        if name.endswith(("window", "window_size", "attention_chunk_size")) and type(window) is int:
            seen = [bool(mask(zero, zero, zero + window, zero)) for mask in lm.mask_functions]
            if 0 < window < lm.context and all(seen):
                return f"{name} of {window}"
    return None


def _tolerance(lm: HFLM) -> float:
    """Rounding error allowed, relative to the spread of the logits."""
    coarse = lm.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[torch.bfloat16 if coarse else lm.dtype]


def _random_tokens(model: PreTrainedModel, rows: int, width: int, *, seed: int) -> Tensor:
    """Random ids, without those that the config gives a meaning of their own (padding, images, ...)."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    size = model.get_input_embeddings().num_embeddings
    ordinary = torch.tensor([token for token in range(size) if token not in special] or list(range(size)))
    return ordinary[torch.randint(len(ordinary), (rows, width), generator=torch.Generator().manual_seed(seed))]
