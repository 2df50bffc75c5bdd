"""Whether a way of running a Hugging Face model is exact: told by running it, not by the model's name.

Some passes as speculation makes them, with rows of different lengths and with wrong tokens read and forgotten, are
compared with what the model says to each row alone and without a cache, given the inputs that its own ``generate``
prepares.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.errors import ModelError
from specdec.lm.base import CachedLM

WINDOWS = ("window", "window_size", "attention_chunk_size")  # how configs name the tokens that a layer looks back on
UNBOUNDED = 1 << 20  # context of a model whose configuration names none

# Tokens that each of two rows keeps of each pass of the probe. The first pass is padded, the others read wrong tokens
# behind the kept ones.
KEPT = ((2, 1), (1, 3), (3, 0), (1, 3))
_WIDTH = 3
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_exact: set[tuple[object, ...]] = set()  # what the probe has found exact in this process

Plain = Callable[[Tensor, int], Tensor]  # logits [T, V] of the text [T] of row 0 or 1, alone and without a cache
Check = Callable[[Tensor, Tensor, float], str | None]  # more to ask after the last pass: its tokens, logits, the limit


def admit(
    lm: CachedLM, model: PreTrainedModel, plain: Plain, check: Check | None = None, prefixes: Sequence[int] = (0,)
) -> None:
    """Raise ``Refused`` unless the probe finds ``lm`` to give the logits of ``plain``, after prefixes of these lengths.

    Run once per class, configuration, library version and mechanism. The rows must be empty; what they read stays.
    """
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    packed = getattr(lm, "packed", False)
    key = (type(model), settings, attention, transformers.__version__, lm.dtype, lm.device.type, lm.mechanism, packed)
    if key in _exact:
        return
    try:
        reason = None
        for prefix in prefixes:
            reason = reason or _difference(lm, model, plain, check, prefix)
        reason = reason or _outside_state(model, plain, lm.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code raises on our passes is the reason to refuse it
        raise Refused(model, f"its forward pass raised {type(error).__name__}: {error}", lm.mechanism) from error
    if reason is not None:
        raise Refused(model, reason, lm.mechanism)
    _exact.add(key)


class Refused(ModelError):
    """A model that ``mechanism`` does not run exactly, and the ``reason``."""

    def __init__(self, model: PreTrainedModel, reason: str, mechanism: str) -> None:
        super().__init__(
            f"{type(model).__name__} cannot be decoded exactly ({mechanism}): {reason}. "
            "What specdec cannot run, transformers' own generate can"
        )
        self.reason, self.mechanism = reason, mechanism


@torch.inference_mode()
def _difference(lm: CachedLM, model: PreTrainedModel, plain: Plain, check: Check | None, prefix: int) -> str | None:
    """How two rows in passes of ``lm`` differ from each of them alone and without a cache; None when they do not."""
    texts = random_tokens(model, 2, prefix + sum(kept[0] for kept in KEPT), seed=0).to(lm.device)
    expected = torch.stack([plain(text, row).float() for row, text in enumerate(texts)])
    if expected.shape[1:] != (texts.shape[1], lm.vocab_size):
        return f"its logits are {list(expected.shape[1:])} where {[texts.shape[1], lm.vocab_size]} was expected"
    limit = tolerance(lm) * float((expected - expected.mean(-1, keepdim=True)).square().mean().sqrt())
    lm.reserve(2, texts.shape[1])
    for slot in (0, 1) if prefix else ():
        lm.restart(slot, 0)
        lm.fill([texts[slot, :prefix].tolist()], first=slot)
    for turn, kept in enumerate(KEPT):
        tokens = random_tokens(model, 2, _WIDTH, seed=1 + turn).to(lm.device)
        for row, count in enumerate(kept):
            tokens[row, :count] = texts[row, lm.lengths[row] : lm.lengths[row] + count]
        logits = lm.append(tokens, kept if turn == 0 else None)
        for row, count in enumerate(kept):
            error = distance(logits[row, :count], expected[row, lm.lengths[row] : lm.lengths[row] + count])
            if not error <= limit:
                return (
                    f"logits of {lm.mechanism} passes differ by {error:.2g} from those of each row alone, "
                    f"allowed {limit:.2g}"
                )
        lm.keep(kept if turn < len(KEPT) - 1 else (0, 0))
    return check(tokens, logits, limit) if check is not None else None


TREE = (-1, 0, 0, 1, 2, 4)  # parents of a small tree: two branches of unequal depth


@torch.inference_mode()
def reads_trees(lm: CachedLM, model: PreTrainedModel, plain: Plain) -> bool:
    """Whether nodes of a tree get the logits of their own path, and what follows the path that is kept."""
    text = random_tokens(model, 1, 3, seed=0)[0].tolist()
    nodes = random_tokens(model, 1, len(TREE), seed=1)[0].tolist()
    path = [0, 2, 4, 5]  # not the one that was read first
    whole = torch.tensor([*text, *(nodes[place] for place in path)], device=lm.device)
    try:
        lm.reserve(2, len(text) + len(nodes) + 2)
        lm.fill([text])
        tree = lm.append(torch.tensor([nodes], device=lm.device), parents=[TREE])[0, path]
        lm.keep([len(path)], paths=[path])
        after = lm.append(whole[None, -1:])[0]
        expected = plain(torch.cat([whole, whole[-1:]]), 0).float()[len(text) :]
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model's code that does not know such masks
        return False
    limit = tolerance(lm) * float((expected - expected.mean(-1, keepdim=True)).square().mean().sqrt())
    return distance(torch.cat([tree, after]), expected) <= limit


@torch.inference_mode()
def _outside_state(model: PreTrainedModel, plain: Plain, device: torch.device) -> str | None:
    """The reason to refuse a model that remembers what it has read in its modules, where rows cannot be told apart."""
    if not _module_tensors(model):
        return None
    found = []
    for seed in (0, 1):
        plain(random_tokens(model, 1, _WIDTH, seed=seed)[0].to(device), 0)
        found.append({name: tensor.clone() for name, tensor in _module_tensors(model).items()})
    for name, tensor in found[0].items():
        if name in found[1] and not torch.equal(tensor, found[1][name]):
            return f"it keeps what it has read in {name} and not in a cache, so that rows could not be told apart"
    return None


def _module_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules have as attributes or buffers, weights aside."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_meta:
                found[f"{name}.{attribute}"] = value
    return found


def windows(model: PreTrainedModel, most: int = 4096) -> list[int]:
    """Windows and chunks that the config names, as far as a probe can reach beyond them."""
    config = model.config.get_text_config(decoder=True)
    found = {value for name, value in config.to_dict().items() if name.endswith(WINDOWS) and type(value) is int}
    return sorted(value for value in found if 0 < value <= min(most, context_of(model) - 20))


def plain_logits(model: PreTrainedModel, text: Tensor) -> Tensor:
    """Logits [T, V] of ``text`` [T] from one pass without a cache over what the model's own ``generate`` prepares."""
    tokens = text[None]
    mask = torch.ones_like(tokens)
    given: dict[str, Any] = {"use_cache": False, "is_first_iteration": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(len(text), device=text.device)[None]
    inputs = model.prepare_inputs_for_generation(tokens, attention_mask=mask, **given)
    if inputs.get("logits_to_keep"):
        inputs["logits_to_keep"] = 0  # all of them
    with evaluating(model):
        logits: Tensor = model(**inputs, return_dict=True).logits
    return logits[0].to(text.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while a pass runs; modules that were training are training again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its tokens, also when its layers are spread over devices or offloaded."""
    places = getattr(model, "hf_device_map", None)
    if not places:
        return model.device
    embeddings = model.get_input_embeddings()
    if not embeddings.weight.is_meta:
        return embeddings.weight.device
    running = [place for place in places.values() if place not in ("cpu", "disk")]
    return torch.device(running[0] if running else "cpu")


def logits_width(model: PreTrainedModel) -> int:
    """Entries of the model's logits."""
    width = getattr(model.get_output_embeddings(), "out_features", None)
    return int(width or model.config.get_text_config(decoder=True).vocab_size)


def context_of(model: PreTrainedModel) -> int:
    """Positions up to which a row's logits depend on that row alone.

    With longrope one row past the length of the pretraining changes the rotary frequencies of the whole batch.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    settings = getattr(config, "rope_parameters", None) or {}
    for rope in [settings, *(part for part in settings.values() if isinstance(part, dict))]:  # or one per layer type
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=UNBOUNDED)


def distance(logits: Tensor, expected: Tensor) -> float:
    """Root mean square over the vocabulary, of the worst position."""
    errors = (logits.float() - expected).square().mean(-1).sqrt()
    return float(errors.max()) if errors.numel() else 0.0


def tolerance(lm: CachedLM) -> float:
    """Rounding error allowed, relative to the spread of the logits."""
    coarse = lm.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[torch.bfloat16 if coarse else lm.dtype]


def random_tokens(model: PreTrainedModel, rows: int, width: int, *, seed: int) -> Tensor:
    """Random ids, without those that the config gives a meaning of their own (padding, images, ...)."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    size = model.get_input_embeddings().num_embeddings
    ordinary = torch.tensor([token for token in range(size) if token not in special] or list(range(size)))
    return ordinary[torch.randint(len(ordinary), (rows, width), generator=torch.Generator().manual_seed(seed))]
