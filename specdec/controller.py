"""Who decides how many tokens to draft, and whoever wants always the same number; see control.py for the one that learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.draft import Drafter
from specdec.sequences import Sequences, Step
from specdec.stats import Decisions

AUTO = "auto"
DEFAULT_DRAFT_TOKENS = 4

_MANY = 1 << 20  # steps


class Controller(Protocol):
    """Decides before a step, or several, and is told afterwards what came of them and how long they took.

    ``decisions`` are counted since whoever reads them last put new ones in their place.
    """

    decisions: Decisions

    @property
    def holds(self) -> int:
        """For how many steps, passes if they draft nothing, the latest choice holds, whatever they bring."""

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        """Draft lengths of the live rows."""

    def observe(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
        """Steps that drafted, or not, as chosen, one after the other; ``step_seconds`` of all without ``draft_seconds``.

        ``overhead``: seconds beyond both that depend on neither lengths nor number of steps.
        """


class FixedLength:
    """The same number of draft tokens for every row and step, as far as a row has room for them."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.decisions = Decisions()

    @property
    def holds(self) -> int:
        return _MANY

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        return [min(self.num_draft_tokens, limit) for limit in sequences.draft_limits()]

    def observe(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
        """Nothing to learn."""
        self.decisions.count(steps)
