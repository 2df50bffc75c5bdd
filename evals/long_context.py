"""Where does n^2 bite, and what helps?

python evals/long_context.py [--target DIR]

1. Cost: time and peak memory of one attention, forward and backward, against the length of the text; bytes of scores that a
   pattern does not make. The peak is the operating system's own count.
2. Loss: equal small models, one per pattern, trained on the same batches; what looking at less costs in held-out loss.
3. Drafting: a model with full attention guesses with a window of its own cache (the first block and the latest tokens),
   and checks itself: tokens accepted, tokens per second, and whether the text is that of plain decoding.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedTokenizerFast

from specdec.checkpoints import load_model
from specdec.demo import decoding_dtype_name, demo_pair
from specdec.drafters.own import SelfDrafter
from specdec.engine import Engine, Output
from specdec.lm.cpu import CpuLM
from specdec.nn.attention import Axial, BigBird, Full, Hierarchical, Linear, LowRank, Pattern, Pooled, Window
from specdec.nn.gpt import GPT
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.training.data import batch, encode, gather, windows

from matplotlib import pyplot as plt  # isort: skip (after specdec.picture, which needs no display)
from matplotlib.axes import Axes  # isort: skip

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD = 4, 32
MAKERS: dict[str, Callable[[], Pattern]] = {
    "full": Full,
    "window 256 + 4 sinks": lambda: Window(256, sinks=4),
    "BigBird": lambda: BigBird(128, sinks=64, random=2),
    "axial 64": lambda: Axial(64),
    "pooled 4 per 64": lambda: Pooled(4),
    "low rank 4 per 64": lambda: LowRank(4),
    "hierarchical 4 of 64": lambda: Hierarchical(4),
    "linear, elu + 1": lambda: Linear("elu", head_size=HEAD),
    "linear, random features": lambda: Linear("random", size=64, head_size=HEAD),
}
SHAPE = {"hidden_size": HEADS * HEAD, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": HEADS}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    rounds: int = 3
    train_steps: int = 60
    train_length: int = 1024
    prompts: tuple[int, ...] = (1024, 2048, 4096, 8000)
    prompts_each: int = 3
    new_tokens: int = 96
    longest_seconds: float = 2.0  # a pattern that takes longer is not tried with longer texts


@dataclass(frozen=True)
class Cost:
    """Of one attention of ``heads`` heads, float32, forward and backward. avoided: bytes of scores not made, to full."""

    pattern: str
    length: int
    seconds: float
    peak_bytes: int
    avoided: int


@dataclass(frozen=True)
class Drafted:
    """Decoding behind prompts of one length; tokens per second without the prompts' own pass."""

    prompt: int
    plain: float
    drafted: float
    acceptance_length: float
    acceptance_rate: float
    is_same_text: bool


