"""One picture of a comparison: how fast each method is, and how acceptance falls with position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, or looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from specdec.bench import Measurement

COLOURS = ("#8d99ae", "#2a9d8f", "#e9a23b", "#d1603d", "#6d597a", "#457b9d")


def draw(measurements: Sequence[Measurement], path: Path, title: str) -> None:
    """Save bars of tokens per second by batch size, and acceptance by draft position, as a PNG."""
    figure, (speed, acceptance) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    methods = list(dict.fromkeys(m.method for m in measurements))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    _speed_bars(speed, measurements, colours)
    _acceptance_lines(acceptance, measurements, colours)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _speed_bars(axes: Axes, measurements: Sequence[Measurement], colours: dict[str, str]) -> None:
    batches = sorted({m.batch for m in measurements})
    width = 0.8 / len(colours)
    for i, (method, colour) in enumerate(colours.items()):
        own = {m.batch: m for m in measurements if m.method == method}
        places = [x + (i - (len(colours) - 1) / 2) * width for x, batch in enumerate(batches) if batch in own]
        found = [own[batch] for batch in batches if batch in own]
        bars = axes.bar(places, [m.tokens_per_second for m in found], width * 0.92, color=colour, label=method)
        axes.bar_label(bars, [f"{m.speedup:.2f}x" for m in found], padding=2, fontsize=8)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("tokens per second")
    axes.set_title("speed (and ratio to plain decoding)", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _acceptance_lines(axes: Axes, measurements: Sequence[Measurement], colours: dict[str, str]) -> None:
    largest = max(m.batch for m in measurements)
    for m in measurements:
        if m.batch == largest and m.acceptance_rate_per_position:
            positions = range(1, len(m.acceptance_rate_per_position) + 1)
            rates = [100 * rate for rate in m.acceptance_rate_per_position]
            axes.plot(positions, rates, marker="o", color=colours[m.method], label=m.method)
            axes.set_xticks(positions)
    axes.set_ylim(0, 100)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted up to here, % of drafts")
    axes.set_title(f"acceptance by position (batch {largest})", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
