"""A recipe: everything that decides a trained target/draft pair, read from one TOML file and checked.

Unknown keys, wrong types and values out of range are errors that name the file, the line, the key and what is allowed.
``base = "demo"`` starts from a packaged recipe; what the file says itself goes before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

from transformers import LlamaConfig

from specdec.errors import ConfigError
from specdec.nn.lstm import LSTMConfig

Section = TypeVar("Section", "DataRecipe", "TokenizerRecipe", "ShapeRecipe", "TrainRecipe")
Value = TypeVar("Value", int, float, bool, str)
_LATER = {
    "target": ("kind",),
    "draft": ("kind",),
    "data": ("text_key", "name", "subset", "split"),
    "train": (
        "decay", "accumulate", "separate_documents", "max_skipped_batches", "compile", "target_device", "draft_device"
    ),
}  # fmt: skip
_WATCHING = ("evaluate_steps", "evaluate_seconds", "trackers")  # of [train]: they change no weight
_ATTENTION = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what an LSTM has none of
_KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Allowed:
    """What a setting may be: a range with both ends included, or one of some texts."""

    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object, where: str) -> None:
        """Raise ConfigError that names ``where`` unless ``value`` is allowed."""
        for given in value if isinstance(value, tuple) else (value,):
            if isinstance(given, str) and self.choices and given not in self.choices:
                raise ConfigError(f"{where} must be one of {', '.join(map(repr, self.choices))}, got {given!r}")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise ConfigError(f"{where} must be finite, got {value!r}")
            if self.low is not None and value < self.low:
                raise ConfigError(f"{where} must be >= {self.low:g}, got {value!r}")
            if self.high is not None and value > self.high:
                raise ConfigError(f"{where} must be <= {self.high:g}, got {value!r}")


@dataclass(frozen=True)
class DataRecipe:
    """Where the text comes from; see ``data.gather``.

    source = "stdlib": the standard library's source code. source = "path": the file or folder ``path``, relative to the
    recipe's; lines of JSONL files are documents, their text under ``text_key``. source = "datasets": the hub's dataset
    ``name`` with its ``subset`` and ``split``, through the optional package datasets.
    """

    source: Annotated[str, Allowed(choices=("stdlib", "path", "datasets"))] = "stdlib"
    path: str = ""
    text_key: str = "text"
    name: str = ""
    subset: str = ""
    split: str = "train"


@dataclass(frozen=True)
class TokenizerRecipe:
    """Byte-level BPE: 256 bytes and the end of text are always in the vocabulary."""

    vocab_size: Annotated[int, Allowed(low=257, high=1_000_000)]


@dataclass(frozen=True)
class ShapeRecipe:
    """The shape of one model, in ``LlamaConfig``'s words; of kind "lstm" there are no heads and no feed-forward."""

    hidden_size: Annotated[int, Allowed(low=8)]
    num_hidden_layers: Annotated[int, Allowed(low=1)]
    num_attention_heads: Annotated[int, Allowed(low=1)]
    num_key_value_heads: Annotated[int, Allowed(low=1)]
    intermediate_size: Annotated[int, Allowed(low=1)]
    max_position_embeddings: Annotated[int, Allowed(low=8)] = 1024
    rope_theta: Annotated[float, Allowed(low=1.0)] = 10000.0
    tie_word_embeddings: bool = True
    dropout: Annotated[float, Allowed(low=0.0, high=0.9)] = 0.0
    kind: Annotated[str, Allowed(choices=("gpt", "lstm"))] = "gpt"

    def lstm_config(self, vocab_size: int, eos_token_id: int) -> LSTMConfig:
        """The configuration of this shape, of kind "lstm"."""
        return LSTMConfig(
            vocab_size, self.hidden_size, self.num_hidden_layers,
            tie_word_embeddings=self.tie_word_embeddings, eos_token_id=eos_token_id,
        )  # fmt: skip

    def config(self, vocab_size: int, eos_token_id: int) -> LlamaConfig:
        """The Hugging Face configuration of this shape."""
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )


