"""The progress bar of a training run, and messages next to it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_REFRESH_PER_SECOND = 2


class TrainingProgress:
    """A bar on standard error with losses, speed and time left; silent when not ``visible``."""

    def __init__(self, title: str, *, visible: bool) -> None:
        self.console = Console(stderr=True, quiet=not visible)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            refresh_per_second=_REFRESH_PER_SECOND,
            disable=not visible,
        )
        self._task = self._bar.add_task(escape(title), total=1.0, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, highlight=False, markup=False)

    def end(self, message: str) -> None:
        """Print a line instead of the bar."""
        self._bar.update(self._task, visible=False)
        self.say(message)

    def update(self, progress: float, *, losses: tuple[float, float], tokens_per_second: float, seconds: float) -> None:
        """Show ``progress`` in [0, 1] with the losses of target and draft; ``seconds`` were spent so far."""
        left = seconds * (1 - progress) / progress if progress > 0 else 0.0
        status = f"target {losses[0]:.3f}  draft {losses[1]:.3f}  {tokens_per_second:,.0f} tokens/s  {left:.0f} s left"
        self._bar.update(self._task, completed=progress, status=status)
