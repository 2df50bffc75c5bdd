"""What can go wrong, as a tree. Every message says what was given, what is allowed and what to do.

SpecDecError
├── ConfigError       a setting outside its range, or an unknown one      (also a ValueError)
├── PromptError       an empty prompt, a token id outside the vocabulary, a prompt that does not fit
├── VocabularyError   target and draft do not share a vocabulary
├── CheckpointError   a checkpoint that is missing, incomplete or damaged (also an OSError)
├── ModelError        weights or logits that are not finite, an architecture that cannot be run exactly
├── GenerationError   some rows of a batch failed; carries the finished result of all the others
└── PeerError         another program that was to be measured beside ours failed

FallbackWarning       a model is run in a way that is exact and slower   (a UserWarning)
"""

from __future__ import annotations

from typing import Any


class SpecDecError(Exception):
    """Base of every error that specdec raises on purpose."""


class ConfigError(SpecDecError, ValueError):
    """A setting outside its range, or an unknown one."""


class PromptError(SpecDecError, ValueError):
    """A prompt that no model may see: empty, outside the vocabulary, or longer than the context."""


class VocabularyError(SpecDecError, ValueError):
    """Target and draft do not mean the same text by the same token ids."""


class CheckpointError(SpecDecError, OSError):
    """A checkpoint that is missing, incomplete or damaged."""


class ModelError(SpecDecError, RuntimeError):
    """A model whose weights or logits are not finite, or that cannot be run exactly."""


class GenerationError(SpecDecError, RuntimeError):
    """Some rows failed while others finished; ``result`` holds what every row has got."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class PeerError(SpecDecError, RuntimeError):
    """Another program that was to be measured beside ours is missing or failed."""


class FallbackWarning(UserWarning):
    """A model is run in a way that is exact, and slower than the one for models that allow more."""
