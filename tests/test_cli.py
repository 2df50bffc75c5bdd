"""The command line does what its help says, and a mistake is one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec import __version__
from specdec.cli import app, main

runner = CliRunner()


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["train"], ["demo"]])
def test_help_teaches(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "specdec" in result.output or "picture" in result.output


def test_version_is_the_packages() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == f"specdec {__version__}"


def test_generate_with_a_draft_prints_what_plain_decoding_prints(tiny_pair: Path) -> None:
    command = ["generate", str(tiny_pair / "target"), "--prompt", "def main(", "--max-new-tokens", "24"]
    plain = runner.invoke(app, command)
    fast = runner.invoke(app, [*command, "--draft", str(tiny_pair / "draft"), "--stats"])
    assert plain.exit_code == fast.exit_code == 0, fast.output
    assert plain.stdout.strip() and fast.stdout == plain.stdout
    assert "mean acceptance length" in fast.stderr


def test_several_prompts_print_in_order(tiny_pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("import os\n")
    target = str(tiny_pair / "target")
    options = ["--prompt", "class A:", "--prompt-file", str(file), "--draft", "ngram", "--max-new-tokens", "4"]
    result = runner.invoke(app, ["generate", target, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.index("--- 0 (") < result.stdout.index("--- 1 (")


def test_bench_compares_on_the_users_prompts(tiny_pair: Path, tmp_path: Path) -> None:
    prompts, figures, picture = tmp_path / "p.txt", tmp_path / "out.json", tmp_path / "out.png"
    prompts.write_text("def a():\n    return 1\n\nimport sys\n")
    result = runner.invoke(
        app,
        ["bench", str(tiny_pair / "target"), "--draft", str(tiny_pair / "draft"), "--prompt-file", str(prompts),
         "--batch", "2", "--rounds", "1", "--max-new-tokens", "8", "--json-file", str(figures), "--picture", str(picture)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = json.loads(figures.read_text())
    assert measured["machine"]["cores"] >= 1
    assert {m["method"] for m in measured["measurements"]} == {"plain", "prompt lookup", str(tiny_pair / "draft")}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "/nowhere", "--prompt", "x"], "CheckpointError"),
        (["generate", "/nowhere"], "no prompt given"),
        (["train", "/nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert said in error and "Traceback" not in error
