"""What training writes: checkpoints to continue from, and the finished models as ordinary Hugging Face folders.

A checkpoint is a folder that appears whole or not at all: files first, each flushed to disk, then a manifest with
their sha256, then one rename. Reading takes the newest one whose manifest holds. Safetensors and JSON; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec.drafters.tokenmap import VOCABULARY_FILE, TokenMap
from specdec.errors import CheckpointError, ConfigError
from specdec.nn.gpt import state_to_hf
from specdec.nn.lstm import LSTM, Trainable

MANIFEST, STATE, META = "manifest.json", "state.safetensors", "meta.json"
_UNLISTED = {"additional_chat_templates"}  # the only folder that tokenizers write; manifests name files
KEEP = 2  # the newest may turn out damaged


@dataclass(frozen=True)
class Meta:
    """The numbers of a checkpoint.

    ``identity`` says of which recipe and text, ``tokenizer`` is the sha256 of the tokenizer made of them; ``seconds``
    were spent training, and ``skipped`` batches were passed over because their loss was not finite. ``notes`` are what
    else a kind of run must remember, as JSON.
    """

    identity: str
    step: int
    seconds: float
    dtype: str
    tokenizer: str = ""
    skipped: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run continues from."""

    meta: Meta
    state: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` below ``folder`` and drop all but the newest ``KEEP``; its path.

    Raises CheckpointError when the disk does not take it; those before are untouched then.
    """

    def write(target: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.state.items()}, target / STATE)
        (target / META).write_text(json.dumps(vars(checkpoint.meta), indent=1))

    path = folder / f"step-{checkpoint.meta.step:08d}"
    if _is_intact(path):  # of the same run and step: replacing it could only lose it
        return path
    try:
        write_folder(path, write)
    except (OSError, SafetensorError) as error:
        left = next((f"; {old} is intact" for old in _steps(folder) if _is_intact(old)), "")
        raise CheckpointError(
            f"checkpoint {path} could not be written: {error}{left}; free some space, or choose another folder"
        ) from error
    for old in (*_steps(folder)[KEEP:], *folder.glob(".step-*")):
        shutil.rmtree(old)
    return path


def load_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint below ``folder``; None when there is none at all.

    ``warn`` is told of every damaged one that was passed over. Raises CheckpointError when all of them are damaged.
    """
    problems = []
    for path in _steps(folder):
        try:
            return _read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"{error}; trying the one before")
    if problems:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact ({'; '.join(problems)}); train with resume=False to start over"
        )
    return None


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints below ``folder``, and ``folder`` when nothing else is in it."""
    for path in (*_steps(folder), *folder.glob(".step-*")):
        shutil.rmtree(path)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _read_checkpoint(path: Path) -> Checkpoint:
    verify_folder(path)
    try:
        meta = Meta(**json.loads((path / META).read_text()))
        return Checkpoint(meta, load_file(path / STATE))
    except (ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _steps(folder: Path) -> list[Path]:
    """Checkpoints below ``folder``, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, flush it with its manifest, and put it at ``path`` in one rename.

    A folder that is there already stays until the new one is complete; a link to one is followed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        _seal(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def refuse_others(folder: Path, ours: Callable[[Path], bool]) -> None:
    """Raise ConfigError where replacing ``folder`` would delete more than what a run that ``ours`` knows has written."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    listed = _listed(folder)
    if not listed or not ours(folder):
        raise ConfigError(
            f"{folder} is not empty and was not written by a training run like this one, which would delete what is in "
            "it; choose another output folder"
        )
    others = sorted(path.name for path in folder.iterdir() if path.name not in {*listed, MANIFEST, *_UNLISTED})
    if others:
        raise ConfigError(
            f"{folder} holds {', '.join(others[:5])}, which no training run wrote and this one would delete; move it "
            "away, or choose another output folder"
        )


def _listed(folder: Path) -> set[str]:
    """The files that the folder's manifest names; none without a manifest that can be read."""
    try:
        return set(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return set()


def _seal(folder: Path) -> None:
    """Flush every file to disk, then write and flush the manifest: it exists only once all it lists does."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    for file in files:
        _flush(file)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(folder / MANIFEST)
    _flush(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def verify_folder(path: Path) -> None:
    """Raise CheckpointError unless every file in the folder's manifest is there with its sha256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if _sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error


def _is_intact(path: Path) -> bool:
    try:
        verify_folder(path)
    except CheckpointError:
        return False
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's entries, before going on."""
    if os.name == "nt" and path.is_dir():
        return  # Windows flushes no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_pretrained(
    model: Trainable,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    card: str = "",
    token_map: TokenMap | None = None,
) -> None:
    """Write ``model`` as a checkpoint; a GPT as one that AutoModelForCausalLM, vLLM and llama.cpp load.

    The folder also gets the tokenizer, ``generation_config.json`` with the end of text, the model card ``card`` as
    README.md, and our manifest; with ``token_map`` also what the model's ids are in the tokenizer's.
    """

    def write(target: Path) -> None:
        if isinstance(model, LSTM):
            model.save(target)
        else:
            config = type(model.config).from_dict(model.config.to_dict())  # the model's own stays as it is
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
            config.dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
            config.save_pretrained(target)
            state = {name: tensor.detach().cpu() for name, tensor in state_to_hf(model).items()}
            save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if token_map is not None:
            token_map.save(target / VOCABULARY_FILE)
            end, pad = (None if i is None else token_map.lists[1][i] for i in (end, pad))
        GenerationConfig(eos_token_id=end, pad_token_id=pad).save_pretrained(target)
        tokenizer.save_pretrained(target)
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")

    write_folder(directory, write)
