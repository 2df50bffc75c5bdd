"""One Llama-style decoder that trains and decodes, and reads and writes Hugging Face checkpoints.

RMSNorm, rotary positions, SwiGLU, grouped-query attention, tied or untied head: `transformers`'
``modeling_llama.py`` is the reference, and Mistral, Qwen2 and Qwen3 are the same but for what ``parts`` lists. Query,
key and value (and gate and up) are one matrix each here, because a decoding step is bound by the number of launches;
``state_to_hf`` and ``state_from_hf`` split and join them.

Shapes: B rows, T tokens, H query heads, G key/value heads, D head size, L cache length, V vocabulary.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.errors import ModelError
from specdec.nn import train
from specdec.nn.attention import Pattern
from specdec.nn.causal import causal_attention
from specdec.nn.documents import Documents

Config: TypeAlias = LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config
FAMILIES = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
STATIC_ROPE = ("default", "linear", "llama3")  # those whose frequencies do not depend on the sequence length


class Cache(Protocol):
    """What attention needs of a cache during one forward pass."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, D]; return all of the rows' so far, [B, G, L, D]."""

    @property
    def bias(self) -> Tensor:
        """What to add to attention scores: 0 where a query may look, -inf elsewhere, [B, T, L]."""

    @property
    def positions(self) -> Tensor:
        """Position of every new token in its row, [B, T]."""


class Parts(NamedTuple):
    """Weights that the blocks of some families have and those of others lack."""

    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    head_norms: bool


def parts(config: Config) -> Parts:
    """The optional weights of this configuration's blocks."""
    # By class, not by field: a config.json may hold fields that its family's own code never reads.
    biased = isinstance(config, LlamaConfig | Qwen3Config) and config.attention_bias
    return Parts(
        qkv_bias=biased or isinstance(config, Qwen2Config),
        o_bias=biased,
        mlp_bias=isinstance(config, LlamaConfig) and config.mlp_bias,
        head_norms=isinstance(config, Qwen3Config),
    )


