"""A feature drafter that guesses a whole block of tokens in one pass of a small transformer.

DFlash (z-lab): what chosen layers of the target put out for the committed tokens is fused and given to every layer of the
drafter as keys and values. Its input is a block: the last committed token (the anchor) and masks, which see each other in
both directions. DSpark (DeepSeek, DeepSpec 2026): every place of the block guesses the token after it, the anchor's too;
a low-rank bigram term makes each guess depend on the one before it; and a confidence says how likely it is accepted.

Shapes: B rows, T tokens, A anchors of a row, K places of a block, H hidden size, F features of a token, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from specdec.errors import CheckpointError, ConfigError
from specdec.nn import train
from specdec.nn.gpt import GPT, Block, Cache, rope_frequencies, rotary, rotate
from specdec.nn.heads import FeatureHead, feature_layers
from specdec.sampling import MAX_DRAFT_TOKENS

NAME = "block"  # in config.json, under "specdec_drafter"
_CROSS_ENTROPY, _L1, _CONFIDENCE = 0.1, 0.9, 1.0  # weights of the parts of the loss, DSpark's
_FADING = 4.0  # the k-th place of a block weighs exp(-(k - 1) / 4) in the loss: what follows a refusal is lost
_LOGITS_AT_ONCE = 2**25  # numbers; the loss makes logits of so many places at a time


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of a ``BlockHead``. layers: of the target, whose outputs are read; anchors: of a row of training text."""

    hidden_size: int
    vocab_size: int
    layers: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int = 2
    block_size: int = 7
    markov_rank: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    anchors: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value and min(self.layers) >= 0) if field.name == "layers" else not value > 0:
                raise ConfigError(f"{field.name} of a block drafter must be positive, got {value!r}")
        if self.block_size > MAX_DRAFT_TOKENS:
            raise ConfigError(
                f"block_size of a block drafter must be at most {MAX_DRAFT_TOKENS}, got {self.block_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads; "
                "the first must be a multiple of the second"
            )

    @classmethod
    def for_target(cls, config: PreTrainedConfig, **changes: Any) -> BlockConfig:
        """As wide as a target with this configuration, reading up to three of its layers; ``changes`` come last."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        found = {
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "layers": feature_layers(text.num_hidden_layers),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        }
        return cls(**{**found, **changes})

    @property
    def decoder(self) -> LlamaConfig:
        """That of the drafter's own layers."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        return LlamaConfig(
            **{name: getattr(self, name) for name in (*names, "intermediate_size", "rms_norm_eps")},
            vocab_size=1,  # tokens are the target's
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )


