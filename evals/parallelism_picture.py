"""The tables and the picture of ``parallelism.py``; this file alone measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from specdec.picture import COLOURS

from matplotlib import pyplot as plt  # isort: skip (after specdec.picture, which needs no display)
from matplotlib.axes import Axes  # isort: skip

NAMES = {"GPT": COLOURS[1], "LSTM": COLOURS[3]}


def steps_of(found: Mapping[str, Any], text: int) -> dict[str, float]:
    """Serial steps that ``text`` tokens take, by who does what with them."""
    ways, passes = found["encoder_decoder"], found["decoding"]
    return {
        "LSTM learns": found["steps"]["LSTM"],
        "GPT learns": found["steps"]["GPT"],
        **{f"T5's {name}": way["steps"] for name, way in ways.items()},
        **{f"GPT writes {name}": way["passes_per_token"] * text for name, way in passes.items()},
    }


def tables(found: Mapping[str, Any], text: int) -> Iterator[Table]:
    """What was measured, in three tables."""
    steps = Table("who does what", "serial steps", title=f"Serial steps for {text} tokens, counted")
    for name, count in steps_of(found, text).items():
        steps.add_row(name, f"{count:.0f}")
    yield steps
    learning = Table("tokens/s", *NAMES, title="Training speed: one row of N tokens; the same tokens as rows x length")
    for what, where in (("by_length", ""), ("by_layout", ""), ("by_layout_on_one_core", ", one core")):
        for key in found[what]["GPT"]:
            learning.add_row(f"{key}{where}", *(f"{found[what][name][key]:,.0f}" for name in NAMES))
        learning.add_section()
    yield learning
    others = Table("what", "ms", title="One after another, or together")
    for name in NAMES:
        for way in ("whole", "by position"):
            others.add_row(f"{name} learns {text} tokens, {way}", f"{1e3 * found['learning'][name][way]:.0f}")
    for form in ("together", "in parts"):
        others.add_row(f"one block, heads and feed-forward {form}", f"{1e3 * found['block'][form]:.1f}")
    for name, way in found["encoder_decoder"].items():
        others.add_row(f"T5's {name} {text} tokens", f"{1e3 * way['seconds']:.1f}")
    yield others
    decoding = Table("decoding", "tokens/s", "passes per token", title="GPT, one row, greedy")
    for name, way in found["decoding"].items():
        decoding.add_row(name, f"{way['tokens_per_second']:.0f}", f"{way['passes_per_token']:.2f}")
    yield decoding


def draw(found: Mapping[str, Any], text: int, path: Path) -> None:
    """Save the story as a PNG: training in parallel above, one after another below."""
    figure, places = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    _draw_speeds(places[0, 0], found["by_length"], "-", "tokens in the row", "Training: one row, longer and longer")
    label, title = "rows x length, the same tokens", "Training: many rows or long ones (dotted: one core)"
    _draw_speeds(places[0, 1], found["by_layout"], "-", label, title)
    _draw_speeds(places[0, 1], found["by_layout_on_one_core"], ":", label, title)
    _draw_learning(places[0, 2], found["learning"], text)
    _draw_steps(places[1, 0], steps_of(found, text), text)
    together = {f"heads and feed-forward\n{form}": 1e3 * found["block"][form] for form in ("together", "in parts")}
    together |= {f"T5's {name}\n{text} tokens": 1e3 * way["seconds"] for name, way in found["encoder_decoder"].items()}
    _draw_bars(places[1, 1], together, "milliseconds", "Together, or one after another", log=True)
    speeds = {
        f"{name}\n{way['passes_per_token']:.2f} passes/token": way["tokens_per_second"]
        for name, way in found["decoding"].items()
    }
    _draw_bars(places[1, 2], speeds, "tokens per second", "GPT decoding, one row", log=False)
    for axes in places.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A Transformer trains on all positions at once; it writes one after another", fontsize=13)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_speeds(axes: Axes, speeds: Mapping[str, Mapping[Any, float]], style: str, label: str, title: str) -> None:
    for name, own in speeds.items():
        known = name if style == "-" else None
        axes.plot(range(len(own)), list(own.values()), style, marker="o", color=NAMES[name], label=known)
        axes.set_xticks(range(len(own)), [str(key) for key in own], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel("tokens learned per second")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_learning(axes: Axes, learning: Mapping[str, Mapping[str, float]], text: int) -> None:
    for i, (name, own) in enumerate(learning.items()):
        for shift, way in ((-0.2, "whole"), (0.2, "by position")):
            colour = NAMES[name] if way == "whole" else COLOURS[0]
            bars = axes.bar(i + shift, own[way], 0.36, color=colour)
            axes.bar_label(bars, [f"{way}\n{own[way]:.2f} s"], fontsize=8, padding=2)
    axes.set_xticks(range(len(learning)), list(learning))
    axes.set_yscale("log")
    axes.margins(y=0.3)
    axes.set_ylabel("seconds per update")
    axes.set_title(f"Learning {text} tokens: the same gradient", fontsize=10)


def _draw_steps(axes: Axes, steps: Mapping[str, float], text: int) -> None:
    colours = [COLOURS[3] if count > 1 else COLOURS[1] for count in steps.values()]
    bars = axes.barh(range(len(steps)), list(steps.values()), color=colours)
    axes.bar_label(bars, [f"{count:.0f}" for count in steps.values()], fontsize=8, padding=3)
    axes.set_yticks(range(len(steps)), list(steps), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.5, 4 * text)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"calls that wait for each other, for {text} tokens")
    axes.set_title("Serial steps, counted", fontsize=10)


def _draw_bars(axes: Axes, values: Mapping[str, float], label: str, title: str, *, log: bool) -> None:
    bars = axes.barh(range(len(values)), list(values.values()), color=COLOURS[1 : 1 + len(values)])
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], fontsize=8, padding=3)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
