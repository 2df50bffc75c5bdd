"""Does distillation pay? The same draft, the same number of tokens, four ways to learn; accepted length decides.

python benchmarks/distill_pays.py [--tokens N]    writes benchmarks/results/distill.json, models/distill.png, models/README.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from rich.console import Console

from specdec.checkpoints import load_model
from specdec.demo import decoding_dtype_name, demo_pair, training_dtype_name
from specdec.distill import distill
from specdec.load import load
from specdec.machine import machine
from specdec.training.data import gather, held_out_prompts
from specdec.training.distill_recipe import DistillSettings

RESULTS = Path(__file__).parent / "results/distill.json"
MODELS = Path(__file__).parents[1] / "models"
BEGIN, END = "<!-- distill: begin -->", "<!-- distill: end -->"
WAYS = {
    "cross-entropy on text": {"loss": "cross_entropy", "on_policy": 0.0},
    "KL on text": {"loss": "forward_kl", "weigh_positions": False, "on_policy": 0.0},
    "LK on text": {"loss": "lk_hybrid", "on_policy": 0.0},
    "LK on text, then on the target's": {"loss": "lk_hybrid", "on_policy": 0.5},
}
PROMPTS, NEW_TOKENS, DRAFTED = 16, 96, 4


@dataclass(frozen=True)
class Result:
    """Mean accepted lengths of decodes of held-out prompts, with the draft that a way to learn made."""

    way: str
    tokens: int
    seconds: float
    greedy: float
    sampled: float


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300_000, help="positions that every draft learns from")
    parser.add_argument("--shape", default="tiny", help="the draft's shape, see specdec distill")
    arguments = parser.parse_args()
    found = [measure(way, changes, arguments.tokens, arguments.shape) for way, changes in WAYS.items()]
    figures = {"machine": machine(), "shape": arguments.shape, "results": [asdict(one) for one in found]}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(found, MODELS / "distill.png")
    table = markdown(found, arguments.shape)
    readme = MODELS / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.split(BEGIN)[0] + table + text.split(END)[1], encoding="utf-8")
    Console().print(table)


def measure(way: str, changes: dict[str, object], tokens: int, shape: str) -> Result:
    """Train one draft and decode held-out prompts with it, greedy and at temperature 1."""
    target = demo_pair() / "target"
    corpus = gather("stdlib")
    model, tokenizer = load_model(target, dtype=training_dtype_name())
    settings = DistillSettings(shape=shape, max_tokens=tokens, evaluate_every=tokens, patience=0, **changes)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        report = distill(model, tokenizer, corpus, Path(folder) / "draft", settings)  # type: ignore[arg-type]
        engine = load(target, draft=Path(folder) / "draft", dtype=decoding_dtype_name())
    prompts = held_out_prompts(tokenizer, corpus, count=PROMPTS, tokens=128)  # type: ignore[arg-type]
    lengths = [
        engine.generate(
            prompts, max_new_tokens=NEW_TOKENS, temperature=t, seed=0, num_draft_tokens=DRAFTED, eos_token_id=None
        ).stats.mean_acceptance_length
        for t in (0.0, 1.0)
    ]
    last = report.evaluations[-1]
    return Result(way, last.tokens, last.seconds, lengths[0], lengths[1])


def markdown(found: list[Result], shape: str) -> str:
    """The table, between its marks."""
    base = found[0]
    said = (
        f"A `{shape}` draft for the demo's target, {base.tokens:,} tokens each, {PROMPTS} held-out prompts, "
        f"{DRAFTED} tokens per draft: mean accepted length (ratio to the first way)."
    )
    lines = [
        BEGIN,
        said,
        "",
        "| the draft learns from | greedy | T = 1 |",
        "|---|---|---|",
    ]
    for one in found:
        ratios = (
            f"{one.greedy:.2f} ({one.greedy / base.greedy:.2f}x)",
            f"{one.sampled:.2f} ({one.sampled / base.sampled:.2f}x)",
        )
        lines.append(f"| {one.way} | {ratios[0]} | {ratios[1]} |")
    return "\n".join([*lines, "", "![Accepted length by way to learn](distill.png)", END])


def draw(found: list[Result], path: Path) -> None:
    """Bars of accepted lengths, greedy and sampled, by way to learn."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for shift, name, colour in ((-0.2, "greedy", "#2a9d8f"), (0.2, "sampled", "#e9a23b")):
        values = [getattr(one, name) for one in found]
        bars = axes.barh([i + shift for i in range(len(found))], values, 0.36, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(found)), [one.way for one in found])
    axes.invert_yaxis()
    axes.set_xlim(left=1)
    axes.set_xlabel("tokens per pass of the target (plain decoding: 1)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    main()
