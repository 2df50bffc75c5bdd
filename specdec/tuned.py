"""The best setting for a pair on this machine, as ``specdec tune`` found it: a small file, and an engine that follows it.

``draft="tuned"`` reads ``specdec-tune.json`` next to the target's weights, ``draft="FILE.json"`` another file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.controller import AUTO
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.output import Output, Piece
from specdec.requests import Prompts, Settings

FILE, WORD = "specdec-tune.json", "tuned"
LOOKUP = "suffix"  # the one name of a drafter that is no model
_NO_SETTINGS = ("attention_mask", "on_piece")  # arguments of a call that are no ``Settings``
_SAMPLE = 1 << 16  # bytes of every weight file that tell models of one shape apart


@dataclass(frozen=True)
class Choice:
    """The number of draft tokens, or "auto", that was best for a batch size, and how much faster than plain it was."""

    batch: int
    greedy: bool
    num_draft_tokens: int | str
    speedup: float


@dataclass(frozen=True)
class Tuned:
    """A drafter by the names that ``load`` takes (none: plain decoding), and draft lengths for it.

    ``target`` and ``models`` are fingerprints, of the target and of the draft models among ``draft``.
    """

    draft: tuple[str, ...]
    choices: tuple[Choice, ...]
    target: str
    models: tuple[str, ...]

    def length(self, rows: int, *, greedy: bool) -> int | str:
        """What was best at the batch size nearest to ``rows``; "auto" for a kind of text that was not measured."""
        known = [choice for choice in self.choices if choice.greedy == greedy]
        nearest = min(known, key=lambda choice: abs(math.log(choice.batch / max(rows, 1))), default=None)
        return AUTO if nearest is None else nearest.num_draft_tokens

    def lines(self) -> list[str]:
        """What there is to say in sentences."""
        if not self.draft:
            return ["No drafter pays here: plain decoding is best."]
        found = [f"Best drafter: {' + '.join(self.draft)}"]
        for choice in self.choices:
            text = "greedy" if choice.greedy else "sampled"
            found.append(
                f"Batch {choice.batch}, {text}: {choice.num_draft_tokens} draft tokens, {choice.speedup:.2f}x plain"
            )
        return found

    def write(self, file: Path) -> None:
        """Write it; drafts in the file's neighbourhood are named relative to it, so that a pair can be moved."""
        names = [_from(file, name) for name in self.draft]
        text = json.dumps({**asdict(self), "draft": names}, indent=1) + "\n"
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error}; name another file with --out") from error


def fingerprint(checkpoint: Path) -> str:
    """What a checkpoint's configuration and weights are known by; a sample of the weights, as reading all takes long."""
    found = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as weights:
            weights.seek(max(0, (size - _SAMPLE) // 2))
            found.update(f"{file.name} {size}".encode() + weights.read(_SAMPLE))
    return found.hexdigest()[:16]


def tuned_for(draft: object, target: object, find: Callable[[str], Path]) -> Tuned | None:
    """The tuned settings that ``draft`` names, None when it is something else; ``find`` gives a checkpoint's directory.

    Raises ``ConfigError`` where they are missing, damaged or made for other models.
    """
    if draft != WORD and not (isinstance(draft, str | Path) and str(draft).endswith(".json")):
        return None
    if not isinstance(target, str | Path):
        raise ConfigError(
            "tuned settings hold for the checkpoint they were made for; pass the target as a directory or hub id, "
            f"got {type(target).__name__}"
        )
    directory = find(str(target))
    file = directory / FILE if draft == WORD else Path(str(draft)).expanduser()
    tuned = read_tuned(file)
    models = [name for name in tuned.draft if name != LOOKUP]
    for name, known in zip([str(target), *models], [tuned.target, *tuned.models], strict=True):
        if fingerprint(find(name)) != known:
            raise ConfigError(f"{file} was made for another model than {name}; {_advice(file)}")
    return tuned


def read_tuned(file: Path) -> Tuned:
    """The settings in a file, drafts by paths that hold from here. Raises ``ConfigError``."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        choices = tuple(Choice(**choice) for choice in given.pop("choices"))
        draft = tuple(_towards(file, name) for name in given.pop("draft"))
        tuned = Tuned(draft, choices, given["target"], tuple(given["models"]))
        if len(tuned.models) != sum(name != LOOKUP for name in draft):
            raise ValueError("models and draft differ in number")
        for choice in choices:
            Settings(num_draft_tokens=choice.num_draft_tokens)
            math.log(choice.batch)
    except FileNotFoundError:
        raise ConfigError(f"there are no tuned settings in {file}; {_advice(file)}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} does not hold tuned settings ({error!r}); {_advice(file)}") from error
    return tuned


def _advice(file: Path) -> str:
    return f"make it with: specdec tune TARGET --draft DRAFT --out {file}"


def _from(file: Path, name: str) -> str:
    """``name`` as it is written into ``file``."""
    path = Path(name).expanduser()
    if name == LOOKUP or not path.is_dir():
        return name
    near = path.resolve().is_relative_to(file.resolve().parents[1])
    return os.path.relpath(path.resolve(), file.resolve().parent) if near else str(path.resolve())


def _towards(file: Path, name: str) -> str:
    path = file.resolve().parent / name
    return str(path.resolve()) if name != LOOKUP and path.is_dir() else name


class TunedEngine(Engine):
    """An engine whose draft lengths, where a call leaves them open, are those that were found best."""

    def __init__(self, tuned: Tuned, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.tuned = tuned

    def generate(self, prompts: Prompts, **given: Any) -> Output:
        """As ``Engine.generate``."""
        return super().generate(prompts, **self._with_length(prompts, given))

    def stream(self, prompts: Prompts, **given: Any) -> Iterator[Piece]:
        """As ``Engine.stream``."""
        return super().stream(prompts, **self._with_length(prompts, given))

    def _with_length(self, prompts: Prompts, given: dict[str, Any]) -> dict[str, Any]:
        if "num_draft_tokens" in given:
            return given
        settings = Settings.of({name: value for name, value in given.items() if name not in _NO_SETTINGS})
        temperature = settings.temperature
        greedy = not any(temperature if isinstance(temperature, Sequence) else [temperature])
        rows = min(_rows(prompts) * settings.n, settings.max_batch_size)
        return {**given, "num_draft_tokens": self.tuned.length(rows, greedy=greedy)}


def _rows(prompts: Prompts) -> int:
    """How many prompts there are in any form that a call takes."""
    if isinstance(prompts, Mapping):
        return max((len(values) for values in prompts.values()), default=0)
    if isinstance(prompts, Tensor):
        return len(prompts) if prompts.dim() > 1 else 1
    if (
        isinstance(prompts, str)
        or not isinstance(prompts, Sequence)
        or all(isinstance(token, int) for token in prompts)
    ):
        return 1
    return len(prompts)
