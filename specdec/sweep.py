"""Every way to generate, side by side: who drafts, how many tokens, at which batch size and temperature."""

from __future__ import annotations

import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from specdec import bench
from specdec.bench import PLAIN, Measurement, Method, Run
from specdec.checkpoints import checkpoint_directory
from specdec.controller import AUTO
from specdec.engine import Engine
from specdec.errors import ConfigError, PeerError
from specdec.limit import Limit
from specdec.load import load
from specdec.peers import PeerProcess, find_peers, peer_process
from specdec.sampling import MAX_DRAFT_TOKENS
from specdec.tuned import LOOKUP

EVERY_LENGTH = (AUTO, "1..8")
LOOKUP_NAME = "lookup"  # in tables


@dataclass(frozen=True)
class Way:
    """One way to generate: who drafts, how many tokens (0: nobody, plain decoding), and how at a temperature.

    ``largest_batch`` is that of ways that refuse larger ones.
    """

    family: str
    num_draft_tokens: int | str
    at: Callable[[float], Method]
    largest_batch: int | None = None

    @property
    def name(self) -> str:
        """How it is called in tables."""
        if self.num_draft_tokens == 0:
            return self.family
        return f"{self.family} {AUTO}" if self.num_draft_tokens == AUTO else f"{self.family} k={self.num_draft_tokens}"


@dataclass(frozen=True)
class Drafting:
    """A drafter, by the names that ``load`` takes, and the engine that has it."""

    draft: tuple[str, ...]
    engine: Engine


def lengths_of(given: Sequence[str]) -> list[int | str]:
    """Draft lengths as the command line takes them: numbers, ranges like 1..8, or auto. Raises ``ConfigError``."""
    found: list[int | str] = []
    for text in given:
        if text == AUTO:
            found.append(AUTO)
            continue
        numbers = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
        lengths = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1) if numbers else range(0)
        if not lengths:
            raise ConfigError(f"k must be a number, a range such as 1..8, or auto, got {text!r}")
        found.extend(lengths)
    if wrong := [k for k in found if isinstance(k, int) and not 1 <= k <= MAX_DRAFT_TOKENS]:
        raise ConfigError(f"k must be from 1 to {MAX_DRAFT_TOKENS}, got {wrong[0]}; plain decoding is always measured")
    return list(dict.fromkeys(found))


def engines(
    model: str, drafts: Sequence[str], *, dtype: str = "auto", device: str = "auto"
) -> tuple[Engine, dict[str, Drafting]]:
    """The target's engine without a drafter, and those with one, by name.

    Suffix decoding needs no model and is always among them, alone and with every model that was given.
    """
    plain = load(model, draft=None, dtype=dtype, device=device)
    found: dict[str, Drafting] = {}
    models = [draft for draft in dict.fromkeys(drafts) if draft != LOOKUP]
    for name, draft in zip(_short_names(models), models, strict=True):
        engine = load(plain.target, draft=draft, tokenizer=plain.tokenizer, dtype=dtype, device=device)
        assert engine.drafter is not None
        both = load(plain.target, draft=[engine.drafter, LOOKUP], tokenizer=plain.tokenizer)
        found[name] = Drafting((draft,), engine)
        found[f"{name} + {LOOKUP_NAME}"] = Drafting((draft, LOOKUP), both)
    found[LOOKUP_NAME] = Drafting((LOOKUP,), load(plain.target, draft=LOOKUP, tokenizer=plain.tokenizer))
    return plain, found


def _short_names(models: Sequence[str]) -> list[str]:
    """The last part of every path; all of it where that would not tell two ways apart."""
    taken = Counter([*(Path(model).name for model in models), PLAIN, LOOKUP_NAME])
    return [Path(model).name if taken[Path(model).name] == 1 else model for model in models]


def own_ways(
    plain: Engine, drafting: Mapping[str, Drafting], lengths: Sequence[int | str], max_new_tokens: int
) -> list[Way]:
    """Plain decoding, and every drafter at every length, on our engine."""

    def way(family: str, engine: Engine, length: int | str) -> Way:
        return Way(
            family, length,
            lambda temperature: bench.engine_method(
                engine, num_draft_tokens=length, max_new_tokens=max_new_tokens, temperature=temperature
            ),
        )  # fmt: skip

    return [way(PLAIN, plain, 0), *(way(name, one.engine, k) for name, one in drafting.items() for k in lengths)]


def first_model(drafting: Mapping[str, Drafting]) -> str | None:
    """The first draft model; None where there is none."""
    return next((name for one in drafting.values() for name in one.draft if name != LOOKUP), None)


