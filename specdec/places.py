"""Where results may be written, looked at before any work is done; and files that are read as text."""

from __future__ import annotations

import os
from pathlib import Path

from specdec.errors import ConfigError, PromptError


def check_folder(folder: Path, option: str = "--out") -> Path:
    """The folder, links followed. Raises ``ConfigError`` unless it can be written to, or made."""
    real = Path(os.path.realpath(folder))
    there = next(path for path in (real, *real.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ConfigError(
            f"{option} must be a folder, or the name of a new one, got {folder}: {there} is no folder; name another"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} must be a folder that can be written to, got {folder}; name another")
    return real


def check_file(file: Path, option: str = "--out") -> None:
    """Raise ``ConfigError`` unless a file of that name can be written."""
    if file.is_dir():
        raise ConfigError(f"{option} must be a file, got {file}, which is a folder; name a file in it")
    folder = Path(os.path.realpath(file)).parent
    if not folder.is_dir():
        raise ConfigError(f"{option} must be a file in a folder that exists, got {file}; make the folder first")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"{option} must be a file that can be written, got {file}; name another")


def check_apart(model: str, out: Path) -> None:
    """Raise ``ConfigError`` where ``out`` is the model's own folder, however it is spelled."""
    folder, real = Path(model).expanduser(), Path(os.path.realpath(out))
    if folder.is_dir() and real.is_dir() and folder.samefile(real):
        raise ConfigError(f"--out must be another folder than the model's, which would be overwritten, got {out}")


def read_text(file: Path) -> str:
    """What a text file says. Raises ``PromptError``."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(f"{file} cannot be read as text: {error}; pass a file of UTF-8 text") from error