@dataclass(frozen=True)
class TrainRecipe:
    """Budget, batches and optimiser. At least one of ``max_steps`` and ``max_seconds`` is positive; 0 is no limit.

    ``max_seconds`` counts from the start of the run, tokenizer included. Only a run limited by steps alone is
    reproducible bit by bit; one limited by time trains as far as the machine gets.

    ``rows`` of ``sequence_length`` tokens make one update, whatever the number of processes; each process computes its
    share in ``accumulate`` parts. The learning rate rises for the share ``warmup`` of the run and falls over the last
    ``decay`` of it: 1 is a cosine, 0.2 is warm-up, stable, decay. ``separate_documents``: texts that share a row do not
    see each other. ``max_skipped_batches`` with a loss that is not finite are passed over, the next one ends the run.
    Evaluation comes every ``evaluate_steps`` or ``evaluate_seconds`` (0: at the end only) and changes no weight.
    """

    max_steps: Annotated[int, Allowed(low=0)] = 0
    max_seconds: Annotated[float, Allowed(low=0.0)] = 0.0
    rows: Annotated[int, Allowed(low=1)] = 8
    sequence_length: Annotated[int, Allowed(low=8)] = 256
    target_learning_rate: Annotated[float, Allowed(low=0.0, high=1.0)] = 2e-3
    draft_learning_rate: Annotated[float, Allowed(low=0.0, high=1.0)] = 4e-3
    final_learning_rate: Annotated[float, Allowed(low=0.0, high=1.0)] = 0.02
    warmup: Annotated[float, Allowed(low=0.0, high=0.9)] = 0.02
    weight_decay: Annotated[float, Allowed(low=0.0)] = 0.1
    clip: Annotated[float, Allowed(low=0.0)] = 1.0
    distillation: Annotated[float, Allowed(low=0.0, high=1.0)] = 0.9
    precision: Annotated[str, Allowed(choices=("auto", "float32", "bfloat16"))] = "auto"
    decay: Annotated[float, Allowed(low=0.01, high=1.0)] = 1.0
    accumulate: Annotated[int, Allowed(low=1)] = 1
    separate_documents: bool = False
    max_skipped_batches: Annotated[int, Allowed(low=0)] = 0
    compile: bool = False
    target_device: str = "auto"
    draft_device: str = "auto"
    evaluate_steps: Annotated[int, Allowed(low=0)] = 0
    evaluate_seconds: Annotated[float, Allowed(low=0.0)] = 0.0
    trackers: Annotated[tuple[str, ...], Allowed(choices=("tensorboard",))] = ()
    checkpoint_seconds: Annotated[float, Allowed(low=0.0)] = 120.0
    seed: Annotated[int, Allowed(low=0)] = 0


@dataclass(frozen=True)
class Recipe:
    """One target/draft pair, from data to schedule."""

    name: str
    data: DataRecipe
    tokenizer: TokenizerRecipe
    target: ShapeRecipe
    draft: ShapeRecipe
    train: TrainRecipe

    def fingerprint(self) -> str:
        """sha256 of every setting that decides the weights: two recipes with the same one train the same pair.

        Settings that came later count once they are set, so that pairs and checkpoints of before stay known.
        """
        settings = asdict(self)
        for name in _WATCHING:
            del settings["train"][name]
        for table, later in _LATER.items():
            for entry in fields(type(getattr(self, table))):
                if entry.name in later and settings[table][entry.name] == entry.default:
                    del settings[table][entry.name]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Origin:
    """The file that errors name, and its text, in which they find the line."""

    name: str
    text: str

    def at(self, table: str, key: str = "") -> str:
        """ "FILE, line N: table.key" of a key, of a table's head without ``key``; without the line if it is not there."""
        line, dotted = self._line(table, key), ".".join(filter(None, (table, key)))
        return f"{self.name}{f', line {line}' if line else ''}: {dotted}"

    def _line(self, table: str, key: str) -> int | None:
        inside = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if head := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
                inside = head[1]
                if inside == table and not key:
                    return number
            elif inside == table and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                return number
            elif not inside and re.match(rf"\s*{re.escape(table)}\s*[.=]", line) and key in line:
                return number  # table = { key = ... } or table.key = ...
        return None


