"""How good is this drafter here, and what does that promise?

python evals/acceptance.py [--target DIR --draft DIR] [--spec-bench question.jsonl] [--jsonl FILE --field prompt]

By task: the share of guesses accepted at each position, the overlap of both laws (the chance that a drawn guess is
accepted), how often the target's choice is among the draft's first 1, 2, 4, 8, how many tokens a pass commits at every
draft length, and the speedup that costs and acceptance predict beside the measured one. Greedy, batch 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from specdec import bench
from specdec.controller import Controller, FixedLength
from specdec.costs import Costs
from specdec.demo import decoding_dtype_name, pair_or_demo
from specdec.drafters.model import ModelDrafter
from specdec.drafters.vocabularies import VocabularyDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.load import load
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.scoring import Text, scored
from specdec.sequences import Step
from specdec.training.data import CODE, task_prompts

RESULTS = Path(__file__).parent / "results"
LENGTHS = (1, 2, 3, 4, 6, 8)
FIRST = (1, 2, 4, 8)  # of the draft's tokens, by its own law
CONVERSATION = {
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
}  # of Spec-Bench
SOUND = 3  # measurements whose median is worth something
CALIBRATION = 2  # prompts on which costs are measured; no task is measured on them


@dataclass(frozen=True)
class TaskResult:
    """What a task showed. Lists are by draft length (``LENGTHS``), but ``survival`` by position and ``coverage`` by
    ``FIRST``; the last two and ``overlap`` are None for drafters that are no model of the target's tokens.
    """

    task: str
    prompts: int
    survival: list[float]
    tokens_per_pass: list[float]
    predicted_tokens: list[float]
    speedup: list[float]
    predicted_speedup: list[float]
    overlap: float | None
    coverage: list[float] | None


class Timing(FixedLength):
    """Drafts a fixed number of tokens, and notes by length what passes and drafts took."""

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__(num_draft_tokens)
        self.seconds: dict[int, list[tuple[float, float]]] = {}

    def observe(self, steps: Sequence[Step], draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
        super().observe(steps, draft_seconds, step_seconds, overhead)
        taken = (step_seconds + overhead) / len(steps), draft_seconds / len(steps)
        self.seconds.setdefault(max(steps[0].drafted), []).extend([taken] * len(steps))


class TimedEngine(Engine):
    """An engine that is told how to draft; see ``Timing``."""

    timing: Timing

    def controller(self, num_draft_tokens: int | str, *, greedy: bool) -> Controller:
        return self.timing


def conversation_as_one(tasks: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Spec-Bench's kinds of conversation (those of MT-Bench) as one task, as it reports them; in turns."""
    kinds = [prompts for task, prompts in tasks.items() if task in CONVERSATION]
    others = {task: prompts for task, prompts in tasks.items() if task not in CONVERSATION}
    mixed = [prompt for turn in zip(*kinds, strict=False) for prompt in turn]
    return others | ({"conversation": mixed} if mixed else {})


def measured_costs(engine: Engine, prompts: Sequence[list[int]], new_tokens: int, rounds: int = 5) -> Costs:
    """What passes over 1 .. tokens and their drafts cost at batch 1: medians of runs, in turns against disturbances."""
    timed = TimedEngine(engine.target, engine.drafter, vocab_size=engine.limits.vocab_size)
    costs = Costs()
    for k in (0, *LENGTHS) * rounds:
        timed.timing = Timing(k)
        for prompt in prompts:
            timed.generate(prompt, num_draft_tokens=k, max_new_tokens=new_tokens, eos_token_id=None)
        for width, found in timed.timing.seconds.items():
            if len(found) >= SOUND:
                costs.count_pass(1, width, statistics.median(step for step, _ in found))
                if width:
                    costs.count_draft(1, width, statistics.median(draft for _, draft in found))
    return costs


def expected_tokens(survival: Sequence[float], k: int) -> float:
    """Tokens that a pass commits: the last one, and every guess that is accepted with all before it."""
    return 1 + sum(survival[:k])


def predicted(costs: Costs, survival: Sequence[float], k: int) -> float:
    """Tokens per second with drafts of ``k`` over those of plain decoding, batch 1 (Leviathan et al. 2023, theorem 3.8,
    with passes that cost more the more they read)."""
    passes, drafts = costs.passes(1, max(LENGTHS)), costs.drafts(1, max(LENGTHS))
    return float(expected_tokens(survival, k) * passes[0] / (drafts[k] + passes[k]))


