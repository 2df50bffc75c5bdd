"""Measuring ways to generate side by side: the same prompts, interleaved rounds, medians, ratios to plain decoding."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.draft import Drafter
from specdec.engine import Engine
from specdec.errors import PeerError
from specdec.stats import Stats

PLAIN = "plain"
PARTS = {"prompt": "prefill_share", "draft": "draft_share", "verify": "verify_share", "bookkeeping": "overhead_share"}


@dataclass(frozen=True)
class Run:
    """One timed call: the new tokens of every row, wall-clock seconds, and the engine's counters if it was ours.

    ``bytes_per_second`` is what memory gave right before and after it, where that was asked; see ``beside_memory``.
    """

    token_ids: list[list[int]]
    seconds: float
    stats: Stats | None = None
    bytes_per_second: float | None = None


Method = Callable[[Sequence[Sequence[int]]], Run]


@dataclass(frozen=True)
class Measurement:
    """How one method did on one set of prompts. ``speedup`` is to the baseline in the same interleaved rounds.

    Seconds are those of the median round; shares are parts of them. ``same_text`` counts rows equal to the baseline's,
    which is plain decoding unless another one was named; None for sampled text. ``passes_per_second`` are the target's,
    prompts left out, and ``bytes_per_pass`` what memory, measured beside every run, could have given in the time of one.
    ``family`` and ``num_draft_tokens`` are those of a ``sweep.Way``.
    """

    method: str
    batch: int
    temperature: float
    tokens_per_second: float
    speedup: float
    fastest: float
    slowest: float
    rounds: int
    acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None
    acceptance_rate_per_position: list[float] = field(default_factory=list)
    passes_per_second: float | None = None
    bytes_per_second: float | None = None
    bytes_per_pass: float | None = None
    prefill_share: float | None = None
    draft_share: float | None = None
    verify_share: float | None = None
    overhead_share: float | None = None
    same_text: int | None = None
    family: str = ""
    num_draft_tokens: int | str = 0

    @property
    def cell(self) -> tuple[int, float]:
        """What is the same for methods that can be compared: batch size and temperature."""
        return self.batch, self.temperature

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def engine_method(engine: Engine, **settings: Any) -> Method:
    """Generate with our engine; end-of-text is ignored so that every method makes the same number of tokens."""

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        started = time.perf_counter()
        output = engine.generate(
            [list(prompt) for prompt in prompts], eos_token_id=None, max_batch_size=len(prompts), **settings
        )
        return Run(output.token_ids, time.perf_counter() - started, output.stats)

    return run


def own_methods(engine: Engine, drafters: Mapping[str, Drafter], **settings: Any) -> dict[str, Method]:
    """Plain decoding and one method per drafter, all on the engine's own target."""
    methods = {PLAIN: engine_method(engine, **{**settings, "num_draft_tokens": 0})}
    for name, drafter in drafters.items():
        other = Engine(engine.target, drafter, vocab_size=engine.limits.vocab_size)
        methods[name] = engine_method(other, **settings)
    return methods


def hf_method(model: PreTrainedModel, **generate_settings: Any) -> Method:
    """Generate with Hugging Face's ``generate`` on left-padded prompts; see ``hf_model``."""

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        width = max(map(len, prompts))
        padded = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs = {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}
        started = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(**inputs, **generate_settings)
        return Run(tokens[:, width:].tolist(), time.perf_counter() - started)

    return run


def one_by_one(method: Method) -> Method:
    """``method`` at batch 1 on several prompts: one call after the other, counted as one run."""
    return in_groups(method, 1)


