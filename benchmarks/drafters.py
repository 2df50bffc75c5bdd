"""Every way to guess, side by side: how much the target accepts, what drafting costs, tokens per second.

python benchmarks/drafters.py [--tokens N] [--rounds R]

Drafters that are trained learn from as many tokens each, for the demo's target: a draft model from text alone, one
distilled on text and then on what the target writes, a block and an EAGLE-3 head in the same way. They are kept next to
the demo's pair, so that measuring again is quick. Held-out prompts, ways in turn; draft ms are in models, per pass of the
target.
Writes benchmarks/results/drafters.json and .png, and the table of benchmarks/DRAFTERS.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from rich.console import Console

from specdec import bench
from specdec.bench import PLAIN, Measurement, Method, kind_of_text
from specdec.checkpoints import load_model
from specdec.controller import AUTO
from specdec.demo import decoding_dtype_name, demo_pair, training_dtype_name
from specdec.distill import distill_checkpoint
from specdec.engine import Engine
from specdec.heads import train_checkpoint
from specdec.load import load
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.training.data import gather, held_out_prompts
from specdec.training.distill_recipe import DistillSettings
from specdec.training.head_trainer import HeadSettings

RESULTS = Path(__file__).parent / "results/drafters.json"
PAGE = Path(__file__).parent / "DRAFTERS.md"
ON_TEXT, DISTILLED, BLOCK = "draft model, text only", "draft model, distilled", "block head"
EAGLE, NARROW = "EAGLE-3 head", "EAGLE-3 head, half as wide"
CHAIN, LONGER, TREES = 4, {DISTILLED: (8, 15), NARROW: (6, 8)}, (16, 32, 48)
PROMPTS, NEW_TOKENS = 8, 96
CELLS = [(batch, temperature) for batch in (1, PROMPTS) for temperature in (0.0, 1.0)]


def trained(name: str, tokens: int, target: Path) -> Path:
    """The folder of a drafter that learned from ``tokens``, trained now unless it was before."""
    out = target.parent / f"drafters-{tokens}" / name.replace(" ", "-").replace(",", "")
    if (out / "config.json").exists():
        return out
    Console(stderr=True).print(f"training: {name}")
    if name in (ON_TEXT, DISTILLED):
        changes = {"loss": "cross_entropy", "on_policy": 0.0} if name == ON_TEXT else {"on_policy": 0.5}
        settings = DistillSettings(max_tokens=tokens, evaluate_every=tokens // 4, patience=0, **changes)  # type: ignore[arg-type]
        distill_checkpoint(str(target), out, "stdlib", settings, dtype=training_dtype_name())
    else:
        kind = "block" if name == BLOCK else "eagle3"
        width = load_model(target, dtype="float32")[0].config.hidden_size // 2 if name == NARROW else 0
        head = HeadSettings(max_tokens=tokens, on_policy=0.5, evaluations=4)
        train_checkpoint(str(target), kind, out, "stdlib", head, width=width, dtype=training_dtype_name())
    return out


def methods(tokens: int, target: Path, temperature: float) -> dict[str, Method]:
    """Every drafter at one length of draft, and where the controller chooses it; a target of its own for each."""
    again = partial(load, target, dtype=decoding_dtype_name())
    chains: dict[str, Engine] = {name: again(draft=trained(name, tokens, target))
                                 for name in (ON_TEXT, DISTILLED, BLOCK, EAGLE, NARROW)}  # fmt: skip
    distilled = trained(DISTILLED, tokens, target)
    chains |= {"suffix": again(draft="suffix"), "the target itself": again(draft="self"),
               "distilled and suffix": again(draft=[distilled, "suffix"])}  # fmt: skip
    trees = {name: again(draft=trained(name, tokens, target), tree=True) for name in (DISTILLED, BLOCK, EAGLE)}
    ways = {PLAIN: (again(draft=None), 0)}
    ways |= {name: (engine, CHAIN) for name, engine in chains.items()}
    ways |= {
        f"{name}, {length} tokens": (chains[name], length) for name, lengths in LONGER.items() for length in lengths
    }
    ways |= {f"tree of {nodes}, {name}": (tree, nodes) for name, tree in trees.items() for nodes in TREES}
    ways |= {f"{name} ({AUTO})": (engine, AUTO) for name, engine in chains.items()}
    ways[f"tree, {DISTILLED} ({AUTO})"] = (trees[DISTILLED], AUTO)
    return {name: bench.engine_method(engine, num_draft_tokens=length, max_new_tokens=NEW_TOKENS,
                                      temperature=temperature, seed=0) for name, (engine, length) in ways.items()}  # fmt: skip


def measure(tokens: int, rounds: int) -> list[Measurement]:
    """All ways in all cells."""
    target = demo_pair() / "target"
    _, tokenizer = load_model(target, dtype=decoding_dtype_name())
    prompts = held_out_prompts(tokenizer, gather("stdlib"), count=PROMPTS, tokens=128)  # type: ignore[arg-type]
    found = []
    for batch, temperature in CELLS:
        ways = methods(tokens, target, temperature)
        if batch == 1:
            ways = {name: bench.one_by_one(way) for name, way in ways.items()}
        cell = bench.compare(ways, prompts, rounds=rounds, temperature=temperature)
        found += [replace(one, batch=batch) for one in cell]
    return found


def draft_milliseconds(m: Measurement) -> float:
    """What models that draft take per pass of the target."""
    if not m.draft_share or not m.passes_per_second or m.prefill_share is None:
        return 0.0
    return 1e3 * m.draft_share / (1 - m.prefill_share) / m.passes_per_second


def markdown(found: Sequence[Measurement], tokens: int) -> str:
    """One line per way: accepted length, draft milliseconds and speed to plain decoding in every cell."""
    heads = [f"batch {batch}, {kind_of_text(temperature)}" for batch, temperature in CELLS]
    said = (
        f"Trained drafters learned from {tokens:,} tokens each; drafts of {CHAIN} tokens, trees as named, `auto` where "
        f"the controller chooses; it begins without knowing anything of a drafter, in runs of a tenth of a second. {PROMPTS} "
        f"held-out prompts, {NEW_TOKENS} new tokens. In a cell: tokens per pass of the target, milliseconds in models that "
        "draft per pass, tokens per second to plain decoding."
    )
    lines = ["# Every drafter", "", said, "", f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(CELLS)]
    for name in dict.fromkeys(m.method for m in found):
        cells = {m.cell: m for m in found if m.method == name}
        texts = [f"{m.mean_acceptance_length:.2f} / {draft_milliseconds(m):.2f} ms / {m.speedup:.2f}x"
                 for m in (cells[cell] for cell in CELLS)]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(texts)} |")
    command = "Made by `python benchmarks/drafters.py`."
    return "\n".join(
        [*lines, "", "![Accepted length and speed of every drafter](results/drafters.png)", "", command, ""]
    )


def draw(found: Sequence[Measurement], path: Path) -> None:
    """Accepted lengths of fixed drafts, and speeds to plain decoding, at batch 1."""
    names = [name for name in dict.fromkeys(m.method for m in found) if AUTO not in name and name != PLAIN][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for shift, temperature, colour in ((0.2, 0.0, COLOURS[1]), (-0.2, 1.0, COLOURS[2])):
        here: Mapping[str, Measurement] = {m.method: m for m in found if m.cell == (1, temperature)}
        places = [i + shift for i in range(len(names))]
        lengths = [here[name].mean_acceptance_length or 1.0 for name in names]
        label = kind_of_text(temperature)
        bars = left.barh(places, lengths, 0.36, color=colour, label=label)
        left.bar_label(bars, [f"{length:.2f}" for length in lengths], padding=2, fontsize=8)
        speeds = [here[name].speedup for name in names]
        bars = right.barh(places, speeds, 0.36, color=colour)
        right.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=2, fontsize=8)
    left.set_yticks(range(len(names)), names)
    left.set_xlim(left=1)
    left.set_xlabel("tokens per pass of the target, batch 1")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("tokens per second to plain decoding, batch 1")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train, measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600_000, help="that every trained drafter learns from")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.tokens, arguments.rounds)
    write_figures(RESULTS, {"tokens": arguments.tokens, "measurements": [m.as_dict() for m in found]})
    PAGE.write_text(markdown(found, arguments.tokens), encoding="utf-8")
    draw(found, RESULTS.with_suffix(".png"))
    Console().print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
