"""Checkpoints appear whole, damage is seen, and the finished models are Hugging Face's."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.errors import CheckpointError
from specdec.nn.gpt import GPT
from specdec.training import data
from specdec.training.checkpoint import (
    MANIFEST,
    META,
    STATE,
    Checkpoint,
    Meta,
    load_checkpoint,
    save_checkpoint,
    save_pretrained,
    verify_folder,
    write_folder,
)
from specdec.training.recipe import Recipe


def write(folder: Path, step: int) -> Path:
    state = {"weight": torch.full((64, 64), float(step))}
    return save_checkpoint(folder, Checkpoint(Meta("id", step, 1.5, "float32"), state))


def load(folder: Path) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    checkpoint = load_checkpoint(folder, warnings.append)
    if checkpoint is not None:
        assert torch.equal(checkpoint.state["weight"], torch.full((64, 64), float(checkpoint.meta.step)))
    return (checkpoint.meta.step if checkpoint else None), warnings


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    assert load(tmp_path) == (None, [])
    for step in (9, 10, 11):
        write(tmp_path, step)
    assert load(tmp_path) == (11, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("name", [MANIFEST, STATE, META])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_seen_and_the_previous_used(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-7])
    step, warnings = load(tmp_path)
    assert step == 1
    assert "step-00000002" in warnings[0]


def test_no_intact_checkpoint_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (write(tmp_path, 1) / STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint .* is intact .*resume=False"):
        load(tmp_path)


def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", lambda folder: (folder / "weights").write_text("old") and None)

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", fail)
    verify_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_folder_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_folder(tmp_path / "model", lambda folder, text=text: (folder / "weights").write_text(text) and None)
    verify_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
def test_kill_minus_nine_at_any_moment_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Fifty saving processes end where they stand; each goes on from what the one before left."""
    delays, moments = random.Random(0), set()
    write(tmp_path, 0)
    for _ in range(50):
        first = load(tmp_path)[0]
        assert first is not None
        if (child := os.fork()) == 0:
            for step in range(first + 1, first + 10_000):
                write(tmp_path, step)
            os._exit(1)  # it was to be killed
        time.sleep(delays.uniform(0.001, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        step, warnings = load(tmp_path)
        assert step is not None and step >= first and warnings == []
        moments.add(tuple(sorted(path.name.split("-")[0] for path in tmp_path.iterdir())))
    assert step > 5  # they did save
    assert len(moments) > 1  # and were not all killed at the same moment


@pytest.mark.parametrize("where", ["weights", "manifest"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A real limit on the size of files, or the error of a full disk when the last file is written."""
    resource = pytest.importorskip("resource")
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments, **options)

    try:
        if where == "weights":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        else:
            monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match="step-00000002 could not be written: .*step-00000001 is intact"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert load(tmp_path) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # the room of the other is free again
    write(tmp_path, 2)
    assert load(tmp_path) == (2, [])


@pytest.mark.parametrize("which", ["target", "draft"])
def test_hugging_face_loads_what_we_save(tmp_path: Path, toy_recipe: Recipe, which: str) -> None:
    """Tied and untied heads, grouped heads; logits within 1e-5 in float32."""
    corpus = data.gather("path", Path(toy_recipe.data.path))
    tokenizer = data.train_tokenizer(corpus.training, 300, 64)
    torch.manual_seed(0)
    model = GPT(getattr(toy_recipe, which).config(len(tokenizer), tokenizer.eos_token_id)).eval()
    save_pretrained(model, tokenizer, tmp_path / which)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / which)
    tokens = torch.randint(0, len(tokenizer), (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, model.lm_head(model(tokens)), rtol=1e-5, atol=1e-5)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "line 3 of file 1\n\n  日本"
    loaded = AutoTokenizer.from_pretrained(tmp_path / which)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, loaded.bos_token) == (data.END_OF_TEXT, None)
