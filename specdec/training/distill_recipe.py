"""What a distillation is told and what it reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from specdec.errors import CheckpointError, ConfigError
from specdec.nn.divergences import DIVERGENCES
from specdec.training.shapes import SHAPES

REPORT = "distill.json"


@dataclass(frozen=True)
class DistillSettings:
    """How to train the draft. Budgets: ``max_tokens`` positions learned from, ``max_seconds``; 0 is no limit.

    shape: "wide" (the target's width, a quarter of its layers: begins as some of the target's layers where they are
    built like ours), "small" (half the width), "tiny" (a quarter, one layer) or "lstm" (with as many parameters as "small").
    loss: one of ``losses.DIVERGENCES``, or "cross_entropy" (the text alone, no teacher).
    draft_tokens: how many tokens the draft will propose; positions count by what they add to the accepted length.
    teacher_entries: how many of the target's probabilities to keep per position, 0 for all.
    on_policy: share of the budget spent, at the end, on text of the target.
    draft_vocab_size: how many tokens the draft knows: the most frequent of the training text, one for all others; 0: all.
    rows: of a batch, ``sequence_length`` tokens each; 0 for few (``batch_rows``): many small updates teach most.
    draft_context: the most tokens that the draft reads, the latest ones of a text; 0 for hardly more than it learns from
    in a row, as it has never seen places further on.
    patience: evaluations without a rise of the accepted length that end the run; 0 never does.
    """

    shape: str = "small"
    loss: str = "lk_hybrid"
    weigh_positions: bool = True
    draft_tokens: int = 4
    teacher_entries: int = 0
    on_policy: float = 0.5
    max_tokens: int = 0
    max_seconds: float = 0.0
    rows: int = 0
    sequence_length: int = 64
    prompt_tokens: int = 64
    new_tokens: int = 128
    prompts_per_round: int = 32
    learning_rate: float = 1e-3
    evaluate_every: int = 100_000
    evaluation_prompts: int = 8
    patience: int = 4
    seed: int = 0
    draft_vocab_size: int = 0
    draft_context: int = 0

    def __post_init__(self) -> None:
        losses = [*DIVERGENCES, "cross_entropy"]
        _allowed("shape", self.shape, self.shape in SHAPES, f"one of {', '.join(SHAPES)}")
        _allowed("loss", self.loss, self.loss in losses, f"one of {', '.join(losses)}")
        _allowed("on_policy", self.on_policy, 0 <= self.on_policy <= 1, "from 0 to 1")
        _allowed("learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "between 0 and 1")
        for name in ("draft_tokens", "prompt_tokens", "new_tokens", "prompts_per_round", "evaluation_prompts"):
            _allowed(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("max_tokens", "max_seconds", "teacher_entries", "patience", "rows", "draft_context"):
            _allowed(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        _allowed("max_tokens", self.max_tokens, self.max_tokens or self.max_seconds, "> 0 if max_seconds is 0")
        size = self.draft_vocab_size
        _allowed("draft_vocab_size", size, size == 0 or size >= 3, "0 or >= 3")
        _allowed("evaluate_every", self.evaluate_every, self.evaluate_every >= 1, ">= 1")
        _allowed("sequence_length", self.sequence_length, self.sequence_length >= 8, ">= 8")

    @property
    def context(self) -> int:
        """The most tokens that the draft reads."""
        longest = max(self.sequence_length, self.prompt_tokens + self.new_tokens)
        return self.draft_context or 1 << (longest - 1).bit_length()


def _allowed(name: str, value: object, condition: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


@dataclass
class Evaluation:
    """After ``tokens`` positions: mean accepted length of decodes of held-out prompts, and alpha on held-out text."""

    tokens: int
    seconds: float
    greedy_length: float
    sampled_length: float
    alpha: float


@dataclass
class DistillReport:
    """What came out; ``evaluations[0]`` is before the first step, ``best`` the index of the draft that was kept.

    ``identity`` is of the settings, the text and the target.
    """

    settings: DistillSettings
    identity: str
    initialised: list[str]
    draft_parameters: int
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int = 0
    stopped_early: bool = False


def read_report(path: Path) -> DistillReport:
    """The report in a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text())
        found["settings"] = DistillSettings(**found["settings"])
        found["evaluations"] = [Evaluation(**one) for one in found["evaluations"]]
        return DistillReport(**found)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; distill with resume=False to start over") from error