class BlockHead(FeatureHead):
    """The trained part of a block drafter; ``share`` gives it the target's embedding and head."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config, self.layers = config, config.layers
        decoder, size = config.decoder, config.hidden_size
        self.fuse = nn.Linear(len(config.layers) * size, size, bias=False)
        self.fuse_norm = train.RMSNorm(size, eps=config.rms_norm_eps)
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.to_context = nn.Linear(size, width, bias=False)  # keys and values of all layers in one product
        self.masks = nn.Parameter(torch.empty(config.block_size - 1, size))
        self.blocks = nn.ModuleList(Block(decoder, i, 0.0) for i in range(config.num_hidden_layers))
        self.norm = train.RMSNorm(size, eps=config.rms_norm_eps)
        self.markov_in = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_out = nn.Linear(config.markov_rank, config.vocab_size, bias=False)
        self.confidence = nn.Linear(size, 1)  # with the next, one product with hidden state and bigram side by side
        self.markov_confidence = nn.Linear(config.markov_rank, 1, bias=False)
        self._frequencies, self._rope_scale = rope_frequencies(decoder)  # no buffer: angles stay float32
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.markov_out.weight)
        nn.init.zeros_(self.confidence.bias)

    @classmethod
    def for_target(cls, target: GPT | PreTrainedModel, **changes: Any) -> BlockHead:
        """An untrained head that shares what ``target`` has. ``changes`` are fields of ``BlockConfig``."""
        output = target.lm_head if isinstance(target, GPT) else target.get_output_embeddings()
        embedding = target.embed_tokens if isinstance(target, GPT) else target.get_input_embeddings()
        return cls(BlockConfig.for_target(target.config, **changes)).share(embedding, output)

    def context(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, G, T, D] per layer of committed tokens with features [B, T, F] at positions [B, T]."""
        heads = self.context_heads(features).view(*positions.shape, -1, self.config.head_dim)
        keys, values = heads.chunk(2, dim=2)
        keys = rotate(keys, *self._rope(positions))
        split = (part.transpose(1, 2).split(self.config.num_key_value_heads, dim=1) for part in (keys, values))
        return list(zip(*split, strict=True))

    def context_heads(self, features: Tensor) -> Tensor:
        """Keys of all layers and then their values, side by side and not yet turned, of features [..., F]."""
        fused = self.fuse(features.to(self.masks.dtype))
        return self.to_context(self.fuse_norm(fused.to(self.masks.dtype)))

    def forward(self, anchors: Tensor, cache: Cache) -> Tensor:
        """Hidden states [B, A * K, H] of the blocks that begin with the tokens ``anchors`` [B, A].

        ``cache`` has the context, says which positions the places have, and which keys each may look at.
        """
        rows, count = anchors.shape
        masks = self.masks.expand(rows, count, -1, -1)
        first = self.shared.embed_tokens(anchors).unsqueeze(2).to(masks.dtype)
        x = torch.cat([first, masks], dim=2).flatten(1, 2)
        rope = self._rope(cache.positions)
        for block in self.blocks:
            x = block(x, rope, cache, None)
        return self.norm(x)

    def correction(self, before: Tensor) -> Tensor:
        """What the tokens [...] just before guesses add to their logits, [..., V]."""
        return self.markov_out(self.markov_in(before))

    def doubts(self) -> Tensor:
        """What each token [V] just before a guess adds to the logit of its confidence."""
        return self.markov_confidence(self.markov_in.weight).squeeze(-1)

    def loss(self, tokens: Tensor, features: Tensor, logits: Tensor, begin: int = 0) -> tuple[Tensor, dict[str, float]]:
        """DSpark's loss of blocks at random anchors from token number ``begin`` on, and figures of it.

        tokens [B, T] int64, features [B, T, F] of them, logits [B, T, V] of the target. The cross entropy is that with
        the target's law (its expectation over the target's own text). Raises ConfigError for rows no longer than a block.
        """
        size, length = self.config.block_size, tokens.shape[1] - begin
        if length <= size:
            raise ConfigError(f"rows of training text must be longer than a block of {size} tokens, got {length}")
        count = min(self.config.anchors, length - size)
        starts = begin + torch.rand(len(tokens), length - size, device=tokens.device).topk(count).indices
        return self.loss_at(starts, tokens, features, logits)

    def loss_at(
        self, starts: Tensor, tokens: Tensor, features: Tensor, logits: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """``loss`` of the blocks whose anchors are at ``starts`` [B, A]."""
        hidden, places = self.hidden_at(starts, tokens, features)
        rows = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1).expand_as(places)
        rows, flat, before = rows.flatten(), places.flatten(), tokens.gather(1, places.flatten(1)).flatten()
        hidden = hidden.flatten(0, 1)

        def part(hidden: Tensor, where: slice) -> tuple[Tensor, Tensor, Tensor]:
            return self._losses(hidden, before[where], logits[rows[where], flat[where]])

        step = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        found = []
        for begin in range(0, len(flat), step):
            where = slice(begin, begin + step)
            alone = len(flat) <= step
            found.append(part(hidden, where) if alone else checkpoint(part, hidden[where], where, use_reentrant=False))
        losses, alphas, errors = (torch.cat(parts).view(places.shape) for parts in zip(*found, strict=True))
        weights = torch.exp(-torch.arange(places.shape[-1], device=places.device) / _FADING)
        total = (losses * weights).mean() / weights.mean()
        figures = {
            "mean_acceptance_length": 1 + float(alphas.cumprod(-1).sum(-1).mean()),
            "acceptance_rate": float(alphas.mean()),
            "confidence_error": float(errors.mean()),
        }
        return total, figures

    def hidden_at(self, starts: Tensor, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, A * K, H] and places [B, A, K] of the blocks whose anchors are at ``starts`` [B, A]."""
        rows, length = tokens.shape
        places = starts.unsqueeze(-1) + torch.arange(self.config.block_size, device=starts.device)
        positions = torch.arange(length, device=tokens.device).expand(rows, -1)
        cache = _Training(self.context(features, positions), starts, places)
        return self(tokens.gather(1, starts), cache), places

    def _losses(self, hidden: Tensor, before: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, alpha and error of the confidence of N places, [N] each; teacher [N, V] are the target's logits."""
        guess = (self.shared.lm_head(hidden) + self.correction(before)).float().log_softmax(-1)
        law = teacher.float().softmax(-1)
        apart = (law - guess.exp()).relu().sum(-1)  # total variation, half the L1 distance
        confidence = (self.confidence(hidden) + self.markov_confidence(self.markov_in(before))).squeeze(-1).float()
        losses = _CROSS_ENTROPY * -(law * guess).sum(-1) + _L1 * 2 * apart
        known = 1 - apart.detach().clamp(0, 1)  # alpha
        losses = losses + _CONFIDENCE * F.binary_cross_entropy_with_logits(confidence, known, reduction="none")
        return losses, known, (confidence.detach().sigmoid() - known).abs()

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        self._frequencies = self._frequencies.to(positions.device)
        return rotary(positions, self._frequencies, self._rope_scale, self.masks.dtype)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        described = {"specdec_drafter": NAME, **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> BlockHead:
        try:
            described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if (kind := described.pop("specdec_drafter", None)) != NAME:
                raise ValueError(f"its config.json names a drafter of kind {kind!r}, not {NAME!r}")
            head = cls(BlockConfig(**described))
            head.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not hold a block drafter ({error}); train it again") from error
        return head


class _Training:
    """Stands in for a cache: a place of a block sees the context strictly before its anchor, and its block."""

    def __init__(self, context: list[tuple[Tensor, Tensor]], starts: Tensor, places: Tensor) -> None:
        self.context, self.positions = context, places.flatten(1)
        (rows, count), size, length = starts.shape, places.shape[-1], context[0][0].shape[2]
        block = torch.arange(count, device=starts.device).repeat_interleave(size)
        is_own = (block.unsqueeze(1) == block).expand(rows, -1, -1)
        is_before = torch.arange(length, device=starts.device) < starts.repeat_interleave(size, 1).unsqueeze(-1)
        seen = torch.cat([is_before, is_own], dim=-1)
        self.bias = torch.zeros(seen.shape, dtype=context[0][0].dtype, device=seen.device).masked_fill_(
            ~seen, float("-inf")
        )

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        earlier = self.context[layer]
        return torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)