def measure(engine: Engine, prompts: Sequence[list[int]], new_tokens: int, rounds: int) -> list[bench.Run]:
    """Medians of interleaved rounds, plain decoding first, then every draft length; batch 1."""
    given = {"max_new_tokens": new_tokens, "temperature": 0.0}
    methods = {
        str(k): bench.one_by_one(bench.engine_method(engine, num_draft_tokens=k, **given)) for k in (0, *LENGTHS)
    }
    runs = bench.timed_rounds(methods, prompts, rounds=rounds)
    return [sorted(found, key=decoding_seconds)[len(found) // 2] for found in runs.values()]


def decoding_seconds(run: bench.Run) -> float:
    """Without reading the prompts, which drafting does not change."""
    assert run.stats is not None
    return run.stats.total_seconds - run.stats.prefill_seconds


def draft_model(engine: Engine) -> CachedLM | None:
    """The model that drafts tokens of the target's vocabulary, alone or beside a lookup; None if there is none."""
    drafter = getattr(engine.drafter, "model", engine.drafter)
    if not isinstance(drafter, ModelDrafter) or isinstance(drafter, VocabularyDrafter):
        return None
    return drafter.lm if drafter.lm.vocab_size >= engine.limits.vocab_size else None


def agreement(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float | None, list[float] | None]:
    """sum(min(p, q)) on text that the target samples, and coverage of its greedy text; by scoring with both models."""
    lm = draft_model(engine)
    if lm is None:
        return None, None
    size, given = engine.limits.vocab_size, {"max_new_tokens": new_tokens, "eos_token_id": None, "num_draft_tokens": 0}

    def both(temperature: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        written = engine.generate(prompts, temperature=temperature, seed=0, **given).token_ids
        texts = [Text(prompt, new) for prompt, new in zip(prompts, written, strict=True)]
        return list(zip(scored(engine.target, texts, size), scored(lm, texts, size), strict=True))

    overlaps = [torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1) for p, q in both(1.0)]
    hits = [q.topk(max(FIRST)).indices == p.argmax(-1, keepdim=True) for p, q in both(0.0)]
    found = torch.cat(hits).double()
    return float(torch.cat(overlaps).mean()), [float(found[:, :n].sum(-1).mean()) for n in FIRST]


def study(
    engine: Engine, task: str, prompts: Sequence[list[int]], costs: Costs, new_tokens: int, rounds: int
) -> TaskResult:
    """Everything about one task."""
    plain, *drafted = measure(engine, prompts, new_tokens, rounds)
    last = drafted[-1].stats
    assert last is not None
    survival = last.acceptance_rate_per_position + [0.0] * (max(LENGTHS) - len(last.acceptance_rate_per_position))
    overlap, coverage = agreement(engine, prompts, new_tokens)
    return TaskResult(
        task,
        len(prompts),
        survival,
        [run.stats.mean_acceptance_length for run in drafted if run.stats],
        [expected_tokens(survival, k) for k in LENGTHS],
        [decoding_seconds(plain) / decoding_seconds(run) for run in drafted],
        [predicted(costs, survival, k) for k in LENGTHS],
        overlap,
        coverage,
    )


def table(results: Sequence[TaskResult]) -> Table:
    """A row per task; the last four columns at the draft length that was fastest."""
    headings = ("overlap", f"top {FIRST[0]}", f"top {FIRST[-1]}", "1st", "k", "length", "speedup", "predicted")
    found = Table(
        Column("task", no_wrap=True),
        *headings,
        title="How good the drafter is, by task",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for r in results:
        best = int(np.argmax(r.speedup))
        shown = (r.overlap, r.coverage and r.coverage[0], r.coverage and r.coverage[-1])
        shares = ["-" if share is None else f"{share:.0%}" for share in shown]
        speeds = (f"{r.speedup[best]:.2f}x", f"{r.predicted_speedup[best]:.2f}x")
        found.add_row(
            r.task, *shares, f"{r.survival[0]:.0%}", str(LENGTHS[best]), f"{r.tokens_per_pass[best]:.2f}", *speeds
        )
    found.caption = (
        "overlap: sum of min(p, q); top n: the target's choice is among the draft's first n;\n1st: first guesses accepted; "
        "k: the fastest draft length; length: tokens per pass then"
    )
    return found


def draw(results: Sequence[TaskResult], path: Path) -> None:
    """Save acceptance by position, coverage, tokens per pass by draft length, and speedups, as a PNG."""
    figure, ((positions, covers), (lengths, speeds)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for r, colour in zip(results, COLOURS[1:] * len(results), strict=False):
        given: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": r.task}
        positions.plot(range(1, len(r.survival) + 1), [100 * share for share in r.survival], **given)
        if r.coverage is not None:
            covers.plot(range(len(FIRST)), [100 * share for share in r.coverage], **given)
        lengths.plot(LENGTHS, r.tokens_per_pass, "o", markersize=5, color=colour)
        lengths.plot(LENGTHS, r.predicted_tokens, color=colour, linewidth=1, label=r.task)
        speeds.plot(LENGTHS, r.speedup, "o", markersize=5, color=colour)
        speeds.plot(LENGTHS, r.predicted_speedup, color=colour, linewidth=1, label=r.task)
    _label(positions, "position in the draft", "accepted up to here, % of drafts", "acceptance by position")
    _label(covers, "the draft's first n tokens", "target's choice among them, %", "coverage")
    _label(
        lengths,
        "tokens drafted per pass",
        "tokens committed per pass",
        "dots: measured, lines: from acceptance by position",
    )
    _label(speeds, "tokens drafted per pass", "decoding speed to plain", "dots: measured, lines: predicted from costs")
    covers.set_xticks(range(len(FIRST)), [str(n) for n in FIRST])
    for axes in (positions, covers):
        axes.set_ylim(0, 102)
    speeds.axhline(1, color="#8d99ae", linestyle="--", linewidth=1)
    positions.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def error_of(results: Sequence[TaskResult]) -> float:
    """The median of how far predicted speedups are from measured ones, as a share."""
    pairs = [pair for r in results for pair in zip(r.predicted_speedup, r.speedup, strict=True)]
    return statistics.median(abs(promised / found - 1) for promised, found in pairs)


def main(
    target: Annotated[str | None, typer.Option(help="Target; default: the demo's pair.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Draft model, or suffix.")] = None,
    spec_bench: Annotated[Path | None, typer.Option(help="Spec-Bench's question.jsonl.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="A file of your own, one JSON object a line.")] = None,
    field: Annotated[str, typer.Option(help="Where its prompts are.")] = "prompt",
    dataset: Annotated[str, typer.Option(help="A dataset of the hub; --field names its text.")] = "",
    prompts: Annotated[int, typer.Option(help="Of every task.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="The last so many of every prompt are read.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens after every prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds; medians count.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto: what this machine computes fastest.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Study every task, print, draw, write."""
    console = Console()
    where, given = pair_or_demo(target, draft)
    engine = load(where, draft=given, dtype=decoding_dtype_name() if dtype == "auto" else dtype)
    if engine.tokenizer is None:
        raise ConfigError("tasks are text, and the target has no tokenizer next to its weights; save one there")
    files = {spec_bench: "turns", jsonl: field}
    tasks = task_prompts(
        engine.tokenizer, count=prompts + CALIBRATION, tokens=prompt_tokens, dataset=dataset, text_key=field,
        jsonl={file: key for file, key in files.items() if file is not None},
    )  # fmt: skip
    tasks = conversation_as_one(tasks)
    with console.status("what passes cost"):
        costs = measured_costs(engine, tasks[CODE][:CALIBRATION], new_tokens // 2)
    results = []
    for name, texts in tasks.items():
        with console.status(name):
            results.append(
                study(engine, name, texts[CALIBRATION:] if name == CODE else texts[:prompts], costs, new_tokens, rounds)
            )
    console.print(table(results))
    console.print(f"predicted speedups are {error_of(results):.0%} off, in the median")
    settings = {
        "dtype": str(engine.target.dtype),
        "lengths": LENGTHS,
        "first": FIRST,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    figures = {"settings": settings, "costs": costs.as_dict(), "prediction_error": error_of(results)}
    write_figures(out / "acceptance.json", {**figures, "tasks": [asdict(r) for r in results]})
    draw(results, out / "acceptance.png")


if __name__ == "__main__":
    typer.run(main)
