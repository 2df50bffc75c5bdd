"""specdec makes text generation faster without changing the text: speculative decoding, batched and lossless."""

from specdec import plugin
from specdec.check import CheckReport, check
from specdec.draft import Draft, Drafter
from specdec.drafting import register_drafter
from specdec.engine import Engine
from specdec.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    ModelError,
    PromptError,
    SpecDecError,
    VocabularyError,
)
from specdec.generate import generate
from specdec.load import load
from specdec.output import Output, Piece
from specdec.requests import Settings
from specdec.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "Draft",
    "Drafter",
    "Engine",
    "GenerationError",
    "ModelError",
    "Output",
    "Piece",
    "PromptError",
    "Settings",
    "SpecDecError",
    "Stats",
    "VocabularyError",
    "__version__",
    "check",
    "generate",
    "load",
    "plugin",
    "register_drafter",
]
