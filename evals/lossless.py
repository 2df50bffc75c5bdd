"""Is the text really unchanged, whoever guesses and in whatever precision?

python evals/lossless.py [--target DIR --draft DIR]        exit code 1 if it is not

What `specdec check` asks, for the draft model, for what the text repeats, and for both: greedy and seeded texts against
plain decoding, sampled tokens, pairs and texts against the target's own law, log-probabilities against one full pass,
and, as controls, a drafter that reports a wrong law, which the tests must notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console

from specdec.check import ALPHA, CheckReport, check
from specdec.demo import pair_or_demo
from specdec.load import load
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.tuned import LOOKUP

RESULTS = Path(__file__).parent / "results"
LEAST_P = 1e-24  # smaller p-values are drawn at the edge
CONTROL = "a wrong law is noticed: "

Reports = Mapping[tuple[str, str], CheckReport]  # by precision and drafter


def drafters_of(draft: str | list[str]) -> dict[str, str | list[str]]:
    """A draft model alone, lookups alone, and both; anything else is checked as it is."""
    if draft == LOOKUP or isinstance(draft, list):
        return {str(draft): draft}
    return {"draft model": draft, "lookup": LOOKUP, "both": [draft, LOOKUP]}


def draw(reports: Reports, path: Path) -> None:
    """Save how many texts are equal, and the p-values of all tests and controls, as a PNG."""
    figure, (texts, laws) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 2), layout="constrained")
    colours = dict(zip(dict.fromkeys(drafter for _, drafter in reports), COLOURS[1:], strict=False))
    _draw_texts(texts, reports, colours)
    _draw_laws(laws, reports, colours)
    for axes in (texts, laws):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_texts(axes: Axes, reports: Reports, colours: Mapping[str, str]) -> None:
    """Greedy and seeded texts: the share that equals plain decoding's, the number written beside."""
    labels = []
    for (dtype, drafter), report in reports.items():
        for kind, finding in zip(("greedy", "seeded"), report.findings, strict=False):
            equal, rows = finding.figures["equal"], finding.figures["rows"]
            axes.barh(len(labels), 100 * equal / rows, 0.7, color=colours[drafter])
            axes.text(2, len(labels), f"{equal} of {rows}", va="center", fontsize=7, color="white")
            labels.append(f"{kind}, {drafter}, {dtype}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("texts equal to plain decoding's, %")


def _draw_laws(axes: Axes, reports: Reports, colours: Mapping[str, str]) -> None:
    """A dot per test: right drafters must be right of the line, planted errors (crosses) left of it."""
    names: dict[str, int] = {}
    for (dtype, drafter), report in reports.items():
        for finding in report.findings:
            if "p_value" not in finding.figures:
                continue
            place = names.setdefault(finding.name.removeprefix(CONTROL).split(" keep")[0], len(names))
            is_control = finding.name.startswith(CONTROL)
            marker = "x" if is_control else "o" if dtype == "float32" else "s"
            offset = 0.12 * (list(colours).index(drafter) - 1)
            p_value = max(finding.figures["p_value"], LEAST_P)
            axes.scatter(p_value, place + offset, s=26, marker=marker, color=colours[drafter])
    for drafter, colour in colours.items():
        axes.scatter([], [], s=26, color=colour, label=drafter)
    axes.scatter([], [], s=26, color="#000000", marker="x", label="with a wrong law (control)")
    axes.axvline(ALPHA, color="#000000", linewidth=1)
    axes.annotate(f"{ALPHA:g}: below is an alarm", (ALPHA, len(names) - 0.45), fontsize=8, ha="right")
    axes.set_xscale("log")
    axes.set_xlim(LEAST_P / 3, 3)
    axes.set_yticks(range(len(names)), list(names), fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.3, -0.5)
    axes.set_xlabel(f"p-value of a chi-square test against the target's law (down to {LEAST_P:g})")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)


def main(
    target: Annotated[str | None, typer.Option(help="Target; default: the demo's pair.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Draft model, or suffix.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Precisions; repeatable. Default both.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of every tested law.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Of every compared text.")] = 48,
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Check every drafter in every precision, print, draw, write."""
    console = Console()
    where, given = pair_or_demo(target, draft)
    reports: dict[tuple[str, str], CheckReport] = {}
    for precision in dtype or ["float32", "bfloat16"]:
        for name, drafter in drafters_of(given).items():
            with console.status(f"{name}, {precision}"):
                engine = load(where, draft=drafter, dtype=precision)
                report = check(engine, samples=samples, max_new_tokens=max_new_tokens)
            reports[precision, name] = report
            console.print(report.table(f"{name}, {precision}: is the text unchanged?"))
    passed = all(report.passed for report in reports.values())
    found = [{"dtype": p, "name": name, **report.as_dict()} for (p, name), report in reports.items()]
    write_figures(out / "lossless.json", {"passed": passed, "reports": found})
    draw(reports, out / "lossless.png")
    console.print("[green]unchanged[/]" if passed else "[bold red]CHANGED, or not told apart[/]")
    raise typer.Exit(code=0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
