"""Options that commands share, and what is made of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.errors import ConfigError

_TEXT = "'stdlib', or a text file or folder like what you will generate."
_ON_POLICY = "Share of the budget spent on text that the target writes."
_VOCABULARY = "Guess only so many of the text's most frequent tokens, for large vocabularies; 0: all."
_DTYPE = "float32, bfloat16, float16, int8, or auto: the checkpoint's own."
_DEVICE = "cpu, cuda, or auto: the GPU when there is one."

Target = Annotated[str, typer.Argument(help="Directory or hub id of the target model.", metavar="MODEL")]
Draft = Annotated[
    list[str] | None,
    typer.Option(
        help="Directory or hub id of a draft model, or 'suffix' (what the text repeats: no model needed, the default); "
        "given both, suffix where the text repeats itself, the model elsewhere. "
        "'tuned' or a .json file: what specdec tune found best."
    ),
]
Dtype = Annotated[str, typer.Option(help=_DTYPE)]
Device = Annotated[str, typer.Option(help=_DEVICE)]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate per row.")]
NumDraftTokens = Annotated[
    str | None,
    typer.Option(
        help="Tokens drafted per step; 0 is plain decoding, auto what pays most here, measured. "
        "Default: auto, or what --draft tuned says."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Text = Annotated[str, typer.Option(help=_TEXT)]
Context = Annotated[
    str,
    typer.Option(
        help="What a row does that outgrows the model's context: stop ends it, slide goes on from its latest tokens."
    ),
]
OnPolicy = Annotated[float, typer.Option(help=_ON_POLICY)]
DraftVocabulary = Annotated[int, typer.Option(help=_VOCABULARY)]
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

_OF_HEADS = "Only with --drafter"
HeadSeconds = Annotated[float, typer.Option(help="Stop after this long; 0 is no limit.", rich_help_panel=_OF_HEADS)]
HeadTokens = Annotated[int, typer.Option(help="Stop after so many tokens; 0 is no limit.", rich_help_panel=_OF_HEADS)]
HeadText = Annotated[str, typer.Option(help=_TEXT, rich_help_panel=_OF_HEADS)]
HeadOnPolicy = Annotated[float, typer.Option(help=_ON_POLICY, rich_help_panel=_OF_HEADS)]
HeadVocabulary = Annotated[int, typer.Option(help=_VOCABULARY, rich_help_panel=_OF_HEADS)]
HeadWidth = Annotated[
    int,
    typer.Option(help="Of an eagle3 head; 0 is the target's. Narrow ones draft faster.", rich_help_panel=_OF_HEADS),
]
HeadDtype = Annotated[str, typer.Option(help=_DTYPE, rich_help_panel=_OF_HEADS)]
HeadDevice = Annotated[str, typer.Option(help=_DEVICE, rich_help_panel=_OF_HEADS)]
ONLY_WITH_DRAFTER = ("seconds", "tokens", "data", "on_policy", "draft_vocab_size", "width", "dtype", "device")


def refuse_options_of_heads(context: typer.Context) -> None:
    """Raise ``ConfigError`` for options of ``train`` that were given and that a recipe's training does not look at."""
    for name in ONLY_WITH_DRAFTER:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} goes with --drafter only, got {option} {context.params[name]} with the recipe "
                f"{context.params['recipe']}; set it in the recipe, or pass --drafter to train a head for a model"
            )


def draft_length(given: str | None) -> dict[str, Any]:
    """What ``Settings`` takes for it; it refuses what is neither a number nor "auto"."""
    if given is None:
        return {}
    return {"num_draft_tokens": int(given) if re.fullmatch(r"-?\d+", given) else given}


def drafters(names: list[str] | None) -> str | list[str]:
    """What ``load`` takes for the drafters that were named."""
    from specdec.drafting import DEFAULT

    return names[0] if names and len(names) == 1 else names or DEFAULT
