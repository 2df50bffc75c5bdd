"""Text to train on: gathering, the held-out split, the tokenizer, and batches that depend on (seed, step) only.

The corpus "stdlib" is the source code of the running interpreter's standard library: about 10 MB of text that every
user already has, so a first run needs no download.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
CODE = "held-out code"  # the task that every machine has
HELD_OUT_ONE_IN = 20  # 5 % of the files: about 0.5 MB of the standard library, enough for a loss to 2 digits
MIN_CHARACTERS = 10_000  # below this there is nothing to learn a vocabulary from
# Packages and tests of other people, and tables that no person wrote (character maps, compiled topics): they are
# trivially predictable and would flatter every number we report.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}
# GPT-2's splitting rule, except that a line break ends a piece: indentation then becomes one token of its own.
_PIECES = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Document:
    """One text and its name, which decides on which side of the split it falls."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents that no training ever sees; disjoint."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def fingerprint(self) -> str:
        """sha256 of all names and texts, in order."""
        digest = hashlib.sha256()
        for document in (*self.training, *self.held_out):
            digest.update(f"{document.name}\0{len(document.text)}\0{document.text}".encode())
        return digest.hexdigest()


def gather(
    source: str,
    path: Path | None = None,
    *,
    text_key: str = "text",
    name: str = "",
    subset: str = "",
    split: str = "train",
) -> Corpus:
    """The corpus of ``source``; raises ConfigError.

    "stdlib", "path" (a file, or a folder of them; every line of a .jsonl file is a document, under ``text_key``), or
    "datasets" (the dataset ``name``, ``subset``, ``split`` of the Hugging Face hub, rows under ``text_key``).
    """
    if source == "stdlib":
        documents = _stdlib()
    elif source == "path":
        if path is None or not path.exists():
            raise ConfigError(f"data.path must be an existing file or folder, got {str(path)!r}")
        documents = _folder(path, text_key)
    elif source == "datasets":
        documents = _dataset(name, subset, split, text_key)
    else:
        raise ConfigError(f"data.source must be 'stdlib' or 'path' or 'datasets', got {source!r}")
    size = sum(len(document.text) for document in documents)
    if size < MIN_CHARACTERS:
        raise ConfigError(
            f"data.source = {source!r} holds {size} characters of UTF-8 text, at least {MIN_CHARACTERS} are needed; "
            "name a folder or file of text with source = 'path' and path = '...'"
        )
    return _split(documents)


def _stdlib() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not file.name.startswith("_sysconfigdata"))
    kept = (file for file in files if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts))
    return _read(root, kept)


def _folder(path: Path, text_key: str) -> list[Document]:
    if path.is_file():
        return _read(path.parent, [path], text_key)
    files = (file for file in path.rglob("*") if file.is_file())
    shown = (file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts))
    return _read(path, shown, text_key)


def _read(root: Path, files: Iterable[Path], text_key: str = "text") -> list[Document]:
    """Documents of the files that are UTF-8 text, ordered by their path below ``root``."""
    documents: list[Document] = []
    for file in files:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # the corpus is defined as the files that are UTF-8
        name = file.relative_to(root).as_posix()
        if file.suffix == ".jsonl":
            documents += _json_lines(name, text, text_key)
        elif text.strip() and "\0" not in text:
            documents.append(Document(name, text.replace("\r\n", "\n")))
    return sorted(documents, key=lambda document: document.name)


def _json_lines(name: str, text: str, text_key: str) -> Iterator[Document]:
    """A document per line of a JSONL file; empty texts and lines are left out."""
    for number, row in _json_rows(name, text):
        written = _text(row, text_key, f"{name}, line {number}")
        if written.strip():
            yield Document(f"{name}#{number:09d}", written)


def _json_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """What the lines of a JSONL file hold, with their numbers; empty ones are left out."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{name}, line {number} is not JSON: {error}") from error
        yield number, row


def _text(row: object, text_key: str, where: str) -> str:
    found = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(found, str):
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"no object but {type(row).__name__}"
        raise ConfigError(f"{where} has no text under {text_key!r}; it has {keys}; say which with data.text_key")
    return found


def _dataset(name: str, subset: str, split: str, text_key: str) -> list[Document]:
    """The rows of a dataset of the Hugging Face hub, or of a local folder that the package datasets understands."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            "data.source = 'datasets' needs the package datasets: pip install datasets; or point data.path at a folder"
        ) from error
    try:
        rows = load_dataset(name, subset or None, split=split)
    except Exception as error:  # whatever the hub, the network or the dataset's builder may raise
        raise ConfigError(f"data.name = {name!r}, split {split!r} cannot be loaded: {error}") from error
    texts = ((i, _text(row, text_key, f"{name}, row {i}")) for i, row in enumerate(rows))
    return [Document(f"{name}#{i:09d}", text) for i, text in texts if text.strip()]