def in_groups(method: Method, size: int) -> Method:
    """``method`` on ``size`` prompts at a time: one call after the other, counted as one run."""

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        runs = [method(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        counters = [found.stats for found in runs if found.stats is not None]
        stats = sum(counters[1:], counters[0]) if counters else None
        return Run([row for found in runs for row in found.token_ids], sum(found.seconds for found in runs), stats)

    return run


def beside_memory(method: Method, bytes_per_second: Callable[[], float]) -> Method:
    """``method``, and before and after every call, outside its time, a measurement of what memory gives."""

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        before = bytes_per_second()
        found = method(prompts)
        return replace(found, bytes_per_second=(before + bytes_per_second()) / 2)

    return run


def hf_model(directory: Path, dtype: str) -> PreTrainedModel:
    """Hugging Face's own model of a checkpoint, told to ignore end-of-text like every method here."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def hf_settings(max_new_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
    """Arguments that make ``generate`` do what our engine does in a benchmark."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, "pad_token_id": 0, **sampling}


def kind_of_text(temperature: float) -> str:
    """What a temperature is called."""
    return f"T={temperature:g}" if temperature else "greedy"


def medians_of(rounds: int) -> str:
    """What the figures of that many rounds are."""
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def compare(
    methods: Mapping[str, Method],
    prompts: Sequence[Sequence[int]],
    *,
    rounds: int = 5,
    temperature: float = 0.0,
    progress: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Time every method on ``prompts``, one after the other in each round, after a round to warm up."""
    return summaries(timed_rounds(methods, prompts, rounds=rounds, progress=progress), temperature=temperature)


def timed_rounds(
    methods: Mapping[str, Method],
    prompts: Sequence[Sequence[int]],
    *,
    rounds: int = 5,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[Run]]:
    """The runs behind ``compare``: for every method one per round, the warm-up left out.

    A peer that fails is left out with a warning, whenever it does.
    """
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name in list(runs):
            try:
                with _no_collection():
                    run = methods[name](prompts)
            except PeerError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                del runs[name]
                continue
            progress()
            if turn > 0:
                runs[name].append(run)
    return runs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks through all objects of a process now and then, for 0.2 s with these libraries: not in somebody's run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summaries(
    runs: Mapping[str, list[Run]], *, baseline: str = PLAIN, batch: int | None = None, temperature: float = 0.0
) -> list[Measurement]:
    """What rounds say, relative to the method called ``baseline``; ``batch`` where it is not all rows of a run."""
    base = runs.get(baseline)
    return [_summary(name, found, base, batch or len(found[0].token_ids), temperature) for name, found in runs.items()]


def _summary(name: str, runs: list[Run], plain: list[Run] | None, batch: int, temperature: float) -> Measurement:
    speeds = [sum(map(len, run.token_ids)) / run.seconds for run in runs]
    median = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    speedup, same = float("nan"), None
    if plain is not None:
        # Rounds are paired, so that a machine that slows down for a while slows both sides of a ratio.
        pairs = zip(runs, plain, strict=True)
        speedup = statistics.median(
            base.seconds / run.seconds * sum(map(len, run.token_ids)) / sum(map(len, base.token_ids))
            for run, base in pairs
        )
        if temperature == 0:
            same = sum(a == b for a, b in zip(median.token_ids, plain[0].token_ids, strict=True))
    known = {**_known(median.stats), **_memory(runs)} if median.stats is not None else {}
    return Measurement(
        name, batch, temperature, statistics.median(speeds), speedup, max(speeds), min(speeds), len(runs),
        same_text=same, **known,
    )  # fmt: skip


def _memory(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over runs, each with what was measured beside it: a machine's pace changes from run to run."""
    pairs = [
        (run.bytes_per_second, passes)
        for run in runs
        if run.bytes_per_second and run.stats is not None and (passes := _passes_per_second(run.stats))
    ]
    if not pairs:
        return {}
    return {
        "bytes_per_second": statistics.median(found for found, _ in pairs),
        "bytes_per_pass": statistics.median(found / passes for found, passes in pairs),
    }


def _passes_per_second(stats: Stats) -> float | None:
    decoding = stats.total_seconds - stats.prefill_seconds
    return stats.num_target_passes / decoding if decoding > 0 else None


def _known(stats: Stats) -> dict[str, Any]:
    total = stats.total_seconds
    return {
        "acceptance_rate": stats.acceptance_rate if stats.num_draft_tokens else None,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate_per_position": stats.acceptance_rate_per_position,
        "passes_per_second": _passes_per_second(stats),
        "prefill_share": stats.prefill_seconds / total,
        "draft_share": stats.draft_seconds / total,
        "verify_share": stats.verify_seconds / total,
        "overhead_share": stats.overhead_seconds / total,
    }


def table(measurements: Sequence[Measurement], title: str) -> Table:
    """The measurements as a table for the terminal; fits into 80 columns with methods of up to 28 letters."""
    result = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for heading in ("method", "batch", "T", "tok/s", "speedup", "accepted", "length", "bookkeeping"):
        result.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for i, m in enumerate(measurements):
        result.add_row(
            m.method,
            str(m.batch),
            f"{m.temperature:g}",
            f"{m.tokens_per_second:.0f}",
            f"{m.speedup:.2f}x",
            "-" if m.acceptance_rate is None else f"{m.acceptance_rate:.0%}",
            "-" if m.mean_acceptance_length is None else f"{m.mean_acceptance_length:.2f}",
            "-" if m.overhead_share is None else f"{m.overhead_share:.0%}",
            end_section=i + 1 < len(measurements) and measurements[i + 1].cell != m.cell,
        )
    result.caption = (
        "accepted: share of drafted tokens; length: tokens per target pass;\nbookkeeping: time outside the models"
    )
    return result
