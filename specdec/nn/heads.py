"""What drafters that read a target's features have in common: small modules trained for one target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from specdec.errors import ConfigError


@dataclass(frozen=True)
class Shared:
    """What drafter and target have in common and no training changes: [...] to [..., H], and [..., H] to [..., V]."""

    embed_tokens: Callable[[Tensor], Tensor]
    lm_head: Callable[[Tensor], Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class FeatureHead(nn.Module, ABC):
    """The trained part of a drafter that reads what the target's ``layers`` put out."""

    layers: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self._shared: Shared | None = None

    def share(self, embed_tokens: Callable[[Tensor], Tensor], lm_head: Callable[[Tensor], Tensor]) -> Self:
        """Use the target's embedding and head. They are neither trained nor saved with this module."""
        self._shared = Shared(embed_tokens, lm_head)
        return self

    @property
    def shared(self) -> Shared:
        """What was given to ``share``."""
        assert self._shared is not None, "share comes first"
        return self._shared

    @abstractmethod
    def loss(self, tokens: Tensor, features: Tensor, logits: Tensor, begin: int = 0) -> tuple[Tensor, dict[str, float]]:
        """What training minimises, and figures of it.

        tokens [B, T] int64, features [B, T, len(layers) * H] of them, logits [B, T, V] of the target. Guesses of tokens
        up to number ``begin`` are not learned from.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into ``folder``."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """What ``save`` wrote, bit for bit. Raises CheckpointError when it is missing or damaged."""


def feature_layers(count: int) -> tuple[int, ...]:
    """Up to three layers of a target with ``count`` of them, from the second to the last but one."""
    if count < 2:
        raise ConfigError(f"a drafter that reads features needs a target with 2 layers or more, got {count}")
    first, last = min(1, count - 2), count - 2
    return tuple(sorted({first, (first + last + 1) // 2, last}))
