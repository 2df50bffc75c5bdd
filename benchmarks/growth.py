"""How time and memory grow with the context: 256 to 8k tokens, batch 1 to 64, equal rows and ragged ones.

python benchmarks/growth.py [--contexts 256 512 1024 2048 4096 8192] [--batches 1 4 16 64] [--device cuda]

Writes benchmarks/results/growth.json and growth.png. The model has the shape of the demo's target and random weights,
for speed does not depend on what they are. Rows have blocks of their own (no shared beginnings), and every token in them
was really read. A cell is timed with passes of one token per row, a plain decoding step, and of five, which verify four
drafts; its memory is read between the two. Ragged: every second row is 64 tokens long, whatever the context.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from specdec.demo import demo_recipe
from specdec.lm.base import CachedLM
from specdec.lm.native import NativeLM, decoding_dtype, native_lm
from specdec.lm.paged import BLOCK, PagedLM
from specdec.machine import machine
from specdec.nn.gpt import GPT, Config, head_size
from specdec.picture import COLOURS

RESULTS = Path(__file__).parent / "results"
STEP, VERIFY = 1, 5  # tokens per row of the passes that are timed
PASSES, WARM_UP = 15, 3
SHORT = 64  # tokens of every second row of a ragged cell
LINEAR = 1.05  # the largest exponent that counts as linear: medians of times differ by some percent between runs


@dataclass(frozen=True)
class Cell:
    """What was measured with one batch and context. Bytes are of keys and values; milliseconds go by pass width."""

    batch: int
    context: int
    ragged: bool
    live_tokens: int
    pass_ms: dict[int, float]
    token_ms: dict[int, float]  # of a pass, by the tokens that it reads
    held_bytes: int
    exact_bytes: int  # that the live tokens need
    rounded_bytes: int  # with every row's length rounded up to blocks
    rectangle_bytes: int  # with every row as long as the longest


def random_lm(context: int, device: torch.device) -> tuple[CachedLM, int]:
    """A model of the demo target's shape that reads ``context`` tokens, and the bytes that it keeps of each."""
    recipe = demo_recipe()
    config = recipe.target.config(recipe.tokenizer.vocab_size, eos_token_id=0)
    config.max_position_embeddings = context
    dtype = decoding_dtype(device)
    torch.manual_seed(0)
    return native_lm(GPT(config).to(device, dtype)), token_bytes(config, dtype)


def token_bytes(config: Config, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * dtype.itemsize


def held_bytes(lm: CachedLM) -> int:
    """Memory of the cache as it is; a block that rows share counts once."""
    if isinstance(lm, PagedLM):
        blocks = {block.data_ptr(): block for row in lm.cache.rows for block in row}
        return sum(block.numel() * block.itemsize for block in blocks.values())
    assert isinstance(lm, NativeLM)
    return sum(buffer.nbytes for pair in lm.cache.layers.values() for buffer in pair)


def settle(lm: CachedLM, lengths: Sequence[int]) -> None:
    """Give the rows in slots 0, 1, ... so many tokens of their own; a row that has more begins anew."""
    lm.reserve(len(lengths), max(lengths))
    for slot, length in enumerate(lengths):
        if lm.lengths[slot] > length:
            lm.forget(slot)
    missing = [length - lm.lengths[slot] for slot, length in enumerate(lengths)]
    if any(missing):
        lm.fill([torch.randint(lm.vocab_size, (count,)).tolist() for count in missing])


def pass_ms(lm: CachedLM, batch: int, width: int) -> float:
    """Median milliseconds of passes of ``width`` tokens per row, each of which commits one."""
    tokens, found = torch.randint(lm.vocab_size, (batch, width)), []
    for _ in range(WARM_UP + PASSES):
        started = time.perf_counter()
        lm.append(tokens)
        lm.keep([1] * batch)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found[WARM_UP:])


