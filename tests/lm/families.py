"""The families that the matrix test covers: a tiny random model of each, and what transformers says with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    T5Config,
    WhisperConfig,
)
from transformers.generation.utils import GenerationMixin

VOCAB, NEW = 61, 64
SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that texts differ
    **SPECIAL,
}
UNTIED = {**SHAPE, "tie_word_embeddings": False}  # where embeddings are scaled up, tied ones repeat the last token
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
BLOOM: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
FALCON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    **SPECIAL,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,
    **SPECIAL,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
WINDOW = 8  # reached by every row


@dataclass(frozen=True)
class Family:
    """A name for the table, a configuration, what to say of it, and what its draft's noise is."""

    name: str
    config: Any
    about: str = ""
    noise: float = 0.015


def without(shape: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in shape.items() if name not in names}


FAMILIES = [
    Family("Llama", lambda: LlamaConfig(**SHAPE), "full attention, rotary positions"),
    Family("Mistral", lambda: MistralConfig(**SHAPE, sliding_window=WINDOW), "sliding window, reached"),
    Family("Qwen2", lambda: Qwen2Config(**SHAPE), "full attention, biases"),
    Family("Qwen3", lambda: Qwen3Config(**SHAPE, head_dim=8), "full attention, normed queries"),
    Family("Gemma2", lambda: Gemma2Config(**UNTIED, head_dim=8, sliding_window=WINDOW), "mixed layers, soft caps"),
    Family("Gemma3", lambda: Gemma3TextConfig(**UNTIED, head_dim=8, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"]), "mixed layers, window reached"),
    Family("Phi3", lambda: Phi3Config(**SHAPE), "full attention, fused weights"),
    Family("GPT-2", lambda: GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.3, **SPECIAL), "learned positions"),
    Family("GPT-NeoX", lambda: GPTNeoXConfig(**without(SHAPE, "num_key_value_heads")), "parallel blocks"),
    Family("OPT", lambda: OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3, **SPECIAL),
        "learned positions with an offset"),
    Family("Falcon", lambda: FalconConfig(**FALCON, alibi=False), "multi-query, rotary positions"),
    Family("Falcon with alibi", lambda: FalconConfig(**FALCON, alibi=True), "biases by distance"),
    Family("Bloom", lambda: BloomConfig(**BLOOM, **SPECIAL), "biases by distance"),
    Family("Mixtral", lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), "experts"),
    Family("Qwen3-MoE", lambda: Qwen3MoeConfig(**SHAPE, **MOE, head_dim=8), "experts"),
    Family("gpt-oss", lambda: GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]), "attention sinks, mixed layers"),
    Family("DeepSeek-V3", lambda: DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT, v_head_dim=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1), "latent attention, experts"),
    Family("Llama 4 text", lambda: Llama4TextConfig(**SHAPE, intermediate_size_mlp=64, num_local_experts=2,
        head_dim=8, attention_chunk_size=WINDOW, no_rope_layers=[1, 0]), "chunks, reached; scales by length"),
    Family("Mamba2", lambda: Mamba2Config(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=4,
        head_dim=16, state_size=8, n_groups=1, chunk_size=8, initializer_range=0.3, **SPECIAL), "recurrent state"),
    Family("Jamba", lambda: JambaConfig(**SHAPE, attn_layer_offset=1, attn_layer_period=2, num_experts=2,
        mamba_d_state=4), "attention and recurrent state"),
    Family("Qwen3-Next", lambda: Qwen3NextConfig(**SHAPE, **MOE, **LINEAR, head_dim=8,
        layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16),
        "attention and recurrent state, experts"),
    Family("T5", lambda: T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        initializer_factor=3.0, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0),
        "encoder-decoder, biases by distance", 0.1),
    Family("BART", lambda: BartConfig(**SEQ2SEQ, max_position_embeddings=128, forced_eos_token_id=None),
        "encoder-decoder, learned positions"),
    Family("Whisper", lambda: WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=10,
        max_target_positions=128), "encoder-decoder that hears"),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def make_prompts(count: int) -> list[list[int]]:
    """Ragged prompts of 1 to 20 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(8)
SOUNDS = torch.randn(8, 8, 20, generator=torch.Generator().manual_seed(0))


@cache
def model(name: str) -> PreTrainedModel:
    """The family's tiny random model."""
    torch.manual_seed(0)
    config = BY_NAME[name].config()
    auto: Any = AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = AutoModelForSpeechSeq2Seq if hears(name) else AutoModelForSeq2SeqLM
    found: PreTrainedModel = auto.from_config(config).eval().requires_grad_(False)
    start = getattr(config, "decoder_start_token_id", None)
    found.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    return found


def hears(name: str) -> bool:
    return name == "Whisper"


def prompts(name: str, rows: int) -> Any:
    """What ``specdec.generate`` is given."""
    return {"input_features": SOUNDS[:rows]} if hears(name) else PROMPTS[:rows]


@cache
def texts(name: str) -> list[list[int]]:
    """What the family's own ``generate`` says to each prompt alone."""
    found = []
    for prompt, sound in zip(PROMPTS, SOUNDS, strict=True):
        given = {"input_features": sound[None]} if hears(name) else {"input_ids": torch.tensor([prompt])}
        if not hears(name):
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        whole = GenerationMixin.generate(model(name), **given, max_new_tokens=NEW, do_sample=False)
        found.append(whole[0, 1 if model(name).config.is_encoder_decoder else len(prompt) :].tolist())
    return found
