"""Choosing the best setting for a pair from what a sweep measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from specdec.bench import PLAIN, Measurement
from specdec.checkpoints import checkpoint_directory
from specdec.controller import AUTO
from specdec.errors import ConfigError
from specdec.places import check_file
from specdec.tuned import FILE, LOOKUP, Choice, Tuned, fingerprint

CLEARLY = 1.03  # how much faster than a length chosen as it goes a fixed one must be


def choose(measurements: Sequence[Measurement], drafts: Mapping[str, tuple[str, ...]], target: str) -> Tuned:
    """The drafter that gains most over all batch sizes and temperatures, and its best length for each.

    ``drafts``: families of ``measurements`` -> names that ``load`` takes. No drafter where none gains anything.
    """
    chosen = {family: choices(measurements, family) for family in drafts}
    gains = {family: statistics.geometric_mean(c.speedup for c in found) for family, found in chosen.items()}
    best = max(gains, key=gains.__getitem__)
    whole = fingerprint(checkpoint_directory(target))
    if gains[best] <= 1:
        return Tuned((), (), whole, ())
    models = tuple(fingerprint(checkpoint_directory(name)) for name in drafts[best] if name != LOOKUP)
    return Tuned(drafts[best], tuple(chosen[best]), whole, models)


def choices(measurements: Sequence[Measurement], family: str) -> list[Choice]:
    """One for every batch size and temperature: auto, unless a fixed length, plain decoding too, is clearly faster."""
    found = []
    for batch, temperature in dict.fromkeys(m.cell for m in measurements):
        here = [m for m in measurements if m.cell == (batch, temperature) and m.family in (family, PLAIN)]
        auto = next(m for m in here if m.num_draft_tokens == AUTO)
        best = max(here, key=lambda m: m.speedup)
        kept = best if best.speedup > CLEARLY * auto.speedup else auto
        found.append(Choice(batch, temperature == 0, kept.num_draft_tokens, round(kept.speedup, 3)))
    return found


def place(model: str, out: Path | None) -> Path:
    """Where the settings go: ``out``, or next to the weights of a local target. Raises ``ConfigError``."""
    if out is not None:
        if not out.resolve().parent.is_dir() or out.suffix != ".json":
            raise ConfigError(f"--out must be a .json file in a folder that exists, got {out}")
        check_file(out)
        return out
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"{model} is not a local directory, in which the settings would be kept; pass --out FILE.json"
        )
    if not os.access(checkpoint_directory(model), os.W_OK):
        raise ConfigError(f"{directory} cannot be written to; pass --out FILE.json")
    return directory / FILE
