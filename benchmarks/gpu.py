"""How fast a GPU decodes a 1 B-class model: alone, with a draft, and beside Hugging Face; batch 1 to 64.

python benchmarks/gpu.py [--pair DIR] [--rounds 5] [--batches 1 4 16 64] [--out benchmarks/results]

The target is the trained one of the pair (the demo's by default), widened to 1.2 B parameters, bfloat16; the draft is
the pair's. Hugging Face runs at batch 1 only: its assisted generation takes no batches. Writes gpu.json and gpu.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from specdec import bench, sweep
from specdec.bench import PLAIN, Measurement
from specdec.demo import demo_pair
from specdec.limit import Limit
from specdec.picture import draw
from specdec.report import write_figures
from specdec.training.data import gather, held_out_prompts
from specdec.widen import Width, wide_pair

Measurements = list[Measurement]
WIDTH = Width(3072, 13824)
LENGTHS: tuple[int | str, ...] = (3, 5, "auto")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 128, 64  # prompts at batch 1


def measured(pair: Path, batches: list[int], rounds: int, console: Console) -> Iterator[tuple[Measurements, Limit]]:
    """Every way at every batch size, and how often the GPU could read the weights; after each batch size."""
    target, draft = wide_pair(pair, WIDTH)
    plain, drafting = sweep.engines(str(target), [str(draft)], dtype="bfloat16", device="cuda")
    assert plain.tokenizer is not None
    family = next(iter(drafting))
    own = sweep.own_ways(plain, {family: drafting[family]}, LENGTHS, NEW_TOKENS)
    theirs = [
        replace(way, largest_batch=1)
        for way in sweep.hf_ways(str(target), str(draft), plain, LENGTHS, NEW_TOKENS)
        if not way.family.endswith("lookup")
    ]
    prompts = held_out_prompts(plain.tokenizer, gather("stdlib"), count=max(*batches, PROMPTS), tokens=PROMPT_TOKENS)
    found: Measurements = []
    for batch in batches:
        found += sweep.measure(
            [*own, *theirs], prompts[: max(batch, PROMPTS)], batches=[batch], temperatures=[0.0, 1.0], rounds=rounds,
            console=console, memory=plain.target.read_bandwidth,
        )  # fmt: skip
        limit = sweep.limit_of(found, plain.target.weight_bytes)
        assert limit is not None
        yield found, limit


def ratios(found: Measurements, limit: Limit) -> dict[str, float]:
    """What the project has promised, of the cells at batch 1."""
    result = {}
    for temperature in sorted({m.temperature for m in found}):
        here = {m.method: m for m in found if (m.batch, m.temperature) == (1, temperature)}
        if not here:
            continue
        kind = bench.kind_of_text(temperature)
        best = {
            name: max(m.tokens_per_second for m in here.values() if m.family.startswith(name))
            for name in {m.family for m in here.values()}
        }
        ours = max(speed for name, speed in best.items() if not name.startswith("HF") and name != PLAIN)
        if (could_be_given := here[PLAIN].bytes_per_pass) is not None:
            result[f"{kind}: plain / limit"] = limit.weight_bytes / could_be_given
        result[f"{kind}: draft / plain"] = ours / best[PLAIN]
        for name in sorted(best):
            if name.startswith("HF"):
                result[f"{kind}: draft / {name}"] = ours / best[name]
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair", type=Path, help="folder with target/ and draft/; default: the demo's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; this benchmark is about nothing else")
    console = Console(width=100)
    pair = given.pair or demo_pair(console)
    for found, limit in measured(pair, given.batches, given.rounds, console):
        figures = {"ratios": ratios(found, limit), "limit": limit.as_dict(), "cells": [m.as_dict() for m in found]}
        write_figures(given.out / "gpu.json", figures)
    console.print(bench.table(found, f"{limit.weight_bytes / 2e9:.2f} B parameters, medians of {given.rounds} rounds"))
    console.print_json(json.dumps(figures["ratios"]))
    groups = {f"batch {b}": [m for m in found if m.batch == b and not m.temperature] for b in given.batches}
    draw(groups, given.out / "gpu.png", f"{torch.cuda.get_device_name()}, greedy")


if __name__ == "__main__":
    main()
