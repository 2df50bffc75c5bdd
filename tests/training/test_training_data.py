"""Data: the same everywhere, split without overlap, and batches that only seed and step decide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdec.errors import ConfigError
from specdec.training import data
from specdec.training.data import Corpus, Document


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return data.gather("stdlib")


def test_standard_library_is_split_without_overlap(stdlib: Corpus) -> None:
    training, held_out = ({document.name for document in side} for side in (stdlib.training, stdlib.held_out))
    assert training.isdisjoint(held_out)
    assert 0.01 < len(held_out) / (len(training) + len(held_out)) < 0.10
    parts = {part for name in training | held_out for part in Path(name).parts}
    assert parts.isdisjoint({"site-packages", "test", "tests", "__pycache__", "encodings"})
    assert [document.name for document in stdlib.training] == sorted(training)


def test_corpus_is_the_same_in_another_process(stdlib: Corpus) -> None:
    script = "from specdec.training.data import gather; print(gather('stdlib').fingerprint())"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == stdlib.fingerprint()


def test_tokenizer_training_is_deterministic_and_lossless(stdlib: Corpus) -> None:
    some = stdlib.training[:40]
    first, second = (data.train_tokenizer(some, 600, 128) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 600
    assert first.convert_ids_to_tokens(first.eos_token_id) == first.eos_token == data.END_OF_TEXT
    assert first.bos_token is None
    for text in (some[3].text, " \t\n\n  x=1\n", "naïve 日本 \U0001f600"):
        assert first.decode(first.encode(text)) == text


def test_documents_end_with_end_of_text() -> None:
    documents = (Document("a", "one two"), Document("b", "three"))
    tokenizer = data.train_tokenizer(documents, 300, 128)
    tokens = data.encode(tokenizer, documents)
    assert tokens.dtype == torch.int32
    assert tokenizer.decode(tokens) == "one two<|endoftext|>three<|endoftext|>"


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    drawn = {
        (seed, step): data.batch(tokens, rows=3, length=8, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)
    }
    again = data.batch(tokens, rows=3, length=8, seed=1, step=1)
    assert torch.equal(drawn[1, 1], again)
    assert again.shape == (3, 9)
    assert torch.equal(again - again[:, :1], torch.arange(9).expand(3, 9))  # windows are contiguous
    assert len({tuple(batch[:, 0].tolist()) for batch in drawn.values()}) == 4


def test_windows_do_not_overlap_and_never_exceed_the_text() -> None:
    windows = data.windows(torch.arange(101), length=10, limit=4)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[-1, -1] == 100


def test_held_out_prompts_are_exact_and_repeatable(stdlib: Corpus) -> None:
    tokenizer = data.train_tokenizer(stdlib.training[:40], 600, 128)
    prompts = data.held_out_prompts(tokenizer, stdlib, count=5, tokens=24)
    assert prompts == data.held_out_prompts(tokenizer, stdlib, count=5, tokens=24)
    assert [len(prompt) for prompt in prompts] == [24] * 5
    texts = [document.text for document in stdlib.held_out]
    assert all(any(tokenizer.decode(prompt) in text for text in texts) for prompt in prompts)


def test_prompts_longer_than_the_held_out_text_are_refused() -> None:
    corpus = Corpus((Document("a", "x"),), (Document("b", "too short\n"),))
    tokenizer = data.train_tokenizer(corpus.training, 257, 128)
    with pytest.raises(ConfigError, match="too short for 1 prompts of 50 tokens"):
        data.held_out_prompts(tokenizer, corpus, count=1, tokens=50)


def test_one_file_is_split_by_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(3000))
    (tmp_path / "one.txt").write_text(text)
    corpus = data.gather("path", tmp_path / "one.txt")
    assert corpus.training[0].text + corpus.held_out[0].text == text
    assert 0.9 < len(corpus.training[0].text) / len(text) < 0.96


def test_only_text_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("secret " * 2000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 9000)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some words " * 2000)
    corpus = data.gather("path", tmp_path)
    assert sorted(document.name for document in (*corpus.training, *corpus.held_out)) == ["a.txt", "b.txt"]
    assert len(corpus.held_out) == 1


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    rows = [{"body": f"document {i}\nsays {'more ' * 100}", "id": i} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n" + json.dumps({"body": " "}))
    corpus = data.gather("path", file, text_key="body")
    documents = sorted((*corpus.training, *corpus.held_out), key=lambda document: document.name)
    assert [document.text for document in documents] == [row["body"] for row in rows]
    assert documents[0].name == "rows.jsonl#000000001" and 0 < len(corpus.held_out) < 15
    assert data.gather("path", tmp_path, text_key="body") == corpus  # a folder of such files too
    with pytest.raises(ConfigError, match="rows.jsonl, line 1 has no text under 'text'; it has 'body', 'id'"):
        data.gather("path", file)
    file.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ConfigError, match="rows.jsonl, line 2 is not JSON"):
        data.gather("path", file)


def test_a_dataset_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    rows = [{"words": f"row {i} " + "word " * 100} for i in range(40)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = data.gather("datasets", name=str(tmp_path / "set"), text_key="words")
    assert len(corpus.training) + len(corpus.held_out) == 40
    with pytest.raises(ConfigError, match="data.name = '.*nowhere', split 'train' cannot be loaded"):
        data.gather("datasets", name=str(tmp_path / "nowhere"))


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        data.gather("datasets", name="wikitext")


def test_missing_and_tiny_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be an existing file or folder"):
        data.gather("path", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="at least 10000 are needed"):
        data.gather("path", tmp_path)
    with pytest.raises(ConfigError, match="must be 'stdlib' or 'path' or 'datasets'"):
        data.gather("web")
