"""The shape of a draft for a target that exists, and a beginning for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from specdec.nn.gpt import GPT, state_from_hf
from specdec.nn.lstm import LSTM, LSTMConfig, Trainable

SHAPES = {"wide": (1.0, 0.25), "small": (0.5, 0.25), "tiny": (0.25, 0.0)}  # of the target's width, of its layers
SHAPES["lstm"] = SHAPES["small"]  # an LSTM with as many parameters as a GPT of these sizes


def draft_config(
    target: Any, shape: str, vocab_size: int, eos_token_id: int | None, context: int | None = None
) -> LlamaConfig:
    """The shape of a draft for a target with configuration ``target``.

    It reads ``context`` tokens at most, or as many as the target where that is fewer.
    """
    config = target.get_text_config(decoder=True)
    width, depth = SHAPES[shape]
    heads, hidden = config.num_attention_heads, config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if width < 1:
        hidden = max(32, int(hidden * width) // 32 * 32)
        head_dim = min(64, hidden // 2)
        heads, groups = hidden // head_dim, max(1, hidden // head_dim // 2)
        heads -= heads % groups
        intermediate = max(32, int(intermediate * width) // 32 * 32)
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = float(rope.get("rope_theta") or 10000.0) if "rope_type" in rope else 10000.0
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=max(1, round(config.num_hidden_layers * depth)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=longest if context is None else min(context, longest),
        rms_norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)) and width == 1,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def new_draft(
    target: Any, shape: str, vocab_size: int, eos_token_id: int | None, context: int | None = None
) -> Trainable:
    """A draft of that shape with random weights, for a target with configuration ``target``.

    It reads ``context`` tokens at most; an LSTM any number.
    """
    config = draft_config(target, shape, vocab_size, eos_token_id, context)
    if shape != "lstm":
        return GPT(config)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in GPT(config).parameters())
    return LSTM(LSTMConfig.with_parameters(parameters, vocab_size, eos_token_id=eos_token_id))


@torch.no_grad()
def initialise(draft: Trainable, target: PreTrainedModel | GPT, vocabulary: Tensor | None = None) -> list[str]:
    """Copy what fits of the target into the draft; the names of the draft's weights that were copied, of an LSTM's none.

    Layers are copied, evenly spread over the target's depth, only where they are built of the same weights as ours:
    half of a layer of another architecture is worse than a random one. ``vocabulary`` [W]: the target's ids of the draft's
    tokens, where these are fewer.
    """
    if isinstance(draft, LSTM):
        return []
    own = draft.state_dict()
    state = {name: weight.float() for name, weight in target.state_dict().items() if weight.is_floating_point()}
    if not isinstance(target, GPT):
        state = state_from_hf(state, _as_deep(draft, target))
    depth = int(target.config.get_text_config(decoder=True).num_hidden_layers)
    copied = []
    for layer, source in enumerate(_spread(draft.config.num_hidden_layers, depth)):
        names = {name.removeprefix(f"layers.{layer}.") for name in own if name.startswith(f"layers.{layer}.")}
        theirs = {name.removeprefix(f"layers.{source}.") for name in state if name.startswith(f"layers.{source}.")}
        pairs = {f"layers.{layer}.{name}": state.get(f"layers.{source}.{name}") for name in names}
        if names == theirs and all(w is not None and w.shape == own[name].shape for name, w in pairs.items()):
            copied += [name for name, weight in pairs.items() if _copy(own[name], weight)]
    ends = {
        "embed_tokens.weight": target.embed_tokens if isinstance(target, GPT) else target.get_input_embeddings(),
        "lm_head.weight": target.lm_head if isinstance(target, GPT) else target.get_output_embeddings(),
    }
    for name, module in ends.items():
        weight = getattr(module, "weight", None)
        if _copy(own[name], weight if weight is None or vocabulary is None else weight[vocabulary.clamp(min=0)]):
            copied.append(name)
    if any(name.startswith("layers.") for name in copied) and _copy(own["norm.weight"], state.get("norm.weight")):
        copied.append("norm.weight")
    return sorted(copied)


def _as_deep(draft: GPT, target: PreTrainedModel) -> LlamaConfig:
    """The draft's configuration with the target's depth, so that all of the target's layers are joined."""
    config = LlamaConfig.from_dict(draft.config.to_dict())
    config.num_hidden_layers = int(target.config.get_text_config(decoder=True).num_hidden_layers)
    return config


def _copy(own: Tensor, given: Tensor | None) -> bool:
    if given is None or given.shape != own.shape:
        return False
    own.copy_(given)
    return True


def _spread(count: int, depth: int) -> Sequence[int]:
    """``count`` layers of ``depth``, evenly spread, the first and the last among them."""
    return [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
