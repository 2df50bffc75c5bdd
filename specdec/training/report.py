"""What a finished run leaves next to its weights for programs: report.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from specdec.errors import CheckpointError

REPORT, LOG, CURVES, TENSORBOARD = "report.json", "log.jsonl", "curves.png", "tensorboard"


@dataclass(frozen=True)
class TrainReport:
    """What came out. Losses are nats per token on held-out text; see ``objective.Agreement`` for the agreement.

    ``mean_acceptance_length``: tokens per target pass of a short greedy decode of held-out prompts; None if none was
    made. ``skipped`` batches had a loss that was not finite. ``sharded``: FSDP2 spread the weights over the processes.
    """

    recipe: str
    identity: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    target_parameters: int
    draft_parameters: int
    target_loss: float
    draft_loss: float
    acceptance: float
    top1: float
    device: str
    dtype: str
    versions: dict[str, str]
    acceptance_per_position: list[float] = field(default_factory=list)
    mean_acceptance_length: float | None = None
    skipped: int = 0
    processes: int = 1
    sharded: bool = False


def read_report(path: Path) -> TrainReport:
    """The report in a file. Raises CheckpointError."""
    try:
        return TrainReport(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; train with resume=False to start over") from error