def head_size(config: Config) -> int:
    """Channels of a head; Qwen2's configurations do not name them."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; ``q_norm`` and ``k_norm`` are None in families without them."""

    def __init__(self, config: Config, layer: int, dropout: float, pattern: Pattern | None) -> None:
        super().__init__()
        has = parts(config)
        self.layer, self.dropout, self.pattern = layer, dropout, pattern
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_size(config)
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=has.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=has.o_bias)
        self.q_norm = train.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if has.head_norms else None
        self.k_norm = train.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if has.head_norms else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None, documents: Documents | None
    ) -> Tensor:
        rows, length, _ = x.shape
        heads = self.qkv_proj(x).view(rows, length, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = heads.split([self.heads, self.groups, self.groups], dim=2)
            heads = torch.cat([self.q_norm(queries), self.k_norm(keys), values], dim=2)
        dropout = self.dropout if self.training else 0.0
        if cache is None and self.pattern is None and not dropout:
            sizes = None if documents is None else documents.sizes
            if (mixed := train.attention(heads, self.groups, rope, sizes)) is not None:
                return self.o_proj(mixed.flatten(2))
        turned, values = heads.split([self.heads + self.groups, self.groups], dim=2)
        queries, keys = rotate(turned, *rope).split([self.heads, self.groups], dim=2)
        if documents is not None:
            mixed = documents.attend(queries, keys, values, dropout)
            return self.o_proj(mixed.reshape(rows, length, -1))
        queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        if self.pattern is not None:
            mixed = self._by_pattern(self.pattern, queries, keys, values, cache).transpose(1, 2)
        elif cache is None:
            mixed = causal_attention(queries, keys, values, dropout).transpose(1, 2)
        else:
            keys, values = cache.update(self.layer, keys, values)
            mixed = attend(queries, keys, values, cache.bias)
        return self.o_proj(mixed.reshape(rows, length, -1))

    def _by_pattern(
        self, pattern: Pattern, queries: Tensor, keys: Tensor, values: Tensor, cache: Cache | None
    ) -> Tensor:
        """[B, H, T, D]; every query head gets the keys and values of its group."""
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        keys, values = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (keys, values))
        if cache is None:
            return pattern.attend(queries, keys, values)
        return pattern.reference(queries, keys, values, cache.positions)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        bias = parts(config).mlp_bias
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(train.swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: Config, layer: int, dropout: float, pattern: Pattern | None = None) -> None:
        super().__init__()
        self.input_layernorm = train.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer, dropout, pattern)
        self.post_attention_layernorm = train.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None, documents: Documents | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache, documents))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class GPT(nn.Module):
    """A causal language model. ``config`` is Hugging Face's, one of ``FAMILIES``; ``dropout`` acts in training only.

    ``pattern``: what its attention looks at, if not at everything before a token. No checkpoint can say that.
    """

    def __init__(self, config: Config, dropout: float = 0.0, pattern: Pattern | None = None) -> None:
        super().__init__()
        _check_supported(config)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pattern = pattern
        self.layers = nn.ModuleList(Block(config, i, dropout, pattern) for i in range(config.num_hidden_layers))
        self.norm = train.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Not a buffer: a model moved to bfloat16 must keep its angles in float32.
        self.frequencies, self.rope_scale = rope_frequencies(config)
        self.apply(self._initialise)

    def forward(self, tokens: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        """Hidden states after the last norm, [B, T, hidden], of tokens [B, T]. Without a cache: causal, from 0.

        ``documents``, for training only: where several texts share a row. ``lm_head`` turns hidden states into logits;
        callers choose the positions whose logits they need.
        """
        known = documents if cache is None else cache
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if known is None else known.positions
        x = self.dropout(self.embed_tokens(tokens))
        rope = self._rope(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, documents)
        return self.norm(x)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self.frequencies = self.frequencies.to(positions.device)
        return rotary(positions, self.frequencies, self.rope_scale, dtype)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def rotary(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, D] of the rotary angles, computed in float32 as the reference does."""
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads [B, T, N, D] (Su et al. 2021), in Hugging Face's half-split layout."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of queries [B, H, T, D] over a cache [B, G, L, D] with additive bias [B, T, L]; [B, T, H, D].

    Query heads of a group are stacked along T, so that keys and values are read once and never repeated: on CPU two
    to four times faster than scaled_dot_product_attention at decoding's few queries.
    """
    rows, heads, length, head_dim = queries.shape
    groups = keys.shape[1]
    queries = queries.reshape(rows, groups, -1, head_dim) * head_dim**-0.5
    scores = (queries @ keys.transpose(-1, -2)).view(rows, groups, heads // groups, length, -1)
    weights = (scores + bias[:, None, None]).softmax(-1, dtype=torch.float32).to(values.dtype)
    mixed = weights.view(rows, groups, -1, keys.shape[2]) @ values
    return mixed.view(rows, heads, length, head_dim).transpose(1, 2)


def why_unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model with this configuration cannot run in ``GPT``; None when it can."""
    if type(config) not in FAMILIES:  # a subclass may change anything
        return f"it is none of {', '.join(family.__name__ for family in FAMILIES)}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its attention has a sliding window of {window}, less than its context"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "not all of its layers are of type 'full_attention'"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    if config.rope_parameters["rope_type"] not in STATIC_ROPE:
        return f"its rotary scaling {config.rope_parameters['rope_type']!r} is not one of {', '.join(STATIC_ROPE)}"
    if config.num_attention_heads % config.num_key_value_heads:
        return "its query heads are not a multiple of its key/value heads"
    return None


def _check_supported(config: PreTrainedConfig) -> None:
    if reason := why_unsupported(config):
        raise ModelError(
            f"GPT cannot run this {type(config).__name__}: {reason}; load it as a Hugging Face model instead"
        )


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels [D / 2], and the scale of cosines and sines."""
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies, float(scale)
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return config.rope_parameters["rope_theta"] ** -exponents, 1.0


_JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def state_from_hf(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """``GPT``'s state dict of a Hugging Face causal LM's: the same weights and biases, projections joined."""
    # Old checkpoints also hold rotary frequencies, which the configuration determines.
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    result = {name.removeprefix("model."): tensor for name, tensor in kept.items()}
    if config.tie_word_embeddings and "embed_tokens.weight" in result:
        result["lm_head.weight"] = result["embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for (joined, split), kind in product(_JOINED.items(), ("weight", "bias")):
            names = [f"layers.{layer}.{name}.{kind}" for name in split]
            if all(name in result for name in names):
                result[f"layers.{layer}.{joined}.{kind}"] = torch.cat([result.pop(name) for name in names])
    return result


def state_to_hf(model: GPT) -> dict[str, Tensor]:
    """The Hugging Face causal LM's state dict of a ``GPT``: projections split, tied head left out, all contiguous."""
    state = split_projections(model.state_dict(), model.config)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name if name.startswith("lm_head") else "model." + name: tensor for name, tensor in state.items()}


def split_projections(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """``state`` with the joined projections of its blocks in parts, as Hugging Face has them; all contiguous."""
    query, key = (heads * head_size(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    sizes = {
        "self_attn.qkv_proj": (query, key, key),
        "mlp.gate_up_proj": (config.intermediate_size, config.intermediate_size),
    }
    result = {}
    for name, tensor in state.items():
        joined = next((joined for joined in _JOINED if joined in name), None)
        if joined is None:
            result[name] = tensor.contiguous()
            continue
        for part, piece in zip(_JOINED[joined], tensor.split(sizes[joined]), strict=True):
            result[name.replace(joined, part)] = piece.contiguous()
    return result
