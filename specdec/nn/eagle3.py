"""EAGLE-3: one decoder layer that guesses token after token from what the target made of the text.

Outputs of a low, a middle and a high layer of the target are fused into one vector per token. The layer reads that vector
beside the embedding of the token after it, and what it puts out stands in for the vector of the next place, of which the
target has seen nothing yet; so it goes on by itself. Training does the same for a few steps (training-time test), so that
the layer learns to live with its own outputs. Li et al. 2025 (arXiv 2503.01840).

Place i of a row: the target's features of token i and the token i + 1; its hidden state guesses token i + 2.

Checkpoints are those of the `speculators` library, which vLLM loads.

Shapes: B rows, T tokens, H hidden size, F features of a token, V vocabulary of the target, D of the drafter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from specdec.errors import CheckpointError, ConfigError
from specdec.nn.divergences import DIVERGENCES, overlap
from specdec.nn.eagle3_config import Eagle3Config
from specdec.nn.gpt import GPT, Block, Cache, rope_frequencies, rotary, split_projections, state_from_hf
from specdec.nn.heads import FeatureHead

STEP_WEIGHT = 0.8  # a step of the unrolled training pass weighs this much less than the one before it
_LOGITS_AT_ONCE = 2**25  # numbers; the loss makes logits of so many places at a time
_LOGITS_KEPT = 2**23  # numbers; if there are more, they are made again for the backward pass instead of being kept


class FusedBlock(Block):
    """A decoder layer whose attention reads the embedding of a token beside a hidden state."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config.decoder, 0, 0.0)
        size, old = config.decoder.hidden_size, self.self_attn.qkv_proj
        self.self_attn.qkv_proj = nn.Linear(2 * size, old.out_features, bias=old.bias is not None)
        self.hidden_norm = nn.RMSNorm(size, eps=config.decoder.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def read(self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """The residual stream [B, T, H] after reading embeddings and hidden states [B, T, H]."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        x = residual + self.self_attn(torch.cat([self.input_layernorm(embedded), normed], dim=-1), rope, cache, None)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Head(FeatureHead):
    """The trained part of an EAGLE-3 drafter; ``share`` gives it the target's embedding, unless it has its own.

    ``draft_ids`` [D] are the ids, ascending, that it can guess. Training unrolls ``config.steps`` steps and minimises the
    ``divergence`` (one of ``DIVERGENCES``) of its law from the target's.
    """

    draft_ids: Tensor

    def __init__(self, config: Eagle3Config, draft_ids: Tensor | None = None, *, divergence: str = "lk_hybrid") -> None:
        super().__init__()
        decoder, size = config.decoder, config.decoder.hidden_size
        self.config, self.layers, self.divergence = config, config.layers, DIVERGENCES[divergence]
        taps, width, eps = len(config.layers) or 3, config.target_hidden_size, decoder.rms_norm_eps
        self.input_norm = nn.RMSNorm(taps * width, eps=eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(nn.RMSNorm(width, eps=eps) for _ in range(taps)) if config.fc_norm else None
        self.fc = nn.Linear(taps * width, size, bias=False)
        self.block = FusedBlock(config)
        self.norm = nn.RMSNorm(size, eps=eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(decoder.vocab_size, size) if config.has_embedding else None
        if self.embed_tokens is not None:
            self.embed_tokens.requires_grad_(False)
        ids = torch.arange(config.draft_vocab_size) if draft_ids is None else draft_ids
        self.register_buffer("draft_ids", ids, persistent=False)
        self._frequencies, self._rope_scale = rope_frequencies(decoder)  # no buffer: angles stay float32
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def for_target(cls, target: GPT | PreTrainedModel, draft_ids: Tensor | None = None, **changes: Any) -> Eagle3Head:
        """An untrained head as wide as ``target``, whose output matrix begins as the target's; it shares its embedding.

        ``draft_ids`` [D]: the ids it can guess, all by default. ``changes`` are fields of ``Eagle3Config``, or
        ``divergence``, or a smaller ``width``: embedding and output then begin as what of the target's has most effect.
        """
        divergence = changes.pop("divergence", "lk_hybrid")
        output = target.lm_head if isinstance(target, GPT) else target.get_output_embeddings()
        embedding = target.embed_tokens if isinstance(target, GPT) else target.get_input_embeddings()
        count = len(output.weight) if draft_ids is None else len(draft_ids)
        head = cls(
            Eagle3Config.for_target(target.config, draft_vocab_size=count, **changes), draft_ids, divergence=divergence
        )
        with torch.no_grad():
            size = head.config.decoder.hidden_size
            head.lm_head.weight.copy_(_narrowed(output.weight[head.draft_ids.to(output.weight.device)], size))
            if head.embed_tokens is not None:
                head.embed_tokens.weight.copy_(_narrowed(embedding.weight, size))
                head.embed_tokens.requires_grad_(True)
        return head.share(embedding, output)

    @property
    def is_trimmed(self) -> bool:
        """Whether there are ids that it cannot guess."""
        return self.config.draft_vocab_size < self.config.decoder.vocab_size

    def fuse(self, features: Tensor) -> Tensor:
        """One vector [..., H] per token of the target's features [..., F] of it."""
        features = features.to(self.norm.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = zip(self.fc_norm, features.chunk(len(self.fc_norm), dim=-1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H] of tokens [...]."""
        embed = self.shared.embed_tokens if self.embed_tokens is None else self.embed_tokens
        return embed(tokens).to(self.norm.weight.dtype)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for places at ``positions`` [B, T]."""
        self._frequencies = self._frequencies.to(positions.device)
        return rotary(positions, self._frequencies, self._rope_scale, self.norm.weight.dtype)

    def forward(self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """Hidden states [B, T, H] of places whose tokens are ``embedded``: what ``logits`` takes.

        ``hidden`` [B, T, H] comes from ``fuse``, or is what this returned for the places before.
        """
        x = self.block.read(embedded, hidden, rope, cache)
        return self.norm(x) if self.config.norm_output else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]; -inf for ids that cannot be guessed."""
        logits = self._draft_logits(hidden)
        if not self.is_trimmed:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.decoder.vocab_size), float("-inf"))
        return full.index_copy_(-1, self.draft_ids, logits)

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden if self.config.norm_output else self.norm(hidden))

    def loss(self, tokens: Tensor, features: Tensor, logits: Tensor, begin: int = 0) -> tuple[Tensor, dict[str, float]]:
        """The mean divergence over the steps of the unrolled pass, and over the places of each row, then over rows.

        tokens [B, T] int64, features [B, T, F] of them, logits [B, T, V] of the target; drafts of tokens up to number
        ``begin`` are not learned from. At every step the tokens are the text's own. A trimmed vocabulary leaves the
        target's law as it is: it then sums to less than 1.
        """
        if tokens.shape[1] - begin <= self.config.steps:
            raise ConfigError(
                f"rows of training text must be longer than {self.config.steps} tokens, got {tokens.shape[1] - begin}"
            )
        first = max(0, begin - 1)  # place that guesses what follows token number ``begin``
        states = [state[:, first:] for state in self.unrolled(tokens, features)]
        logits, count = logits[:, first:], states[0].shape[1]
        losses, alphas = [], []
        for step, hidden in enumerate(states):
            found = [self._losses(*part) for part in _parts(hidden, logits[:, 1 + step : 1 + step + count])]
            losses.append(torch.cat([part[0] for part in found]).mean())
            alphas.append(torch.cat([part[1] for part in found]))
        weights = STEP_WEIGHT ** torch.arange(len(losses), device=tokens.device)
        alpha = torch.stack(alphas)
        figures = {
            "mean_acceptance_length": 1 + float(alpha.cumprod(0).sum(0).mean()),
            "acceptance_rate": float(alpha.mean()),
        }
        return (torch.stack(losses) * weights).sum() / weights.sum(), figures

    def unrolled(self, tokens: Tensor, features: Tensor) -> list[Tensor]:
        """Hidden states of every step, [B, T - steps, H] each: the i-th of step j guesses token i + j + 2.

        Of a draft that begins at place i, step j is the j-th guess: it sees places up to i as the target's features make
        them, and those between as the steps before have made them.
        """
        steps, count = self.config.steps, tokens.shape[1] - self.config.steps
        embedded, hidden = self.embed(tokens[:, 1:]), self.fuse(features[:, :count])
        cache, states = _Unrolled(), []
        for step in range(steps):
            rope = self.rope(torch.arange(step, step + count, device=tokens.device)[None])
            hidden = self(embedded[:, step : step + count], hidden, rope, cache)
            states.append(hidden)
        return states

    def _losses(self, hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence and alpha [N] of hidden states [N, H] from the target's logits [N, V]."""

        def found(hidden: Tensor) -> tuple[Tensor, Tensor]:
            p, q = teacher.float().softmax(-1), self._draft_logits(hidden).float().softmax(-1)
            if self.is_trimmed:
                p = p[:, self.draft_ids]
            return self.divergence(p, q), overlap(p, q.detach())

        if len(hidden) * len(self.draft_ids) <= _LOGITS_KEPT:
            return found(hidden)
        return checkpoint(found, hidden, use_reentrant=False)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name.replace("block.", "layers.0.", 1): tensor.detach().cpu() for name, tensor in self.state_dict().items()
        }
        state = split_projections(state, self.config.decoder)
        if self.is_trimmed:
            ids = self.draft_ids.cpu()
            state["d2t"] = ids - torch.arange(len(ids))
            state["t2d"] = torch.zeros(self.config.decoder.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        described = self.config.described(str(self.norm.weight.dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Eagle3Head:
        try:
            described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            state = load_file(folder / "model.safetensors")
            config = Eagle3Config.of(described, has_embedding="embed_tokens.weight" in state)
            offsets = state.pop("d2t", None)
            state.pop("t2d", None)  # says the same
            head = cls(config, None if offsets is None else offsets + torch.arange(len(offsets)))
            joined = state_from_hf(state, config.decoder)
            named = {name.replace("layers.0.", "block.", 1): tensor for name, tensor in joined.items()}
            head.load_state_dict(named, assign=True)
        except ConfigError as error:
            raise CheckpointError(f"{folder} does not hold an EAGLE-3 head that can be run here: {error}") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} does not hold an EAGLE-3 head ({error!r}); train it again") from error
        return head


def _narrowed(weight: Tensor, size: int) -> Tensor:
    """Rows [N, H] in the ``size`` directions along which they differ most, [N, size]; as they are if that is all."""
    if size == weight.shape[1]:
        return weight
    found = weight.float()
    directions = torch.linalg.eigh(found.T @ found).eigenvectors  # the last ones matter most
    return found @ directions[:, -size:]


def _parts(hidden: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states [N, H] and logits [N, V] of all places [B, T], some at a time."""
    size = max(1, _LOGITS_AT_ONCE // teacher.shape[-1])
    rows = max(1, size // hidden.shape[1])
    for some in zip(hidden.split(rows), teacher.split(rows), strict=True):
        yield from zip(*(places.flatten(0, 1).split(size) for places in some), strict=True)


class _Unrolled:
    """Stands in for a cache: at step j, the i-th query sees the keys 0 .. i of step 0 and the i-th of all later steps."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def bias(self) -> Tensor:
        """[1, T, steps * T]; asked for after ``update``."""
        latest, steps = self._keys[-1], len(self._keys)
        own = torch.eye(latest.shape[2], dtype=torch.bool, device=latest.device)
        seen = torch.cat([torch.ones_like(own).tril(), *[own] * (steps - 1)], dim=1)
        return torch.zeros(seen.shape, dtype=latest.dtype, device=latest.device).masked_fill_(~seen, float("-inf"))[
            None
        ]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)
