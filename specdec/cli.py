"""The command line: ``specdec demo | generate | check | bench | tune | train | distill``."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from specdec import __version__
from specdec.controller import AUTO
from specdec.errors import ConfigError, PromptError, SpecDecError
from specdec.output import Piece
from specdec.requests import Settings

app = typer.Typer(
    help="Faster text generation that does not change the text: a small drafter guesses tokens, the large target "
    "checks them in one parallel pass. Start with `specdec demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
DEFAULTS = Settings()

Target = Annotated[str, typer.Argument(help="Directory or hub id of the target model.", metavar="MODEL")]
Draft = Annotated[
    list[str] | None,
    typer.Option(
        help="Directory or hub id of a draft model, or 'suffix' (what the text repeats: no model needed, the default); "
        "given both, suffix where the text repeats itself, the model elsewhere. "
        "'tuned' or a .json file: what specdec tune found best."
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, int8, or auto: the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU when there is one.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate per row.")]
NumDraftTokens = Annotated[
    str | None,
    typer.Option(
        help="Tokens drafted per step; 0 is plain decoding, auto what pays most here, measured. "
        "Default: auto, or what --draft tuned says."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Text = Annotated[str, typer.Option(help="'stdlib', or a text file or folder like what you will generate.")]
OnPolicy = Annotated[float, typer.Option(help="Share of the budget spent on text that the target writes.")]
DraftVocabulary = Annotated[
    int, typer.Option(help="Guess only so many of the text's most frequent tokens, for large vocabularies; 0: all.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on from what is there.")]
Compared = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        help="Directory or hub id of a draft model; repeatable. 'suffix' is always compared, "
        "alone and with every model.",
    ),
]
Lengths = Annotated[
    list[str] | None, typer.Option(help="Draft lengths: 3, 1..8 or auto; repeatable. Default auto and 1..8.")
]
Batch = Annotated[list[int] | None, typer.Option(help="Batch sizes; repeatable. Default 1 and 8.", min=1)]
PromptFile = Annotated[
    Path | None, typer.Option(help="Text file; paragraphs between blank lines are prompts. Default: held-out code.")
]
Prompts = Annotated[int, typer.Option(help="How many prompts to use, at most.", min=1)]
Rounds = Annotated[int, typer.Option(help="Timed rounds; medians are reported.", min=1)]


def main() -> None:
    """Entry point: errors that a user can mend are one clear line, not a traceback."""
    transformers.utils.logging.disable_progress_bar()  # loading is said by the commands themselves
    try:
        app()
    except SpecDecError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/] {error}", highlight=False)
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


def _draft_length(given: str | None) -> dict[str, Any]:
    """What ``Settings`` takes for it; it refuses what is neither a number nor "auto"."""
    if given is None:
        return {}
    return {"num_draft_tokens": int(given) if given.lstrip("-").isdecimal() else given}


def _drafters(names: list[str] | None) -> str | list[str]:
    """What ``load`` takes for the drafters that were named."""
    from specdec.drafting import DEFAULT

    return names[0] if names and len(names) == 1 else names or DEFAULT


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
    stats: Annotated[bool, typer.Option(help="Print counters and rates to stderr.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt. One prompt streams as it is written; several print in order when done.

    Example: specdec generate ./target --draft ./draft --draft suffix --prompt "def main(" --stats
    """
    from specdec.load import load

    prompts = [*(prompt or []), *([prompt_file.read_text(encoding="utf-8")] if prompt_file else [])]
    if not prompts:
        raise PromptError('no prompt given; pass --prompt "..." or --prompt-file FILE')
    engine = load(model, draft=_drafters(draft), dtype=dtype, device=device)
    single = len(prompts) * n == 1

    def write(piece: Piece) -> None:
        print(piece.text, end="", flush=True)

    output = engine.generate(
        prompts, max_new_tokens=max_new_tokens, **_draft_length(num_draft_tokens), temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop=stop or (), seed=seed,
        n=n, rule=rule, on_piece=write if single else None,
    )  # fmt: skip
    for index, text in enumerate(output.texts or []):
        print("" if single else f"--- {index} ({output.finish_reasons[index]}) ---\n{text}")
    if stats:
        Console(stderr=True).print(str(output.stats), highlight=False)


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
    from specdec.bench import Measurement, table
    from specdec.machine import machine
    from specdec.report import Report

    lengths = sweep.lengths_of(k or sweep.EVERY_LENGTH)
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
    console.print(table(found, f"{Path(model).name}, medians of {rounds} rounds"))
    for line in report(found).lines():
        console.print(line, highlight=False)
    if out is not None:
        console.print(f"Report: {out / 'report.html'}")