def hf_ways(
    model: str, draft: str | None, plain: Engine, lengths: Sequence[int | str], max_new_tokens: int
) -> list[Way]:
    """Hugging Face's own generation on its own models: plain, assisted by ``draft``, by lookup in the prompt."""
    dtype, device = str(plain.target.dtype).removeprefix("torch."), plain.target.device
    target = bench.hf_model(checkpoint_directory(model), dtype).to(device)
    fixed = [k for k in lengths if isinstance(k, int)]

    def settings(temperature: float) -> dict[str, Any]:
        return bench.hf_settings(max_new_tokens, temperature)

    def lookup(k: int) -> Callable[[float], Method]:
        return lambda temperature: bench.hf_method(target, prompt_lookup_num_tokens=k, **settings(temperature))

    found = [Way("HF generate", 0, lambda temperature: bench.hf_method(target, **settings(temperature)))]
    if draft is not None:
        assistant = bench.hf_model(checkpoint_directory(draft), dtype).to(device)

        def assisted(k: int) -> Callable[[float], Method]:
            return lambda temperature: _assisted(target, assistant, k, settings(temperature))

        found += [Way("HF assisted", k, assisted(k), 1) for k in fixed]
    return found + [Way("HF lookup", k, lookup(k), 1) for k in fixed]


def _assisted(target: PreTrainedModel, assistant: PreTrainedModel, k: int, settings: dict[str, Any]) -> Method:
    method = bench.hf_method(target, assistant_model=assistant, **settings)

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        config = assistant.generation_config  # set before every call, because calls change it
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = k, "constant"
        config.assistant_confidence_threshold = 0.0
        return method(prompts)

    return run


def peer_ways(peer: PeerProcess, drafts: bool, lengths: Sequence[int | str], max_new_tokens: int) -> list[Way]:
    """Another library in its own process: plain, and with the draft model at fixed lengths."""

    def at(k: int) -> Callable[[float], Method]:
        return lambda temperature: peer.method(k, max_new_tokens, temperature)

    fixed = [k for k in lengths if isinstance(k, int)] if drafts else []
    return [Way(peer.label, 0, at(0)), *(Way(peer.label, k, at(k)) for k in peer.affordable(fixed))]


def installed_ways(
    stack: ExitStack, model: str, draft: str | None, plain: Engine, lengths: Sequence[int | str], max_new_tokens: int,
    pythons: Sequence[str], *, hf: bool,
) -> list[Way]:  # fmt: skip
    """Hugging Face's ways, if asked for, and those of every peer that is installed here or for the other ``pythons``.

    Peers' processes end with ``stack``. One that refuses the models is left out with a warning.
    """
    found = hf_ways(model, draft, plain, lengths, max_new_tokens) if hf else []
    for name, python in find_peers(pythons).items():
        peer = stack.enter_context(peer_process(python))
        where = [checkpoint_directory(given) if given is not None else None for given in (model, draft)]
        assert where[0] is not None
        try:
            peer.open(name, where[0], where[1], dtype=plain.target.dtype, device=plain.target.device)
        except PeerError as error:
            warnings.warn(f"{peer.label} is left out: {error}", stacklevel=2)
            continue
        found += peer_ways(peer, draft is not None, lengths, max_new_tokens)
    return found


def measure(
    ways: Sequence[Way],
    prompts: Sequence[Sequence[int]],
    *,
    batches: Sequence[int],
    temperatures: Sequence[float],
    rounds: int,
    console: Console,
    memory: Callable[[], float] | None = None,
    after_cell: Callable[[list[Measurement]], object] = lambda found: None,
) -> list[Measurement]:
    """All ways in interleaved rounds, apart for every batch size and temperature; speedups are to plain decoding.

    ``memory`` measures bytes per second; it is asked beside every run of plain decoding. ``after_cell`` is told after each
    batch size and temperature of all that was found so far, so that an interruption costs no more than a cell.
    """
    cells = [(batch, temperature) for temperature in temperatures for batch in batches]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    found: list[Measurement] = []
    with Progress(*columns, console=console, transient=True) as bar:
        total = sum(len(_able(ways, batch)) for batch, _ in cells) * (rounds + 1)
        task = bar.add_task("", total=total)
        for batch, temperature in cells:
            bar.update(task, description=f"batch {batch}, T={temperature:g}")
            known = {way.name: way for way in _able(ways, batch)}
            methods = {name: bench.in_groups(way.at(temperature), batch) for name, way in known.items()}
            if memory is not None and PLAIN in methods:
                methods[PLAIN] = bench.beside_memory(methods[PLAIN], memory)
            runs = bench.timed_rounds(
                methods, _whole_batches(prompts, batch), rounds=rounds, progress=lambda: bar.advance(task)
            )
            for m in bench.summaries(runs, batch=batch, temperature=temperature):
                way = known[m.method]
                found.append(replace(m, family=way.family, num_draft_tokens=way.num_draft_tokens))
            after_cell(found)
    return found


def limit_of(found: Sequence[Measurement], weight_bytes: int) -> Limit | None:
    """What memory, as it was measured beside plain decoding, allows a target whose passes read so many bytes."""
    memory = [m.bytes_per_second for m in found if m.bytes_per_second is not None]
    return Limit(statistics.median(memory), weight_bytes) if memory else None


def _able(ways: Sequence[Way], batch: int) -> list[Way]:
    return [way for way in ways if way.largest_batch is None or batch <= way.largest_batch]


def _whole_batches(prompts: Sequence[Sequence[int]], batch: int) -> list[Sequence[int]]:
    """The prompts, repeated as far as the last batch needs it."""
    return [prompts[i % len(prompts)] for i in range(-(-len(prompts) // batch) * batch)]
