"""Counters of a run and the figures made of them; names follow vLLM's metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from io import StringIO
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.sequences import Step


@dataclass
class Decisions:
    """How often each draft length was chosen, and what was expected of the last choice.

    lengths: tokens of the longest draft -> steps. probes: steps that drafted only to see whether it pays. expected and
    plain: tokens per second that the last choice and plain decoding promised.
    """

    lengths: dict[int, int] = field(default_factory=dict)
    probes: int = 0
    expected: float = 0.0
    plain: float = 0.0

    def count(self, steps: Sequence[Step]) -> None:
        """Add steps, by the longest draft of each."""
        for step in steps:
            length = max(step.drafted)
            self.lengths[length] = self.lengths.get(length, 0) + step.passes

    def __add__(self, other: Decisions) -> Decisions:
        """Both runs, one after the other."""
        lengths = {n: self.lengths.get(n, 0) + other.lengths.get(n, 0) for n in self.lengths | other.lengths}
        return Decisions(lengths, self.probes + other.probes, other.expected, other.plain)

    def __str__(self) -> str:
        steps = ", ".join(f"{length}: {count}" for length, count in sorted(self.lengths.items()))
        gain = f"; last {self.expected / self.plain:.2f}x plain expected" if self.plain else ""
        return f"{steps} steps, {self.probes} of them probes{gain}"


@dataclass
class Stats:
    """What a run did. Seconds are wall-clock; rates are pooled over rows and steps, never means of ratios.

    ``control`` says which draft lengths were used and why.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_target_passes: int = 0
    num_row_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_draft_tokens_per_position: list[int] = field(default_factory=list)
    num_accepted_tokens_per_position: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    control: Decisions = field(default_factory=Decisions)

    def count_row(self, drafted: int, accepted: int, committed: int, depth: int | None = None) -> None:
        """Add one row's part of one step: tokens proposed, kept, and entered into the text.

        ``depth``: of a tree, how many of its tokens could have been kept. Without a draft every token had a pass of its own.
        """
        self.num_row_steps += 1 if drafted else max(1, committed)
        self.num_generated_tokens += committed
        if drafted == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        positions = drafted if depth is None else depth
        missing = positions - len(self.num_draft_tokens_per_position)
        self.num_draft_tokens_per_position.extend([0] * missing)
        self.num_accepted_tokens_per_position.extend([0] * missing)
        for i in range(positions):
            self.num_draft_tokens_per_position[i] += 1
        for i in range(accepted):
            self.num_accepted_tokens_per_position[i] += 1

    def __add__(self, other: Stats) -> Stats:
        """The counters of both runs together, one after the other."""
        total = Stats()
        for name in (item.name for item in fields(Stats)):
            ours, theirs = getattr(self, name), getattr(other, name)
            both = (
                [a + b for a, b in zip_longest(ours, theirs, fillvalue=0)] if isinstance(ours, list) else ours + theirs
            )
            setattr(total, name, both)
        return total

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens, bonus excluded; 0 when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """For each draft position, the share of drafts reaching that far that were accepted that far."""
        pairs = zip(self.num_accepted_tokens_per_position, self.num_draft_tokens_per_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per target pass and row, bonus or correction included; plain decoding is 1."""
        return self.num_generated_tokens / self.num_row_steps if self.num_row_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens / seconds of the whole call, prefill included."""
        return self.num_generated_tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Everything but model forwards: acceptance, drafting logic, bookkeeping, text."""
        return max(0.0, self.total_seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="specdec", show_header=False)
        for name, value in self._rows():
            table.add_row(name, value)
        text = StringIO()
        Console(file=text, width=80).print(table)
        return text.getvalue().rstrip()

    def _rows(self) -> list[tuple[str, str]]:
        positions = " ".join(f"{rate:.0%}" for rate in self.acceptance_rate_per_position)
        seconds = (
            f"prefill {self.prefill_seconds:.2f}, draft {self.draft_seconds:.2f}, "
            f"verify {self.verify_seconds:.2f}, bookkeeping {self.overhead_seconds:.2f}"
        )
        return [
            ("requests", str(self.num_requests)),
            ("prompt tokens", str(self.num_prompt_tokens)),
            ("generated tokens", str(self.num_generated_tokens)),
            ("target passes", str(self.num_target_passes)),
            ("tokens per second", f"{self.tokens_per_second:.1f}"),
            ("mean acceptance length", f"{self.mean_acceptance_length:.2f}"),
            ("acceptance rate", f"{self.acceptance_rate:.1%} ({self.num_accepted_tokens}/{self.num_draft_tokens})"),
            ("acceptance by position", positions or "-"),
            ("draft lengths", str(self.control)),
            ("seconds", f"{self.total_seconds:.2f} ({seconds})"),
        ]


class Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since it was made."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
