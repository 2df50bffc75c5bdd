"""The command line: ``specdec demo | generate | check | bench | tune | train | distill``."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text as Plain
from transformers import PreTrainedTokenizerBase

from specdec import __version__
from specdec.controller import AUTO
from specdec.errors import ConfigError, PromptError, SpecDecError
from specdec.options import (
    Batch,
    Compared,
    Context,
    Device,
    Draft,
    DraftVocabulary,
    Dtype,
    Fresh,
    HeadDevice,
    HeadDtype,
    HeadOnPolicy,
    HeadSeconds,
    HeadText,
    HeadTokens,
    HeadVocabulary,
    HeadWidth,
    Lengths,
    MaxNewTokens,
    NumDraftTokens,
    OnPolicy,
    PromptFile,
    Prompts,
    Rounds,
    Target,
    Temperature,
    Text,
    draft_length,
    drafters,
    refuse_options_of_heads,
)
from specdec.output import Piece
from specdec.places import check_file, check_folder, read_text

app = typer.Typer(
    help="Faster text generation that does not change the text: a small drafter guesses tokens, the large target "
    "checks them in one parallel pass. Start with `specdec demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Entry point: errors that a user can mend are one clear line, not a traceback."""
    transformers.utils.logging.disable_progress_bar()  # loading is said by the commands themselves
    try:
        app()
    except SpecDecError as error:
        Console(stderr=True).print(Plain(f"{type(error).__name__}:", "red"), Plain(str(error)), soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Lossless, batched speculative decoding."""
    if show:
        print(f"specdec {__version__}")
        raise typer.Exit


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("specdec-demo.png"),
) -> None:
    """Train a small pair on the standard library's source (first run: minutes), decode with it, compare, check."""
    from specdec.demo import demo as run

    run(picture, Console())


@app.command()
def generate(
    model: Target,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat the option for several.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file that is one prompt.")] = None,
    draft: Draft = None,
    max_new_tokens: MaxNewTokens = 128,
    num_draft_tokens: NumDraftTokens = None,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that make up this mass; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely next to the likeliest; 0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divide repeated tokens' logits; 1 is off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End a row before this string; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    n: Annotated[int, typer.Option("--n", help="Samples per prompt.")] = 1,
    rule: Annotated[
        str,
        typer.Option(
            help="block, rejection, coupled (same text as plain with that seed), or auto: coupled with a seed."
        ),
    ] = AUTO,
    context: Context = "stop",
    stats: Annotated[bool, typer.Option(help="Print counters and rates to stderr.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt. One prompt streams as it is written; several print in order when done.

    Example: specdec generate ./target --draft ./draft --draft suffix --prompt "def main(" --stats
    """
    from specdec.load import load

    prompts = [*(prompt or []), *([read_text(prompt_file)] if prompt_file else [])]
    if not prompts:
        raise PromptError('no prompt given; pass --prompt "..." or --prompt-file FILE')
    engine = load(model, draft=drafters(draft), dtype=dtype, device=device)
    single = len(prompts) * n == 1

    def write(piece: Piece) -> None:
        print(piece.text, end="", flush=True)

    output = engine.generate(
        prompts, max_new_tokens=max_new_tokens, **draft_length(num_draft_tokens), temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop=stop or (), seed=seed,
        n=n, rule=rule, context=context, on_piece=write if single else None,
    )  # fmt: skip
    for index, text in enumerate(output.texts or []):
        print("" if single else f"--- {index} ({output.finish_reasons[index]}) ---\n{text}")
    if stats:
        Console(stderr=True).print(str(output.stats), highlight=False, markup=False)


@app.command()
def bench(
    model: Target,
    draft: Compared = None,
    prompt_file: PromptFile = None,
    prompts: Prompts = 4,
    batch: Batch = None,
    k: Lengths = None,
    temperature: Annotated[list[float] | None, typer.Option(help="0 is greedy; repeatable. Default 0.", min=0)] = None,
    max_new_tokens: MaxNewTokens = 64,
    rounds: Rounds = 3,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure Hugging Face, and OpenVINO GenAI and vLLM where installed.")
    ] = False,
    peer_python: Annotated[
        list[str] | None, typer.Option(help="A Python that has some of them; repeatable. Alone: no Hugging Face.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, .md, .png and .json.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare plain decoding and every drafter at every draft length on your own models and prompts.

    Example: specdec bench ./target --draft ./draft --prompt-file prompts.txt --out report
    """
    from specdec import sweep
    from specdec.bench import Measurement, medians_of, table
    from specdec.machine import machine
    from specdec.report import Report

    lengths = sweep.lengths_of(k or sweep.EVERY_LENGTH)
    if out is not None:
        check_folder(out)
    plain, drafting = sweep.engines(model, draft or [], dtype=dtype, device=device)
    texts = _bench_prompts(plain.tokenizer, prompt_file, prompts)
    ways = sweep.own_ways(plain, drafting, lengths, max_new_tokens)
    console, target = Console(), plain.target
    dtype = "int8" if target.in_bytes else str(target.dtype).removeprefix("torch.")
    settings = {"dtype": dtype, "prompts": len(texts), "new tokens": max_new_tokens, "rounds": rounds}

    def report(found: list[Measurement]) -> Report:
        limit = sweep.limit_of(found, target.weight_bytes)
        made = Report(f"{Path(model).name}: ways to generate", found, machine(), settings, limit)
        if out is not None:
            made.write(out)
        return made

    with ExitStack() as stack:
        if peers or peer_python:
            helper, where = sweep.first_model(drafting), peer_python or []
            ways += sweep.installed_ways(stack, model, helper, plain, lengths, max_new_tokens, where, hf=peers)
        found = sweep.measure(
            ways, texts, batches=batch or [1, 8], temperatures=temperature or [0.0], rounds=rounds, console=console,
            memory=target.read_bandwidth if target.weight_bytes else None, after_cell=report,
        )  # fmt: skip
    console.print(table(found, f"{escape(Path(model).name)}, {medians_of(rounds)}"))
    for line in report(found).lines():
        console.print(line, highlight=False, markup=False)
    if out is not None:
        console.print(f"Report: {out / 'report.html'}", markup=False)


@app.command()
def check(
    model: Target,
    draft: Draft = None,
    prompt_file: PromptFile = None,
    prompts: Annotated[
        int | None,
        typer.Option(help="How many prompts to use, at most. Default: 8; without a file too, short texts.", min=1),
    ] = None,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens drafted per step.")] = 4,
    max_new_tokens: MaxNewTokens = 64,
    samples: Annotated[int, typer.Option(help="Samples of every tested law.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="JSON file for what was found.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Check that a drafter changes no text; exit code 1 if it does, or if the tests notice no planted error.

    Example: specdec check ./target --draft ./draft
    """
    from specdec.check import check as run
    from specdec.load import load

    if out is not None:
        check_file(out)
    engine = load(model, draft=drafters(draft), dtype=dtype, device=device)
    own = prompt_file is None and prompts is None
    texts = None if own else _bench_prompts(engine.tokenizer, prompt_file, prompts or 8)
    report = run(
        engine, prompts=texts, num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens, samples=samples
    )
    Console().print(report.table(f"{escape(Path(model).name)}: is the text unchanged?"))
    if out is not None:
        out.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(code=0 if report.passed else 1)


@app.command()
def tune(
    model: Target,
    draft: Compared = None,
    prompt_file: PromptFile = None,
    prompts: Prompts = 4,
    batch: Batch = None,
    k: Lengths = None,
    max_new_tokens: MaxNewTokens = 64,
    rounds: Rounds = 3,
    out: Annotated[
        Path | None, typer.Option(help="The file; its name ends in .json. Default: specdec-tune.json in MODEL.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure what suits a pair best on this machine, greedy and sampled, for --draft tuned of generate.

    Example: specdec tune ./target --draft ./draft && specdec generate ./target --draft tuned --prompt "def main("
    """
    from specdec import sweep
    from specdec.bench import medians_of, table
    from specdec.tune import choose, place

    file = place(model, out)
    lengths = sweep.lengths_of([AUTO, *(k or sweep.EVERY_LENGTH)])
    plain, drafting = sweep.engines(model, draft or [], dtype=dtype, device=device)
    ways = sweep.own_ways(plain, drafting, lengths, max_new_tokens)
    texts = _bench_prompts(plain.tokenizer, prompt_file, prompts)
    console = Console()
    found = sweep.measure(ways, texts, batches=batch or [1, 8], temperatures=[0.0, 1.0], rounds=rounds, console=console)
    console.print(table(found, f"{escape(Path(model).name)}, {medians_of(rounds)}"))
    tuned = choose(found, {name: one.draft for name, one in drafting.items()}, model)
    tuned.write(file)
    for line in (*tuned.lines(), f"Settings: {file}"):
        console.print(line, highlight=False, markup=False)


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A TOML recipe; a model with --drafter.", metavar="RECIPE.toml|MODEL")],
    out: Annotated[Path | None, typer.Option(help="Output directory. Default: next to the recipe.")] = None,
    drafter: Annotated[str | None, typer.Option(help="eagle3 or block: what drafts from its hidden states.")] = None,
    seconds: HeadSeconds = 600.0,
    tokens: HeadTokens = 0,
    data: HeadText = "stdlib",
    on_policy: HeadOnPolicy = 0.0,
    draft_vocab_size: HeadVocabulary = 0,
    width: HeadWidth = 0,
    fresh: Fresh = False,
    dtype: HeadDtype = "auto",
    device: HeadDevice = "auto",
) -> None:
    """Train a target and its draft together; Ctrl-C saves a checkpoint and the same command goes on from it.

    Example: specdec train models/tiny.toml

    On several GPUs: accelerate launch -m specdec train models/stdlib-large.toml

    With --drafter, train a head for a model that exists; the best one so far is kept in OUT, for --draft:
    specdec train ./target --drafter eagle3 --out ./head
    """
    if drafter is None:
        from specdec.load import accepted_length
        from specdec.training.recipe import load_recipe
        from specdec.training.trainer import train as run

        refuse_options_of_heads(context)
        run(load_recipe(Path(recipe)), out or Path(recipe).with_suffix(""), resume=not fresh, decode=accepted_length)
        return
    from specdec.heads import train_checkpoint
    from specdec.training.head_trainer import HeadSettings

    settings = HeadSettings(max_seconds=seconds, max_tokens=tokens, on_policy=on_policy)
    report = train_checkpoint(
        recipe, drafter, out, data, settings, draft_vocab_size=draft_vocab_size, width=width, dtype=dtype,
        device=device, fresh=fresh,
    )  # fmt: skip
    Console().print(report.table(escape(str(out))))


@app.command()
def distill(
    target: Target,
    out: Annotated[Path, typer.Option(help="Directory for the draft; --draft of generate and bench takes it.")],
    draft_shape: Annotated[
        str, typer.Option(help="wide, small, tiny or lstm; wide begins as some layers of the target.")
    ] = ("small"),
    data: Text = "stdlib",
    loss: Annotated[
        str, typer.Option(help="lk_hybrid, lk, tv, forward_kl, reverse_kl, or cross_entropy (no teacher).")
    ] = "lk_hybrid",
    on_policy: OnPolicy = 0.5,
    max_seconds: Annotated[float, typer.Option(help="Stop after this long; 0 is no limit.")] = 600.0,
    max_tokens: Annotated[int, typer.Option(help="Stop after learning from so many tokens; 0 is no limit.")] = 0,
    draft_vocab_size: DraftVocabulary = 0,
    fresh: Fresh = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train a draft for a target that exists, any Hugging Face causal LM; the best draft so far is kept in OUT.

    Ctrl-C saves a checkpoint and the same command goes on from it.

    Example: specdec distill ./target --out ./draft --draft-shape small --data ./my-code
    """
    from specdec.distill import distill_checkpoint
    from specdec.training.distill_recipe import DistillSettings

    settings = DistillSettings(
        shape=draft_shape, loss=loss, on_policy=on_policy, max_seconds=max_seconds, max_tokens=max_tokens,
        draft_vocab_size=draft_vocab_size,
    )  # fmt: skip
    report = distill_checkpoint(target, out, data, settings, dtype=dtype, device=device, resume=not fresh)
    table = Table("tokens", "accepted length, greedy", "T=1", "acceptance", title=escape(str(out)))
    for i, e in enumerate(report.evaluations):
        style = "bold green" if i == report.best else None
        figures = (f"{e.greedy_length:.2f}", f"{e.sampled_length:.2f}", f"{e.alpha:.1%}")
        table.add_row(f"{e.tokens:,}", *figures, style=style)
    Console().print(table)


def _bench_prompts(tokenizer: PreTrainedTokenizerBase | None, file: Path | None, count: int) -> list[list[int]]:
    """At most ``count`` prompts: the first paragraphs of a file, or held-out standard library code."""
    from specdec.training.data import gather, held_out_prompts

    if tokenizer is None:
        raise ConfigError(
            "prompts need the model's tokenizer, and there is none next to its weights; add tokenizer.json"
        )
    if file is None:
        return held_out_prompts(tokenizer, gather("stdlib"), count=count, tokens=128)
    paragraphs = [part for part in read_text(file).split("\n\n") if part.strip()]
    if not paragraphs:
        raise PromptError(f"{file} holds no prompt; expected paragraphs between blank lines")
    return [tokenizer(paragraph)["input_ids"] for paragraph in paragraphs[:count]]