def measure(lm: CachedLM, lengths: Sequence[int], per_token: int) -> Cell:
    """The cell whose rows have ``lengths`` tokens; ``per_token`` bytes are kept of each."""
    settle(lm, lengths)
    batch, times = len(lengths), {STEP: pass_ms(lm, len(lengths), STEP)}
    live, held = lm.lengths[:batch], held_bytes(lm)  # before room is made for drafts that are not kept
    times[VERIFY] = pass_ms(lm, batch, VERIFY)
    return Cell(
        batch=batch,
        context=max(lengths),
        ragged=min(lengths) < max(lengths),
        live_tokens=sum(live),
        pass_ms=times,
        token_ms={width: ms / (batch * width) for width, ms in times.items()},
        held_bytes=held,
        exact_bytes=per_token * sum(live),
        rounded_bytes=per_token * sum(-(-length // BLOCK) * BLOCK for length in live),
        rectangle_bytes=per_token * batch * max(live),
    )


def plan(contexts: Sequence[int], batches: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """The lengths of every cell's rows. Contexts go up, so that rows grow into the next cell and are read only once."""
    for batch in sorted(set(batches)):
        for short in (False, True)[: 1 + (batch > 1)]:
            for context in sorted(set(contexts)):
                lengths = [SHORT if short and slot % 2 else context for slot in range(batch)]
                if sum(lengths) <= most_tokens:
                    yield lengths


def exponent(live: Sequence[float], times: Sequence[float]) -> float:
    """The power of the live tokens that time grows with at the long end: log-log slope of the last two points."""
    return math.log(times[-1] / times[-2]) / math.log(live[-1] / live[-2])


def fits(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """For every batch and pass width: growth at the long end, and the straight line through all contexts."""
    found = []
    for batch in sorted({cell.batch for cell in cells}):
        own = [cell for cell in cells if cell.batch == batch and not cell.ragged]
        for width in (STEP, VERIFY) if len(own) > 1 else ():
            live, times = [float(cell.live_tokens) for cell in own], [cell.pass_ms[width] for cell in own]
            line = statistics.linear_regression(live, times)
            found.append(
                {
                    "batch": batch,
                    "tokens_per_row": width,
                    "exponent": exponent(live, times),
                    "us_per_live_token": 1e3 * line.slope,
                    "fixed_ms": line.intercept,
                }
            )
    return found


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Save time against context and memory against live tokens as a PNG."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _draw_time(speed, [cell for cell in cells if not cell.ragged])
    _draw_memory(memory, cells)
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw_time(axes: Axes, cells: Sequence[Cell]) -> None:
    contexts = sorted({cell.context for cell in cells})
    first = min(cell.pass_ms[STEP] for cell in cells)
    linear = [first * context / contexts[0] for context in contexts]
    axes.plot(contexts, linear, color="#ced4da", linewidth=1, label="in proportion to context")
    for batch, colour in zip(sorted({cell.batch for cell in cells}), COLOURS[1:], strict=False):
        for width, style in {STEP: "-", VERIFY: ":"}.items():
            own = [(cell.context, cell.pass_ms[width]) for cell in cells if cell.batch == batch]
            label = f"batch {batch}" if width == STEP else None
            axes.plot(*zip(*own, strict=True), style, marker="o", markersize=4, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens per row")
    axes.set_ylabel("milliseconds per pass")
    axes.set_title(f"time (solid: {STEP} token per row, dotted: {VERIFY}, a verify)", fontsize=10)


def _draw_memory(axes: Axes, cells: Sequence[Cell]) -> None:
    longest = max(cells, key=lambda cell: cell.live_tokens)
    axes.plot([0, longest.live_tokens], [0, longest.exact_bytes / 1e6], color="#8d99ae", label="exact need")
    for ragged, name, face in ((False, "equal rows", COLOURS[1]), (True, "ragged rows", "none")):
        own = [cell for cell in cells if cell.ragged == ragged]
        live, held = [cell.live_tokens for cell in own], [cell.held_bytes / 1e6 for cell in own]
        if own:
            axes.scatter(live, held, s=26, facecolors=face, edgecolors=COLOURS[1 + 2 * ragged], label=name)
    axes.set_xlabel("live tokens, all rows")
    axes.set_ylabel("cache, MB")
    axes.set_title("memory", fontsize=10)


def tables(cells: Sequence[Cell], lines: Sequence[dict[str, float]]) -> Iterator[Table]:
    """What was measured, and how it grows."""
    headings = ("tokens", f"ms, {STEP} token", f"ms, {VERIFY}", "us/token", "MB", "exact", "padded")
    title = f"Passes of {STEP} and {VERIFY} tokens per row; the cache, what is needed, and rows x longest"
    measured = Table(Column("rows", no_wrap=True), *headings, title=title)
    for cell in cells:
        rows = f"{cell.batch} x {cell.context}" + f" / {SHORT}" * cell.ragged
        times = f"{cell.pass_ms[STEP]:.2f}", f"{cell.pass_ms[VERIFY]:.2f}", f"{1e3 * cell.token_ms[STEP]:.0f}"
        sizes = (f"{size / 1e6:.2f}" for size in (cell.held_bytes, cell.exact_bytes, cell.rectangle_bytes))
        measured.add_row(rows, str(cell.live_tokens), *times, *sizes)
    yield measured
    growth = Table("batch", "tokens per row", "exponent", "us per live token", "fixed ms", title="Growth, equal rows")
    for line in lines:
        whole = f"{line['batch']:g}", f"{line['tokens_per_row']:g}"
        growth.add_row(*whole, f"{line['exponent']:.2f}", f"{line['us_per_live_token']:.3f}", f"{line['fixed_ms']:.2f}")
    yield growth


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--most-tokens", type=int, default=2**16, help="cells with more live tokens are left out")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    given = parser.parse_args()
    console = Console()
    passes = 2 * (WARM_UP + PASSES)
    lm, per_token = random_lm(max(given.contexts) + passes + VERIFY, torch.device(given.device))
    wanted, cells = list(plan(given.contexts, given.batches, given.most_tokens)), []
    if not wanted:
        parser.error(f"every cell has more than --most-tokens {given.most_tokens}; allow more, or ask for smaller ones")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=sum(map(sum, wanted)))
        for lengths in wanted:
            bar.update(task, description=f"batch {len(lengths)}, context {max(lengths)}")
            cells.append(measure(lm, lengths, per_token))
            bar.advance(task, sum(lengths))
    lines = fits(cells)
    for table in tables(cells, lines):
        console.print(table)
    straight = sum(line["exponent"] <= LINEAR for line in lines)
    console.print(f"time: {straight} of {len(lines)} grow with an exponent of at most {LINEAR} at the long end")
    exact = sum(cell.held_bytes == cell.rounded_bytes for cell in cells)
    console.print(f"memory: {exact} of {len(cells)} cells hold the sum of the rows' lengths in blocks of {BLOCK}")
    figures = {"machine": machine(), "settings": {**vars(given), "dtype": str(lm.dtype)}, "growth": lines}
    rows = [asdict(cell) for cell in cells]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(json.dumps({**figures, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(cells, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