def _split(documents: list[Document]) -> Corpus:
    if len(documents) == 1:  # one file: its last part is held out
        name, text = documents[0].name, documents[0].text
        cut = text.rfind("\n", 0, len(text) - len(text) // HELD_OUT_ONE_IN) + 1 or len(text) // 2
        return Corpus((Document(name, text[:cut]),), (Document(f"{name}#end", text[cut:]),))
    held_out = {document.name for document in documents if _hash(document.name) % HELD_OUT_ONE_IN == 0}
    if not held_out or len(held_out) == len(documents):  # few files: exactly one is held out
        held_out = {min(documents, key=lambda document: _hash(document.name)).name}
    return Corpus(
        tuple(document for document in documents if document.name not in held_out),
        tuple(document for document in documents if document.name in held_out),
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def train_tokenizer(documents: Sequence[Document], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most ``vocab_size`` tokens, among them the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tensor:
    """All documents as one int32 tensor [N], each followed by the end of text."""
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    pieces = [piece for encoding in encodings for piece in (np.asarray(encoding.ids, dtype=np.int32), end)]
    return torch.from_numpy(np.concatenate(pieces))


def batch(tokens: Tensor, *, rows: int, length: int, seed: int, step: int) -> Tensor:
    """Random windows [rows, length + 1], int64, of tokens [N]: a pure function of seed and step.

    Philox is counter-based, so a resumed run draws the batches that an uninterrupted one would have drawn.
    """
    random = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    starts = random.integers(0, len(tokens) - length, size=rows)
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long()


def windows(tokens: Tensor, *, length: int, limit: int) -> Tensor:
    """At most ``limit`` windows [M, length + 1], int64, that do not overlap and are spread evenly over tokens [N]."""
    available = max((len(tokens) - 1) // length, 1)
    chosen = np.unique(np.linspace(0, available - 1, min(limit, available)).astype(int)).tolist()
    return torch.stack([tokens[i * length : (i + 1) * length + 1] for i in chosen]).long()


def held_out_prompts(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, *, count: int, tokens: int) -> list[list[int]]:
    """``count`` prompts of exactly ``tokens`` ids that begin at a line of a held-out file; always the same ones."""
    prompts: list[list[int]] = []
    attempts = 0
    while len(prompts) < count:
        document = corpus.held_out[attempts % len(corpus.held_out)]
        start = document.text.find("\n", _hash(f"{document.name} {attempts}") % len(document.text)) + 1
        ids = tokenizer.encode(document.text[start : start + 16 * tokens], add_special_tokens=False, verbose=False)
        if len(ids) > tokens:  # the last id may be cut in the middle of a word, so one more is asked for
            prompts.append(ids[:tokens])
        attempts += 1
        if attempts > 100 * count + 100 * len(corpus.held_out):
            raise ConfigError(f"the held-out text is too short for {count} prompts of {tokens} tokens")
    return prompts


def task_prompts(
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int,
    tokens: int,
    jsonl: Mapping[Path, str] | None = None,
    dataset: str = "",
    text_key: str = "text",
) -> dict[str, list[list[int]]]:
    """At most ``count`` prompts of every task, of at most ``tokens`` ids: their last ones, as questions come last.

    Always held-out code; of JSONL files their objects, whose prompt is under the key that ``jsonl`` names (of a list
    its first entry) and whose "category", if they have one, is their task, as in Spec-Bench (Xia et al. 2024, arXiv
    2401.07851); of a dataset of the Hugging Face hub the rows of its first split, under ``text_key``.
    """
    found = {CODE: held_out_prompts(tokenizer, gather("stdlib"), count=count, tokens=tokens)}
    texts: dict[str, list[str]] = {}
    for file, key in (jsonl or {}).items():
        for task, text in _questions(file, key):
            texts.setdefault(task, []).append(text)
    if dataset:
        texts[dataset] = [document.text for document in _dataset(dataset, "", "train", text_key)]
    for task, own in texts.items():
        found[task] = [_chat(tokenizer, text)[-tokens:] for text in own[:count]]
    return found


def _questions(file: Path, key: str) -> Iterator[tuple[str, str]]:
    """The task and the prompt of every line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}") from error
    for number, row in _json_rows(file.name, text):
        if isinstance(row, dict) and isinstance(row.get(key), list) and row[key]:
            row = {**row, key: row[key][0]}
        question = _text(row, key, f"{file.name}, line {number}")
        if not question.strip():
            raise ConfigError(f"{file.name}, line {number} has an empty text under {key!r}; a prompt needs a token")
        yield str(row.get("category", file.stem)), question


def _chat(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a user's message, as the tokenizer's chat template has it, if there is one."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    return list(tokenizer.encode(text, verbose=False))