def peak_of(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a run, and by how much the process grew at most meanwhile, in bytes (Linux; 0 elsewhere)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except OSError:
        before = 0
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return seconds, max(0, _status("VmHWM") - before) if before else 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def costs(sizes: Sizes) -> list[Cost]:
    """Every pattern on texts of every length, as long as that takes a bearable time."""
    found, full = [], Full()
    for name, make in MAKERS.items():
        pattern = make()
        for length in sizes.lengths:
            generator = torch.Generator().manual_seed(length)
            given = [torch.randn(1, HEADS, length, HEAD, generator=generator, requires_grad=True) for _ in range(3)]

            def run(pattern: Pattern = pattern, given: Sequence[Tensor] = given) -> None:
                pattern.attend(*given).sum().backward()
                for tensor in given:
                    tensor.grad = None

            run()
            measured = [peak_of(run) for _ in range(sizes.rounds)]
            seconds = statistics.median(one[0] for one in measured)
            avoided = 4 * HEADS * (full.scores(length) - pattern.scores(length))
            found.append(Cost(name, length, seconds, max(one[1] for one in measured), avoided))
            if seconds > sizes.longest_seconds:
                break
    return found


def losses(sizes: Sizes, tokens: Tensor, held_out: Tensor, vocab_size: int) -> dict[str, float]:
    """Held-out loss of equal models trained on the same batches, in nats per token."""
    config = LlamaConfig(**SHAPE, num_key_value_heads=HEADS, vocab_size=vocab_size,
                         max_position_embeddings=sizes.train_length, bos_token_id=None, eos_token_id=None)  # fmt: skip
    found = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        model = GPT(config, pattern=make())
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.95))
        for step in range(sizes.train_steps):
            rate = min(1.0, (step + 1) / 10) * (1 - step / sizes.train_steps)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * rate
            loss = loss_of(model, batch(tokens, rows=2, length=sizes.train_length, seed=1, step=step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.inference_mode():
            found[name] = statistics.fmean(float(loss_of(model.eval(), rows[None])) for rows in held_out)
    return found


def loss_of(model: GPT, rows: Tensor) -> Tensor:
    """Mean loss of tokens [B, T + 1], each from all before it."""
    logits = model.lm_head(model(rows[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def lengthened(model: GPT, tokens: Tensor, context: int, seconds: float) -> GPT:
    """The model trained on for texts of ``context`` tokens, for so long."""
    config = LlamaConfig.from_dict({**model.config.to_dict(), "max_position_embeddings": context})
    longer = GPT(config)
    longer.load_state_dict(model.float().state_dict())
    optimizer = torch.optim.AdamW(longer.parameters(), lr=2e-4, betas=(0.9, 0.95))
    started, step = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        loss = loss_of(longer, batch(tokens, rows=1, length=context, seed=2, step=step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(longer.parameters(), 1.0)
        optimizer.step()
        step += 1
    return longer.eval().requires_grad_(False)


def drafting(model: GPT, text: Sequence[int], sizes: Sizes, window: int) -> list[Drafted]:
    """Plain decoding and self-drafting behind prompts of several lengths."""
    target = CpuLM(model)
    plain, own = Engine(target), Engine(target, SelfDrafter(target, in_bytes=False, window=window))
    found = []
    for length in sizes.prompts:
        prompts = [list(text[start : start + length]) for start in range(0, sizes.prompts_each * length, length)]
        runs: dict[Engine, list[list[Output]]] = {plain: [], own: []}
        for _ in range(sizes.rounds + 1):  # the first warms up; later ones find the prompts read
            for engine, found_so_far in runs.items():
                found_so_far.append(
                    [
                        engine.generate([prompt], max_new_tokens=sizes.new_tokens, num_draft_tokens=4)
                        for prompt in prompts
                    ]
                )
        speeds = [statistics.median(map(_speed, runs[engine][1:])) for engine in (plain, own)]
        outputs = {engine: made[-1] for engine, made in runs.items()}
        stats = [output.stats for output in outputs[own]]
        tokens, rate = (statistics.fmean(values) for values in zip(
            *((one.mean_acceptance_length, one.acceptance_rate) for one in stats), strict=True))  # fmt: skip
        same = all(a.token_ids == b.token_ids for a, b in zip(outputs[plain], outputs[own], strict=True))
        found.append(Drafted(length, *speeds, tokens, rate, same))
    return found


def _speed(outputs: Sequence[Output]) -> float:
    """Tokens per second, without the prompts' own passes."""
    runs = [output.stats for output in outputs]
    seconds = sum(run.total_seconds - run.prefill_seconds for run in runs)
    return sum(run.num_generated_tokens for run in runs) / seconds


def table(found: Sequence[Cost], loss: dict[str, float], drafted: Sequence[Drafted]) -> list[Table]:
    """What was found, for people."""
    lengths = sorted({one.length for one in found})
    cost = Table(title="one attention, forward and backward: milliseconds / peak MB")
    for column in ("pattern", *(f"{length}" for length in lengths), "held-out loss"):
        cost.add_column(column, justify="right")
    for name in MAKERS:
        own = {one.length: one for one in found if one.pattern == name}
        cells = [f"{own[n].seconds * 1e3:.0f} / {own[n].peak_bytes / 1e6:.0f}" if n in own else "-" for n in lengths]
        cost.add_row(name, *cells, f"{loss[name]:.3f}" if name in loss else "-")
    own_cache = Table(title="a target that drafts with a window of its own cache")
    for column in (
        "prompt tokens",
        "plain tokens/s",
        "drafted tokens/s",
        "ratio",
        "accepted",
        "tokens per pass",
        "same text",
    ):
        own_cache.add_column(column, justify="right")
    for d in drafted:
        ratio = f"{d.drafted / d.plain:.2f}x"
        figures = (
            f"{d.plain:.0f}",
            f"{d.drafted:.0f}",
            ratio,
            f"{d.acceptance_rate:.0%}",
            f"{d.acceptance_length:.2f}",
        )
        own_cache.add_row(str(d.prompt), *figures, "yes" if d.is_same_text else "no")
    return [cost, own_cache]


def draw(found: Sequence[Cost], loss: dict[str, float], drafted: Sequence[Drafted], path: Path) -> None:
    """Time, memory, loss and drafting, as a PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(MAKERS)}
    _lines(axes[0, 0], found, colours, lambda one: one.seconds * 1e3, "milliseconds, forward and backward")
    _lines(axes[0, 1], found, colours, lambda one: max(one.peak_bytes, 1) / 1e6, "peak memory, MB")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    names = sorted(loss, key=lambda name: -loss[name])
    axes[1, 0].barh(names, [loss[name] for name in names], color=[colours[name] for name in names])
    axes[1, 0].set_xlim(left=0.9 * min(loss.values(), default=0))
    axes[1, 0].set_xlabel("held-out loss of equal small models, nats per token")
    axes[1, 0].tick_params(axis="y", labelsize=8)
    places = range(len(drafted))
    axes[1, 1].bar([x - 0.2 for x in places], [d.plain for d in drafted], 0.38, color=COLOURS[0], label="plain")
    bars = axes[1, 1].bar(
        [x + 0.2 for x in places],
        [d.drafted for d in drafted],
        0.38,
        color=COLOURS[1],
        label="drafts with a window of its cache",
    )
    axes[1, 1].bar_label(bars, [f"{d.drafted / d.plain:.2f}x" for d in drafted], fontsize=8)
    axes[1, 1].set_xticks(places, [f"{d.prompt}" for d in drafted])
    axes[1, 1].set_xlabel("tokens of the prompt")
    axes[1, 1].set_ylabel("tokens per second behind it")
    axes[1, 1].legend(frameon=False, fontsize=8)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(
    axes: Axes, found: Sequence[Cost], colours: dict[str, str], value: Callable[[Cost], float], label: str
) -> None:
    for name, colour in colours.items():
        own = [(one.length, value(one)) for one in found if one.pattern == name]
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", markersize=3, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel(label)


def main(
    target: Annotated[str | None, typer.Option(help="One of our GPTs; default: the demo's target.")] = None,
    seconds: Annotated[float, typer.Option(help="Training it on for long texts.")] = 120,
    window: Annotated[int, typer.Option(help="Tokens that its drafts look back on.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Measure, print, draw, write."""
    console, sizes = Console(), Sizes()
    model, tokenizer = load_model(target or str(demo_pair() / "target"))
    assert isinstance(model, GPT) and isinstance(tokenizer, PreTrainedTokenizerFast)
    corpus = gather("stdlib")
    tokens, held_out = (encode(tokenizer, part) for part in (corpus.training, corpus.held_out))
    found = costs(sizes)
    loss = losses(sizes, tokens, windows(held_out, length=sizes.train_length, limit=8), model.config.vocab_size)
    context = max(sizes.prompts) + 2 * sizes.new_tokens
    longer = lengthened(model, tokens, context, seconds).to(getattr(torch, decoding_dtype_name()))
    drafted = drafting(longer, held_out.tolist(), sizes, window)
    for one in table(found, loss, drafted):
        console.print(one)
    figures: dict[str, Any] = {
        "settings": {**asdict(sizes), "heads": HEADS, "head_size": HEAD, "seconds": seconds, "window": window},
        "costs": [asdict(one) for one in found],
        "held_out_loss": loss,
        "drafting": [asdict(one) for one in drafted],
    }
    write_figures(out / "long_context.json", figures)
    draw(found, loss, drafted, out / "long_context.png")


if __name__ == "__main__":
    typer.run(main)
