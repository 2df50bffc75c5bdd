"""What an EAGLE-3 head is, in code and in config.json as the `speculators` library and vLLM write and read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from specdec.errors import ConfigError
from specdec.nn.gpt import why_unsupported
from specdec.nn.heads import feature_layers

NAME = "eagle3"  # in config.json, under "speculators_model_type"
_FAMILIES: dict[str, type[LlamaConfig | Qwen3Config]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and variants of an ``Eagle3Head``.

    decoder: of its one layer, with the target's ``vocab_size``. layers: of the target, whose outputs are read; empty in
    checkpoints that leave it to the target. has_embedding: its own, not the target's. steps: of the unrolled training
    pass, and how many tokens vLLM lets it draft. verifier, architectures: the target's name and classes, for vLLM.

    norm_before_residual: the residual stream begins with the normed hidden state. norm_before_fc, fc_norm: features are
    normed before they are fused, all of a token together or each layer's alone. norm_output: what is fed back is normed.
    """

    decoder: LlamaConfig | Qwen3Config
    layers: tuple[int, ...]
    target_hidden_size: int
    draft_vocab_size: int
    steps: int = 5
    norm_before_residual: bool = True
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    has_embedding: bool = False
    verifier: str = ""
    architectures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if reason := why_unsupported(self.decoder):
            raise ConfigError(f"the layer of an EAGLE-3 head must be one that GPT can run: {reason}")
        if self.decoder.num_hidden_layers != 1:
            raise ConfigError(f"an EAGLE-3 head has 1 layer here, got {self.decoder.num_hidden_layers}")
        if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
            raise ConfigError(
                f"draft_vocab_size must be from 1 to vocab_size {self.decoder.vocab_size}, got {self.draft_vocab_size}"
            )
        if self.steps < 1:
            raise ConfigError(f"steps of an EAGLE-3 head must be >= 1, got {self.steps}")

    @classmethod
    def for_target(cls, config: PreTrainedConfig, *, width: int = 0, **changes: Any) -> Eagle3Config:
        """For a target with this configuration, reading up to three of its layers; ``changes`` come last.

        width: of the hidden state, a multiple of 16; 0 for the target's own. A narrower head has fewer attention heads, and
        an embedding of its own.
        """
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        rope = getattr(text, "rope_parameters", None) or {}
        if width % 16 or not 0 <= width <= text.hidden_size:
            raise ConfigError(
                f"width of a head must be a multiple of 16, up to the target's {text.hidden_size}, or 0, got {width}"
            )
        if is_narrow := 0 < width < text.hidden_size:
            heads = -(-heads * width // text.hidden_size)
            groups = math.gcd(heads, groups)
            inner = -(-inner * width // text.hidden_size)
        decoder = LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=width or text.hidden_size,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
            rope_parameters={"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        found = {
            "decoder": decoder,
            "layers": feature_layers(text.num_hidden_layers),
            "target_hidden_size": text.hidden_size,
            "draft_vocab_size": text.vocab_size,
            "has_embedding": is_narrow,
            "verifier": getattr(config, "name_or_path", ""),
            "architectures": tuple(config.architectures or ()),
        }
        return cls(**{**found, **changes})

    def described(self, dtype: str) -> dict[str, Any]:
        """As config.json has it. There, layers are numbered by what they read: 0 is the embedding's output."""
        method = {"proposal_type": "greedy", "speculative_tokens": self.steps}
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": NAME,
            "speculators_config": {
                "algorithm": NAME,
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {"name_or_path": self.verifier, "architectures": list(self.architectures)},
            },
            "transformer_layer_config": self.decoder.to_dict(),
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in self.layers],
            **{name: getattr(self, name) for name in _VARIANTS},
            "dtype": dtype,
        }

    @classmethod
    def of(cls, described: dict[str, Any], *, has_embedding: bool) -> Eagle3Config:
        """From what config.json has. Raises KeyError or TypeError for what is missing, ConfigError for what is wrong."""
        if described.get("speculators_model_type") != NAME:
            raise ConfigError(f'"speculators_model_type" is {described.get("speculators_model_type")!r}, not {NAME!r}')
        given = described["transformer_layer_config"]
        family = given.get("model_type", "llama")
        if family not in _FAMILIES:
            raise ConfigError(f"its layer is of model_type {family!r}; allowed are {', '.join(_FAMILIES)}")
        decoder = _FAMILIES[family](**{name: value for name, value in given.items() if name != "model_type"})
        speculation = described["speculators_config"]
        return cls(
            decoder,
            tuple(layer - 1 for layer in described.get("eagle_aux_hidden_state_layer_ids") or ()),
            described.get("target_hidden_size") or decoder.hidden_size,
            described.get("draft_vocab_size") or decoder.vocab_size,
            steps=speculation["proposal_methods"][0]["speculative_tokens"],
            **{name: described.get(name, False) for name in _VARIANTS},
            has_embedding=has_embedding,
            verifier=speculation["verifier"]["name_or_path"] or "",
            architectures=tuple(speculation["verifier"]["architectures"] or ()),
        )
