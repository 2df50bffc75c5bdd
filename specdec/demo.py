"""The main job, on input that every machine has: train a pair, decode with it four ways, check, show."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors import safe_open

from specdec import bench
from specdec.checkpoints import device_named
from specdec.distill import distill_checkpoint
from specdec.draft import Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.lm.native import decoding_dtype
from specdec.load import accepted_length, load
from specdec.machine import cache_directory, fast_dtype
from specdec.picture import draw
from specdec.places import check_file
from specdec.text import TextStream
from specdec.training.data import gather, held_out_prompts
from specdec.training.distill_recipe import DistillSettings
from specdec.training.recipe import Recipe, parse_recipe
from specdec.training.trainer import train
from specdec.tuned import LOOKUP
from specdec.widen import Width, wide_pair

BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 96, 5
LARGE_PROMPTS, LARGE_TOKENS, LARGE_ROUNDS = 2, 64, 3
WIDE = Width()
ON_TEXT = "draft-on-text"
DISTILLATION = DistillSettings(max_seconds=75, on_policy=0.6, patience=0)


def training_dtype_name() -> str:
    """The precision that this machine learns fastest in."""
    return str(fast_dtype(device_named("auto"))).removeprefix("torch.")


def decoding_dtype_name() -> str:
    """The precision that this machine decodes fastest in."""
    return str(decoding_dtype(device_named("auto"))).removeprefix("torch.")


def demo_recipe() -> Recipe:
    """The recipe that travels with the package."""
    text = files("specdec").joinpath("recipes/demo.toml").read_text(encoding="utf-8")
    return parse_recipe(text, "specdec/recipes/demo.toml")


def demo_pair(console: Console | None = None) -> Path:
    """The directory of the demo's trained pair; trains it on the first call."""
    console = console or Console(stderr=True)
    recipe = demo_recipe()
    pair = cache_directory() / f"demo-{recipe.fingerprint()[:12]}"
    if (pair / "report.json").is_file() and _is_distilled(pair):
        console.print(f"[bold]1. Trained pair[/] found in {escape(str(pair))}")
        return pair
    console.print("[bold]1. Training[/] a target and a draft GPT together on the standard library's source")
    console.print(
        f"   into {escape(str(pair))} (minutes, once; Ctrl-C saves a checkpoint and the next run goes on from it)"
    )
    if not (pair / ON_TEXT).is_dir():
        train(recipe, pair, decode=accepted_length)
    console.print("   A narrower draft learns what the target writes; the one that learned from text alone is kept")
    _distill_draft(pair)
    return pair


def _is_distilled(pair: Path) -> bool:
    return (pair / ON_TEXT).is_dir() and (pair / "draft").is_dir()


def _distill_draft(pair: Path) -> None:
    """Put a draft that learned from the target in the place of the one that learned from text; that becomes ON_TEXT."""
    made, draft, on_text = pair / "distilled", pair / "draft", pair / ON_TEXT
    if not on_text.is_dir():
        distill_checkpoint(str(pair / "target"), made, "stdlib", DISTILLATION, dtype=training_dtype_name())
        os.replace(draft, on_text)
    os.replace(made, draft)


def pair_or_demo(target: str | None, draft: Sequence[str] | None) -> tuple[str, str | list[str]]:
    """A user's pair as ``load`` takes it; the demo's where none is named. Raises ``ConfigError`` for half a pair."""
    if target is None and not draft:
        pair = demo_pair()
        return str(pair / "target"), str(pair / "draft")
    if target is None or not draft:
        raise ConfigError(f'a pair is a target and a draft (a model or "{LOOKUP}"), got {target=} and {draft=}')
    return target, draft[0] if len(draft) == 1 else list(draft)


def demo(picture: Path, console: Console) -> None:
    """Train (first run only), decode held-out code, and print what speculation brings."""
    check_file(picture, "--picture")
    kinds = [f".{kind}" for kind in Figure().canvas.get_supported_filetypes()]
    if picture.suffix.lower() not in ("", *kinds):
        raise ConfigError(f"--picture must end in one of {', '.join(kinds)}, got {picture}")
    pair = demo_pair(console)
    dtype = decoding_dtype_name()
    engine = load(pair / "target", draft=pair / "draft", dtype=dtype)
    assert engine.tokenizer is not None and engine.drafter is not None
    prompts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=max(BATCHES), tokens=PROMPT_TOKENS)
    large, found_large = measure_large(pair, prompts, dtype, console)
    console.print(bench.table(found_large, f"{large}, held-out code, one prompt at a time"))
    console.print(
        f"[bold]3. The small target itself[/]: {NEW_TOKENS} tokens after {len(prompts)} prompts; nothing to wait for"
    )
    found = measure(engine, pair / "target", prompts, dtype, console)
    small = f"{millions(pair / 'target')} M parameters"
    console.print(bench.table(found, f"{small}, held-out code, the same prompts for all"))
    check(pair, prompts, found, console)
    show(engine, prompts[0], console)
    groups = {f"widened to {large},\nbatch 1": found_large}
    groups |= {f"{small},\nbatch {batch}": [m for m in found if m.batch == batch] for batch in BATCHES}
    draw(groups, picture, "specdec: same text, fewer passes of the large model")
    best = [f"{max(m.speedup for m in own if m.mean_acceptance_length):.2f}x" for own in groups.values()]
    console.print(
        f"[bold green]Best: {best[0]} of plain decoding with {large}; {best[1]} and {best[2]} with {small} "
        f"(batch 1 and 8)[/], picture saved to {escape(str(picture))}"
    )