def load_recipe(name: str | Path) -> Recipe:
    """The recipe in a TOML file, or the packaged one of that name ("demo"). Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return parse_recipe(path.read_text(encoding="utf-8"), str(path), folder=path.parent)
    return parse_recipe(_packaged(str(name), "there is no recipe"), f"{name}.toml")


def _packaged(name: str, problem: str) -> str:
    packaged = resources.files("specdec") / "recipes"
    names = sorted(entry.name.removesuffix(".toml") for entry in packaged.iterdir() if entry.name.endswith(".toml"))
    if name not in names:
        raise ConfigError(f"{problem} {name!r}: give a TOML file, or one of {', '.join(names)}")
    return (packaged / f"{name}.toml").read_text(encoding="utf-8")


def parse_recipe(text: str, origin: str, *, folder: Path | None = None) -> Recipe:
    """The recipe written in ``text``; ``origin`` is the file that errors name, ``folder`` what paths start from."""
    source = _Origin(origin, text)
    document = _document(source)
    _check_keys(document, {entry.name for entry in fields(Recipe)}, source, "")
    name = _value(document.get("name", Path(origin).stem), str, source.at("name"))
    recipe = Recipe(
        name=name,
        data=_section(DataRecipe, document, "data", source),
        tokenizer=_section(TokenizerRecipe, document, "tokenizer", source),
        target=_section(ShapeRecipe, document, "target", source),
        draft=_section(ShapeRecipe, document, "draft", source),
        train=_section(TrainRecipe, document, "train", source),
    )
    _check_together(recipe, source)
    if recipe.data.path and folder is not None:
        recipe = replace(recipe, data=replace(recipe.data, path=str((folder / recipe.data.path).resolve())))
    return recipe


def _document(source: _Origin) -> dict[str, object]:
    """The tables of a file, laid over those of the recipe that it names as its base."""
    try:
        document: dict[str, object] = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source.name} is not valid TOML: {error}") from error
    if "base" not in document:
        return document
    base = _value(document.pop("base"), str, source.at("base"))
    result: dict[str, object] = tomllib.loads(_packaged(base, f"{source.at('base')}: there is no packaged recipe"))
    del result["name"]  # this is another recipe
    for name, value in document.items():
        below = result.get(name)
        result[name] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _section(kind: type[Section], document: Mapping[str, object], name: str, source: _Origin) -> Section:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{source.at(name)} must be a table, [{name}], got {table!r}")
    hints = get_type_hints(kind, include_extras=True)
    _check_keys(table, set(hints), source, name)
    values: dict[str, object] = {}
    for entry in fields(kind):
        hint = hints[entry.name]
        value_type, *allowed = get_args(hint) or (hint,)
        if entry.name in table:
            where = source.at(name, entry.name)
            values[entry.name] = _value(table[entry.name], value_type, where)
            (allowed[0] if allowed else Allowed()).check(values[entry.name], where)
        elif table.get("kind") == "lstm" and entry.name in _ATTENTION:
            values[entry.name] = 1  # of no meaning
        elif entry.default is MISSING:
            raise ConfigError(f"{source.at(name)}.{entry.name} is missing; it is {_KINDS[value_type]}")
    return kind(**values)  # type: ignore[arg-type]


def _check_keys(table: Mapping[str, object], allowed: set[str], source: _Origin, name: str) -> None:
    for key in table:
        if key not in allowed:
            where = source.at(name, key) if name else source.at(key)
            raise ConfigError(f"{where.replace(': ', ': unknown key ', 1)}; allowed are {', '.join(sorted(allowed))}")


def _value(given: object, kind: type[Value], where: str) -> Value:
    if kind is float and type(given) is int:
        given = float(given)
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        given = tuple(given)
    if type(given) is not (get_origin(kind) or kind):  # type(), not isinstance: true is no integer
        raise ConfigError(f"{where} must be {_KINDS[kind]}, got {given!r}")
    return given


def _check_together(recipe: Recipe, source: _Origin) -> None:
    for name, shape in (("target", recipe.target), ("draft", recipe.draft)):
        if shape.kind == "lstm":
            if recipe.train.separate_documents:
                raise ConfigError(
                    f"{source.at('train', 'separate_documents')} must be false with {name}.kind = 'lstm', whose state goes "
                    "on from text to text of a row"
                )
            continue
        if shape.hidden_size % (2 * shape.num_attention_heads):
            raise ConfigError(
                f"{source.at(name, 'hidden_size')} must be a multiple of twice num_attention_heads "
                f"({shape.num_attention_heads}), got {shape.hidden_size}"
            )
        if shape.num_attention_heads % shape.num_key_value_heads:
            raise ConfigError(
                f"{source.at(name, 'num_key_value_heads')} must divide num_attention_heads "
                f"({shape.num_attention_heads}), got {shape.num_key_value_heads}"
            )
        if recipe.train.sequence_length > shape.max_position_embeddings:
            raise ConfigError(
                f"{source.at('train', 'sequence_length')} must be <= {name}.max_position_embeddings "
                f"({shape.max_position_embeddings}), got {recipe.train.sequence_length}"
            )
    if not recipe.train.max_steps and not recipe.train.max_seconds:
        raise ConfigError(f"{source.name}: one of train.max_steps and train.max_seconds must be > 0")
    for key, kind in (("path", "path"), ("name", "datasets")):
        if (recipe.data.source == kind) != bool(getattr(recipe.data, key)):
            raise ConfigError(f"{source.at('data', key)} goes with data.source = '{kind}', and only with it")
