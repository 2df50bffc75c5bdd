"""The log of a run: a line of JSON per update and evaluation, the same to trackers, and a picture of both.

A run that is continued forgets what was logged after its checkpoint, so that every step is in the log once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from specdec.training.checkpoint import write_text
from specdec.training.report import CURVES, LOG, TENSORBOARD

_COLOURS = {"target": "#2a9d8f", "draft": "#d1603d"}
_LEARNED = {"target": "training text", "draft": "distilled (another scale)"}
_POINTS = 200  # in the picture: training losses are averaged over as many spans


class Journal:
    """Writes log.jsonl and curves.png into ``folder``, and to the trackers of ``accelerator``; one process does.

    A disk that takes no more costs lines of the log, never the run.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, writes: bool) -> None:
        self.folder, self.accelerator, self.writes = folder, accelerator, writes
        self._file: IO[str] | None = None

    def begin(self, step: int) -> None:
        """Open the log after update ``step``, and the trackers."""
        if self.accelerator.log_with:
            self.accelerator.init_trackers(TENSORBOARD)
        if not self.writes:
            return
        kept = [entry for entry in read_log(self.folder) if entry["step"] <= step]
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            write_text(self.folder / LOG, "".join(json.dumps(entry) + "\n" for entry in kept))
            self._file = (self.folder / LOG).open("a", encoding="utf-8")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Log the training losses of update ``step``."""
        self._write({"step": step, **values})
        if self.accelerator.trackers:
            self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Log what was measured on held-out text after update ``step``."""
        self._write({"step": step, "held_out": values})
        if self.accelerator.trackers:
            flat = {name: value for name, value in values.items() if isinstance(value, float)}
            flat |= {f"accepted_to_{i}": share for i, share in enumerate(values["acceptance_per_position"], 1)}
            self.accelerator.log({f"held_out/{name}": value for name, value in flat.items()}, step=step)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Hand the log to the operating system, as far as it is written."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.flush()

    def close(self) -> None:
        """Close the log and draw its curves."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            draw(read_log(self.folder), self.folder / CURVES)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of log.jsonl; a last line that was cut off is left out."""
    entries = []
    with contextlib.suppress(OSError):
        for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Save losses, expected acceptance by position and measured length over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed, or looked for
    from matplotlib import pyplot as plt

    updates = [entry for entry in entries if "held_out" not in entry]
    found = [(entry["step"], entry["held_out"]) for entry in entries if "held_out" in entry]
    figure, (losses, accepted, lengths) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for model, colour in _COLOURS.items():
        points = _averaged([(entry["step"], entry[f"{model}_loss"]) for entry in updates])
        losses.plot(
            *zip(*points, strict=True) if points else ((), ()),
            color=colour,
            alpha=0.45,
            label=f"{model}, {_LEARNED[model]}",
        )
        held_out = [(step, values[f"{model}_loss"]) for step, values in found]
        losses.plot(
            *zip(*held_out, strict=True) if held_out else ((), ()), "o-", color=colour, label=f"{model}, held out"
        )
    for i in range(max((len(values["acceptance_per_position"]) for _, values in found), default=0)):
        shares = [100 * values["acceptance_per_position"][i] for _, values in found]
        accepted.plot([step for step, _ in found], shares, "o-", label=f"up to position {i + 1}")
    measured = [(step, values["mean_acceptance_length"]) for step, values in found if values["mean_acceptance_length"]]
    lengths.plot(*zip(*measured, strict=True) if measured else ((), ()), "o-", color="#457b9d")
    titles = ("loss, nats per token", "expected to be accepted, %", "tokens per target pass, greedy decode")
    for axes, title in zip((losses, accepted, lengths), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    with contextlib.suppress(OSError):
        figure.savefig(path, dpi=120)
    plt.close(figure)


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over at most ``_POINTS`` neighbouring spans."""
    size = max(len(points) // _POINTS, 1)
    spans = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in span) / len(span), sum(y for _, y in span) / len(span)) for span in spans]