def millions(checkpoint: Path) -> int:
    """Parameters of a checkpoint."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return round(sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()) / 1e6)  # noqa: SIM118


def measure_large(
    pair: Path, prompts: Sequence[Sequence[int]], dtype: str, console: Console
) -> tuple[str, list[bench.Measurement]]:
    """What ``measure`` finds with the target widened: its texts, at a large model's cost. What it is called, too."""
    target, draft = wide_pair(pair, WIDE)
    name = f"{millions(target)} M parameters"
    console.print(
        f"[bold]2. Decoding[/] greedily in {dtype} with the target widened to {name}: the same texts at the cost"
    )
    console.print("   of a large model, whose weights are what decoding waits for")
    found = measure(
        load(target, draft=draft, dtype=dtype), target, prompts[:LARGE_PROMPTS], dtype, console, batches=BATCHES[:1],
        new_tokens=LARGE_TOKENS, rounds=LARGE_ROUNDS,
    )  # fmt: skip
    return name, found


def measure(
    engine: Engine,
    target: Path,
    prompts: Sequence[Sequence[int]],
    dtype: str,
    console: Console,
    batches: Sequence[int] = BATCHES,
    new_tokens: int | None = None,
    rounds: int | None = None,
) -> list[bench.Measurement]:
    """Plain decoding and every way to guess on our engine, and Hugging Face's ``generate`` on the same checkpoint."""
    new_tokens, rounds = new_tokens or NEW_TOKENS, rounds or ROUNDS
    methods = bench.own_methods(engine, ways_to_guess(engine), max_new_tokens=new_tokens)
    reference = bench.hf_model(target, dtype).to(engine.target.device)
    methods["HF generate"] = bench.hf_method(reference, **bench.hf_settings(new_tokens))
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(batches) * len(methods) * (rounds + 1))
        found = []
        for batch in batches:
            ways = methods if batch > 1 else {name: bench.one_by_one(way) for name, way in methods.items()}
            cell = bench.compare(ways, prompts, rounds=rounds, progress=lambda: progress.advance(task))
            found += [replace(one, batch=batch) for one in cell]
        return found


def ways_to_guess(engine: Engine) -> dict[str, Drafter]:
    """The engine's own draft model, suffix decoding, and both."""
    assert engine.drafter is not None
    both = HybridDrafter(engine.drafter, SuffixDrafter())
    return {"draft model": engine.drafter, "suffix": SuffixDrafter(), "both": both}


def check(pair: Path, prompts: Sequence[Sequence[int]], found: Sequence[bench.Measurement], console: Console) -> None:
    """Say whether speculation changed any greedy text: in float32, where none may, and as measured."""
    engine = load(pair / "target", draft=pair / "draft", dtype="float32")
    plain = engine.generate(prompts, max_new_tokens=NEW_TOKENS, num_draft_tokens=0, eos_token_id=None)
    same, total, ways = 0, 0, ways_to_guess(engine)
    for drafter in ways.values():
        speculative = Engine(engine.target, drafter, vocab_size=engine.limits.vocab_size)
        output = speculative.generate(prompts, max_new_tokens=NEW_TOKENS, eos_token_id=None, num_draft_tokens=4)
        same += sum(a == b for a, b in zip(output.token_ids, plain.token_ids, strict=True))
        total += len(prompts)
    verdict = "[green]identical to plain decoding[/]" if same == total else "[red]DIFFERENT from plain decoding[/]"
    console.print(f"[bold]4. Check[/] float32: {same} of {total} speculative greedy texts {verdict}")
    ours = [m for m in found if m.method in ways and m.same_text is not None]
    equal, rows = sum(m.same_text or 0 for m in ours), len(ours) * len(prompts)
    console.print(
        f"   as measured above: {equal} of {rows} identical"
        + ("" if equal == rows else "; rounding in bfloat16 flips a near-tie now and then")
    )


def show(engine: Engine, prompt: Sequence[int], console: Console) -> None:
    """One completion, tokens of accepted drafts in one colour and the target's own in another."""
    assert engine.tokenizer is not None
    output = engine.generate([list(prompt)], max_new_tokens=NEW_TOKENS, eos_token_id=None)
    text, stream = Text(), TextStream(engine.tokenizer)
    for token, guessed in zip(output.token_ids[0], output.from_draft[0], strict=True):
        stream.push(token)
        text.append(stream.take(), style="green" if guessed else "bold yellow")
    stream.finish()
    text.append(stream.take())
    guessed_share = sum(output.from_draft[0]) / len(output.from_draft[0])
    console.print(
        f"[bold]5. One completion[/] [green]guessed by the draft and accepted ({guessed_share:.0%})[/], "
        "[bold yellow]the target's own[/]"
    )
    console.print(Text(engine.tokenizer.decode(prompt[-40:]), style="dim"), text, sep="")