@app.command()
def check(
    model: Target,
    draft: Draft = None,
    prompt_file: PromptFile = None,
    prompts: Prompts = 8,
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

    engine = load(model, draft=_drafters(draft), dtype=dtype, device=device)
    texts = None if prompt_file is None else _bench_prompts(engine.tokenizer, prompt_file, prompts)
    report = run(
        engine, prompts=texts, num_draft_tokens=num_draft_tokens, max_new_tokens=max_new_tokens, samples=samples
    )
    Console().print(report.table(f"{Path(model).name}: is the text unchanged?"))
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
    from specdec.bench import table
    from specdec.tune import choose, place

    file = place(model, out)
    lengths = sweep.lengths_of([AUTO, *(k or sweep.EVERY_LENGTH)])
    plain, drafting = sweep.engines(model, draft or [], dtype=dtype, device=device)
    ways = sweep.own_ways(plain, drafting, lengths, max_new_tokens)
    texts = _bench_prompts(plain.tokenizer, prompt_file, prompts)
    console = Console()
    found = sweep.measure(ways, texts, batches=batch or [1, 8], temperatures=[0.0, 1.0], rounds=rounds, console=console)
    console.print(table(found, f"{Path(model).name}, medians of {rounds} rounds"))
    tuned = choose(found, {name: one.draft for name, one in drafting.items()}, model)
    tuned.write(file)
    for line in tuned.lines():
        console.print(line, highlight=False)
    console.print(f"Settings: {file}", highlight=False)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML recipe; a model with --drafter.", metavar="RECIPE.toml|MODEL")],
    out: Annotated[Path | None, typer.Option(help="Output directory. Default: next to the recipe.")] = None,
    drafter: Annotated[str | None, typer.Option(help="eagle3 or block: what drafts from its hidden states.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after this long; 0 is no limit.")] = 600.0,
    tokens: Annotated[int, typer.Option(help="Stop after so many tokens; 0 is no limit.")] = 0,
    data: Text = "stdlib",
    on_policy: OnPolicy = 0.0,
    draft_vocab_size: DraftVocabulary = 0,
    width: Annotated[int, typer.Option(help="Of an eagle3 head; 0 is the target's. Narrow ones draft faster.")] = 0,
    fresh: Fresh = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
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

        run(load_recipe(Path(recipe)), out or Path(recipe).with_suffix(""), resume=not fresh, decode=accepted_length)
        return
    from specdec.heads import train_checkpoint
    from specdec.training.head_trainer import HeadSettings

    settings = HeadSettings(max_seconds=seconds, max_tokens=tokens, on_policy=on_policy)
    report = train_checkpoint(
        recipe, drafter, out, data, settings, draft_vocab_size=draft_vocab_size, width=width, dtype=dtype,
        device=device, fresh=fresh,
    )  # fmt: skip
    Console().print(report.table(f"{out}"))


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
    table = Table("tokens", "accepted length, greedy", "T=1", "acceptance", title=f"{out}")
    for i, e in enumerate(report.evaluations):
        style = "bold green" if i == report.best else None
        figures = (f"{e.greedy_length:.2f}", f"{e.sampled_length:.2f}", f"{e.alpha:.1%}")
        table.add_row(f"{e.tokens:,}", *figures, style=style)
    Console().print(table)


def _bench_prompts(tokenizer: PreTrainedTokenizerBase | None, file: Path | None, count: int) -> list[list[int]]:
    """At most ``count`` prompts: the first paragraphs of a file, or held-out standard library code."""
    from specdec.training.data import gather, held_out_prompts

    if tokenizer is None:
        raise ConfigError("bench and tune need the model's tokenizer, and there is none next to its weights")
    if file is None:
        return held_out_prompts(tokenizer, gather("stdlib"), count=count, tokens=128)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(f"{file} cannot be read as text: {error}") from error
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise PromptError(f"{file} holds no prompt; expected paragraphs between blank lines")
    return [tokenizer(paragraph)["input_ids"] for paragraph in paragraphs[:count]]
