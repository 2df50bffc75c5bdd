"""Does a draft without keys and values guess as well as a GPT of its size, and what does a guess cost?

python evals/recurrent.py [--seconds N | --tokens N] [--target DIR]

An LSTM and a GPT of as many parameters are distilled from the same target on the same number of tokens; then both draft
four tokens per step, greedy and at temperature 1, at batch sizes 1 and 8, beside plain decoding. The GPT learns for N
seconds (or from N tokens), the LSTM from as many tokens. Each has the learning rate that is usual for its kind.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from specdec.bench import PLAIN, Measurement, compare, own_methods
from specdec.checkpoints import load_lm, load_model
from specdec.demo import decoding_dtype_name, demo_pair, training_dtype_name
from specdec.distill import distill
from specdec.drafters.model import ModelDrafter
from specdec.engine import Engine
from specdec.load import load
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.training.data import Corpus, gather, held_out_prompts
from specdec.training.distill_recipe import DistillReport, DistillSettings

from matplotlib import pyplot as plt  # isort: skip (after specdec.picture, which needs no display)
from matplotlib.axes import Axes  # isort: skip

RESULTS = Path(__file__).parent / "results"
SHAPES = {"GPT": "small", "LSTM": "lstm"}
LEARNING_RATES = {"GPT": 3e-3, "LSTM": 3e-3}  # better for both than 1e-3 after 60,000 tokens
CELLS = ((1, 0.0), (1, 1.0), (8, 0.0), (8, 1.0))  # batch size, temperature
DRAFTED, PROMPT_TOKENS, NEW_TOKENS = 4, 128, 96
CONTEXTS, PASSES = (64, 256, 1024), 15  # tokens that a row holds while drafting passes are timed
UNEQUAL = 0.02  # parameters and tokens may differ by this share


@dataclass(frozen=True)
class Pass:
    """Milliseconds of a drafting pass, one token per row, of rows that hold ``context`` tokens."""

    draft: str
    batch: int
    context: int
    milliseconds: float


def settings_of(name: str, sequence_length: int = 256) -> DistillSettings:
    """How a draft learns; its budget comes later."""
    return DistillSettings(
        shape=SHAPES[name], learning_rate=LEARNING_RATES[name], draft_tokens=DRAFTED, max_tokens=1,
        sequence_length=sequence_length, evaluate_every=10**9, patience=0,
    )  # fmt: skip


def train_both(
    target: str, corpus: Corpus, folder: Path, budget: Mapping[str, float], settings: Mapping[str, DistillSettings]
) -> dict[str, DistillReport]:
    """Distil the GPT within ``budget`` (max_seconds, max_tokens), then the LSTM on as many tokens; into ``folder``/NAME."""
    model, tokenizer = load_model(target, dtype=training_dtype_name())
    reports: dict[str, DistillReport] = {}
    for name, given in settings.items():
        own = DistillSettings(**(asdict(given) | dict(budget)))
        reports[name] = distill(model, tokenizer, corpus, folder / name, own)  # type: ignore[arg-type]
        budget = {"max_seconds": 0, "max_tokens": reports[name].evaluations[-1].tokens}
    return reports


def check_equal(reports: Mapping[str, DistillReport], share: float = UNEQUAL) -> None:
    """Raise ``ValueError`` unless the drafts have as many parameters and learned from as many tokens."""
    for what in ("parameters", "tokens"):
        found = {
            name: report.draft_parameters if what == "parameters" else report.evaluations[-1].tokens
            for name, report in reports.items()
        }
        if max(found.values()) > (1 + share) * min(found.values()):
            raise ValueError(f"the drafts differ in {what} by more than {share:.0%}: {found}")


def equal_texts(found: Sequence[Measurement]) -> tuple[int, int]:
    """How many greedy texts are those of plain decoding, and how many there are."""
    speculative = [m for m in found if m.method != PLAIN and m.same_text is not None]
    return sum(m.same_text or 0 for m in speculative), sum(m.batch for m in speculative)


def drafters(folder: Path, dtype: str) -> dict[str, ModelDrafter]:
    """The drafts in ``folder``, as the engine runs them."""
    return {name: ModelDrafter(load_lm(folder / name, dtype=getattr(torch, dtype))) for name in SHAPES}


def decode(
    engine: Engine,
    drafts: Mapping[str, ModelDrafter],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    new_tokens: int = NEW_TOKENS,
) -> list[Measurement]:
    """Plain decoding and both drafts, side by side, in every cell."""
    found = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("decoding", total=len(CELLS) * (len(drafts) + 1) * (rounds + 1))
        for batch, temperature in CELLS:
            methods = own_methods(
                engine, drafts, max_new_tokens=new_tokens, temperature=temperature, num_draft_tokens=DRAFTED, seed=0
            )
            found += compare(
                methods, prompts[:batch], rounds=rounds, temperature=temperature, progress=lambda: bar.advance(task)
            )
    return found


def time_passes(drafts: Mapping[str, ModelDrafter], contexts: Sequence[int] = CONTEXTS) -> list[Pass]:
    """Drafting passes of rows that hold more and more tokens: a cache of keys and values grows, a state does not."""
    found = []
    for name, drafter in drafts.items():
        lm = drafter.lm
        for batch in (1, 8):
            for context in contexts:
                lm.reserve(batch, context + 1)
                lm.fill(torch.randint(lm.vocab_size, (batch, min(context, lm.context) - 1)).tolist())
                times = []
                for _ in range(PASSES):
                    started = time.perf_counter()
                    lm.append(torch.zeros(batch, 1, dtype=torch.long))
                    lm.keep([0] * batch)
                    times.append(1e3 * (time.perf_counter() - started))
                lm.free(0)
                found.append(Pass(name, batch, context, statistics.median(times[3:])))
    return found


def draft_ms(m: Measurement) -> float:
    """Milliseconds that drafting takes of a step."""
    assert m.draft_share is not None and m.passes_per_second is not None and m.prefill_share is not None
    return 1e3 * m.draft_share / ((1 - m.prefill_share) * m.passes_per_second)


def table(found: Sequence[Measurement], reports: Mapping[str, DistillReport]) -> Table:
    """What each draft brings, cell by cell."""
    said = ", ".join(
        f"{name} {report.draft_parameters / 1e3:,.0f} k parameters, {report.evaluations[-1].tokens:,} tokens in "
        f"{report.evaluations[-1].seconds:.0f} s"
        for name, report in reports.items()
    )
    headings = ("draft", "batch", "T", "accepted", "length", "draft ms/step", "tok/s", "to plain")
    result = Table(*headings, title=f"{DRAFTED} drafted tokens per step", caption=said)
    for i, m in enumerate(found):
        guesses = ("-",) * 3
        if m.method != PLAIN:
            guesses = (f"{m.acceptance_rate:.0%}", f"{m.mean_acceptance_length:.2f}", f"{draft_ms(m):.2f}")
        speeds = f"{m.tokens_per_second:.0f}", f"{m.speedup:.2f}x"
        ends = i + 1 < len(found) and found[i + 1].cell != m.cell
        result.add_row(m.method, str(m.batch), f"{m.temperature:g}", *guesses, *speeds, end_section=ends)
    return result


def draw(found: Sequence[Measurement], passes: Sequence[Pass], path: Path) -> None:
    """Save acceptance by position, accepted length, cost of a drafting pass and speed as a PNG."""
    figure, places = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    colours = {PLAIN: COLOURS[0], **dict(zip(SHAPES, COLOURS[1:3], strict=True))}
    _draw_acceptance(places[0], found, colours)
    _bars(places[1], found, colours, "mean_acceptance_length", "tokens per pass of the target")
    _draw_passes(places[2], passes, colours)
    _bars(places[3], found, colours, "tokens_per_second", "tokens per second")
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("A recurrent draft (LSTM) beside a GPT of its size: same target, same tokens", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_acceptance(axes: Axes, found: Sequence[Measurement], colours: Mapping[str, str]) -> None:
    for m in found:
        if m.batch == max(batch for batch, _ in CELLS) and m.acceptance_rate_per_position:
            rates = [100 * rate for rate in m.acceptance_rate_per_position]
            style, kind = ("-", "greedy") if m.temperature == 0 else ("--", f"T = {m.temperature:g}")
            label = f"{m.method}, {kind}"
            axes.plot(range(1, len(rates) + 1), rates, style, marker="o", color=colours[m.method], label=label)
            axes.set_xticks(range(1, len(rates) + 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted up to here, % of drafts")


def _draw_passes(axes: Axes, passes: Sequence[Pass], colours: Mapping[str, str]) -> None:
    for name in SHAPES:
        for batch, style in ((1, "-"), (8, "--")):
            own = [(one.context, one.milliseconds) for one in passes if (one.draft, one.batch) == (name, batch)]
            label = f"{name}, batch {batch}"
            axes.plot(*zip(*own, strict=True), style, marker="o", markersize=4, color=colours[name], label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens that a row has read")
    axes.set_ylabel("milliseconds per drafting pass")


def _bars(axes: Axes, found: Sequence[Measurement], colours: Mapping[str, str], field: str, label: str) -> None:
    for i, (name, colour) in enumerate(colours.items()):
        values = [getattr(m, field) for cell in CELLS for m in found if m.method == name and m.cell == cell]
        axes.bar([x + 0.27 * (i - 1) for x in range(len(CELLS))], values, 0.25, color=colour, label=name)
    kinds = [f"batch {batch}\n{'greedy' if t == 0 else f'T = {t:g}'}" for batch, t in CELLS]
    axes.set_xticks(range(len(CELLS)), kinds, fontsize=8)
    axes.set_ylabel(label)
    axes.margins(y=0.25)


def main(
    target: Annotated[str | None, typer.Option(help="Target; default: the demo's.")] = None,
    seconds: Annotated[float, typer.Option(help="For training the GPT draft; the LSTM gets as many tokens.")] = 150,
    tokens: Annotated[int, typer.Option(help="What both learn from, instead of seconds.")] = 0,
    rounds: Annotated[int, typer.Option(help="Timed rounds of every cell.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Train both, decode, print, draw, write."""
    console = Console()
    where = target or str(demo_pair() / "target")
    corpus = gather("stdlib")
    _, tokenizer = load_model(where)
    prompts = held_out_prompts(tokenizer, corpus, count=max(b for b, _ in CELLS), tokens=PROMPT_TOKENS)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: settings_of(name) for name in SHAPES}
        budget = {"max_seconds": 0 if tokens else seconds, "max_tokens": tokens}
        reports = train_both(where, corpus, Path(folder), budget, settings)
        check_equal(reports)
        drafts = drafters(Path(folder), decoding_dtype_name())
    found = decode(load(where, dtype=decoding_dtype_name()), drafts, prompts, rounds)
    passes = time_passes(drafts)
    console.print(table(found, reports))
    equal, texts = equal_texts(found)
    console.print(f"{equal} of {texts} greedy texts are plain decoding's, in {decoding_dtype_name()}")
    figures = {
        "settings": {**budget, "drafted": DRAFTED, "new_tokens": NEW_TOKENS, "dtype": decoding_dtype_name()},
        "drafts": {name: asdict(report) for name, report in reports.items()},
        "equal_texts": equal,
        "texts": texts,
        "measurements": [m.as_dict() for m in found],
        "passes": [asdict(one) for one in passes],
    }
    write_figures(out / "recurrent.json", figures)
    draw(found, passes, out / "recurrent.png")


if __name__ == "__main__":
    typer.run(main)
