"""Pictures of comparisons: how fast each method is, where its time goes, how acceptance falls with position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, or looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from specdec.bench import PARTS, Measurement, kind_of_text
from specdec.controller import AUTO

COLOURS = ("#8d99ae", "#2a9d8f", "#e9a23b", "#d1603d", "#6d597a", "#457b9d", "#9a031e", "#606c38", "#000000")
PART_COLOURS = ("#ced4da", "#e9a23b", "#2a9d8f", "#6d597a")


def draw(groups: Mapping[str, Sequence[Measurement]], path: Path, title: str) -> None:
    """Save bars of speeds to plain decoding, a group of methods each, and acceptance by draft position, as a PNG."""
    figure, (speed, acceptance) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    methods = list(dict.fromkeys(m.method for own in groups.values() for m in own))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    _speed_bars(speed, groups, colours)
    _acceptance_lines(acceptance, groups, colours)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _speed_bars(axes: Axes, groups: Mapping[str, Sequence[Measurement]], colours: dict[str, str]) -> None:
    width = 0.84 / len(colours)
    crowded = len(colours) * len(groups) > 16
    for i, (method, colour) in enumerate(colours.items()):
        own = [(x, m) for x, group in enumerate(groups.values()) for m in group if m.method == method]
        places = [x + (i - (len(colours) - 1) / 2) * width for x, _ in own]
        bars = axes.bar(places, [m.speedup for _, m in own], width * 0.92, color=colour, label=method)
        labels = [_short(m.tokens_per_second) for _, m in own]
        axes.bar_label(bars, labels, padding=2, fontsize=7, rotation=90 if crowded else 0)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("times plain decoding")
    axes.set_title("speed (numbers: tokens per second)", fontsize=10)
    axes.margins(y=0.3)  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate < 1e4 else f"{rate / 1e3:.1f}k"


def _acceptance_lines(axes: Axes, groups: Mapping[str, Sequence[Measurement]], colours: dict[str, str]) -> None:
    """Those of the group with the longest drafts."""
    name = max(groups, key=lambda name: max((len(m.acceptance_rate_per_position) for m in groups[name]), default=0))
    for m in groups[name]:
        if m.acceptance_rate_per_position:
            positions = range(1, len(m.acceptance_rate_per_position) + 1)
            rates = [100 * rate for rate in m.acceptance_rate_per_position]
            axes.plot(positions, rates, marker="o", color=colours[m.method], label=m.method)
    axes.set_ylim(0, 100)
    _label_positions(axes, max((len(m.acceptance_rate_per_position) for m in groups[name]), default=0))
    axes.set_ylabel("accepted up to here, % of drafts")
    axes.set_title(f"acceptance by position\n({' '.join(name.split())})", fontsize=9)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _label_positions(axes: Axes, last: int) -> None:
    """Whole numbers, from 1 to the ``last`` position, however few there are."""
    axes.set_xlim(0.5, max(last, 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("position in the draft")


def draw_sweep(measurements: Sequence[Measurement], path: Path, title: str) -> None:
    """Save, for every batch size and temperature, speed by draft length, time by part and acceptance by position."""
    cells = list(dict.fromkeys(m.cell for m in measurements))
    families = list(dict.fromkeys(m.family for m in measurements))
    colours = {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(families)}
    figure, rows = plt.subplots(
        len(cells), 3, figsize=(15, 4.2 * len(cells)), width_ratios=(4, 3, 3), layout="constrained", squeeze=False
    )
    for (batch, temperature), (speed, parts, acceptance) in zip(cells, rows, strict=True):
        here = [m for m in measurements if m.cell == (batch, temperature)]
        _speed_by_length(speed, here, colours)
        _time_by_part(parts, here)
        _acceptance_by_position(acceptance, here, colours)
        speed.set_title(f"batch {batch}, {kind_of_text(temperature)}", fontsize=10)
        for axes in (speed, parts, acceptance):
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _speed_by_length(axes: Axes, here: Sequence[Measurement], colours: dict[str, str]) -> None:
    """A line per family over its fixed lengths, 0 being plain decoding; what is chosen as it goes stands at the end."""
    longest = max((m.num_draft_tokens for m in here if isinstance(m.num_draft_tokens, int)), default=0)
    for family, colour in colours.items():
        own = [m for m in here if m.family == family]
        fixed = sorted((m.num_draft_tokens, m.tokens_per_second) for m in own if isinstance(m.num_draft_tokens, int))
        if len(fixed) == 1 and fixed[0][0] == 0:
            axes.axhline(fixed[0][1], color=colour, linestyle="--", linewidth=1.2, label=family)
        elif fixed:
            axes.plot(*zip(*fixed, strict=True), marker="o", markersize=4, color=colour, label=family)
        for m in own:
            if m.num_draft_tokens == AUTO:
                label = None if fixed else family
                axes.plot(longest + 1, m.tokens_per_second, marker="*", markersize=12, color=colour, label=label)
    labels = [*map(str, range(longest + 1)), *([AUTO] if any(m.num_draft_tokens == AUTO for m in here) else [])]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("tokens drafted per step")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def _time_by_part(axes: Axes, here: Sequence[Measurement]) -> None:
    """Stacked bars of plain decoding and of every drafter at its fastest."""
    fastest: dict[str, Measurement] = {}
    for m in sorted((m for m in here if m.draft_share is not None), key=lambda m: m.tokens_per_second):
        fastest[m.family] = m
    shown = [fastest[family] for family in dict.fromkeys(m.family for m in here) if family in fastest][::-1]
    left = [0.0] * len(shown)
    for (name, field), colour in zip(PARTS.items(), PART_COLOURS, strict=True):
        widths = [100 * (getattr(m, field) or 0.0) for m in shown]
        axes.barh(range(len(shown)), widths, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), [m.method for m in shown], fontsize=8)
    axes.set_xlabel("% of the time")
    axes.set_title("time by part, each drafter at its fastest", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.14))


def _acceptance_by_position(axes: Axes, here: Sequence[Measurement], colours: dict[str, str]) -> None:
    """Every drafter's longest drafts, of a fixed length where there is one."""
    longest: dict[str, Measurement] = {}
    for m in sorted(here, key=lambda m: (m.num_draft_tokens != AUTO, len(m.acceptance_rate_per_position))):
        if m.acceptance_rate_per_position:
            longest[m.family] = m
    for family, m in sorted(longest.items(), key=lambda item: list(colours).index(item[0])):
        rates = [100 * rate for rate in m.acceptance_rate_per_position]
        places = range(1, len(rates) + 1)
        axes.plot(places, rates, marker="o", markersize=4, color=colours[family], label=m.method)
    axes.set_ylim(0, 103)
    _label_positions(axes, max((len(m.acceptance_rate_per_position) for m in longest.values()), default=0))
    axes.set_ylabel("accepted up to here, % of drafts")
    axes.set_title("acceptance by position", fontsize=10)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
