"""A recurrent language model: embedding, LSTM, head. Its state is of constant size, however long the text.

Hochreiter and Schmidhuber 1997. Each state depends on the one before it, so a text of T tokens takes T steps one after
another, in training too, where a GPT computes all of its positions at once. As a draft model it needs no keys and values
(recurrent drafters: Zhang et al. 2024, arXiv 2403.09919).

Shapes: B rows, T tokens, N layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.errors import CheckpointError, ConfigError
from specdec.nn.documents import Documents
from specdec.nn.gpt import GPT

KEY, NAME = "specdec_model", "lstm"  # in config.json; transformers would know better than another "model_type"
_FORGET_BIAS = 1.0  # the state is kept to begin with (Jozefowicz et al. 2015)


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of an ``LSTM``.

    max_position_embeddings is in other models the longest row. Nothing here depends on it: by default it is more than any
    row has.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int = 1
    max_position_embeddings: int = 2**30
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} of an LSTM must be an integer >= 1, got {value!r}")

    @classmethod
    def with_parameters(cls, parameters: int, vocab_size: int, **others: Any) -> LSTMConfig:
        """The narrowest LSTM of even width with at least so many parameters, one layer by default."""
        hidden = 2
        while _count(config := cls(vocab_size=vocab_size, hidden_size=hidden, **others)) < parameters:
            hidden += 2
        return config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {KEY: NAME, **asdict(self)}


class LSTM(nn.Module):
    """A causal language model, with the parts and names of ``GPT`` that training and decoding use."""

    layers: tuple[nn.Module, ...] = ()  # what is compiled or sharded one by one: a fused kernel runs all of them

    def __init__(self, config: LSTMConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.no_grad():
            for layer in range(config.num_hidden_layers):
                self.lstm.get_parameter(f"bias_ih_l{layer}").chunk(4)[1].fill_(_FORGET_BIAS)

    def forward(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T], read from the beginning; ``lm_head`` makes logits of them."""
        if documents is not None:
            raise ConfigError("an LSTM reads a row as one text; train it without separate_documents")
        hidden, _ = self.lstm(self.dropout(self.embed_tokens(tokens)))
        return self.dropout(hidden)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into ``folder``."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        described = json.dumps(self.config.to_dict() | {"dtype": dtype}, indent=2)
        (folder / "config.json").write_text(described + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> LSTM:
        """What ``save`` wrote, in ``dtype`` or its own. Raises CheckpointError when it is missing or damaged."""
        try:
            described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if described[KEY] != NAME:
                raise ValueError(f"config.json is of a {described[KEY]!r}")
            names = {field.name for field in fields(LSTMConfig)}
            model = cls(LSTMConfig(**{name: value for name, value in described.items() if name in names}))
            state = load_file(folder / "model.safetensors")
            if model.config.tie_word_embeddings:
                state["lm_head.weight"] = state["embed_tokens.weight"]
            model.load_state_dict(state)
            stored = next(iter(state.values())).dtype
        except (OSError, ValueError, TypeError, KeyError, ConfigError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not hold an LSTM ({error}); restore it from its source") from error
        return model.eval().requires_grad_(False).to(dtype or stored)


def holds_lstm(folder: Path) -> bool:
    """Whether the folder's config.json says that it is of an ``LSTM``."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))[KEY] == NAME
    except (OSError, ValueError, TypeError, KeyError):
        return False


Trainable: TypeAlias = GPT | LSTM  # what a recipe's models are


class Cells(nn.Module):
    """The steps of an ``LSTM``, one token of every row at a time: one product per layer, in evaluation only."""

    def __init__(self, model: LSTM) -> None:
        super().__init__()
        self.cells = nn.ModuleList(_joined(*weights) for weights in model.lstm.all_weights)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The state [N, 2, B, H] after embeddings [B, H] that follow ``state``; ``[-1, 0]`` are hidden states."""
        after = []
        for cell, (hidden, memory) in zip(self.cells, state, strict=True):
            gates, content = cell(torch.cat([x, hidden], dim=1)).split([3 * x.shape[1], x.shape[1]], dim=1)
            entrance, keep, out = gates.sigmoid().chunk(3, dim=1)
            memory = torch.addcmul(keep * memory, entrance, content.tanh())
            x = out * memory.tanh()
            after += [x, memory]
        return torch.stack(after).view_as(state)


@torch.no_grad()
def _joined(input_weight: Tensor, hidden_weight: Tensor, input_bias: Tensor, hidden_bias: Tensor) -> nn.Linear:
    """Both products of a layer as one; torch's gates (in, forget, content, out) with the content last."""
    size = hidden_weight.shape[1]
    joined = nn.Linear(2 * size, 4 * size, dtype=input_weight.dtype, device=input_weight.device)
    order = torch.arange(4 * size, device=input_weight.device).view(4, size)[[0, 1, 3, 2]].flatten()
    joined.weight.copy_(torch.cat([input_weight, hidden_weight], dim=1)[order])
    joined.bias.copy_((input_bias + hidden_bias)[order])
    return joined.requires_grad_(False)


def _count(config: LSTMConfig) -> int:
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return tables + config.num_hidden_layers * 8 * config.hidden_size * (config.hidden_size + 1)
