"""The command line does what its help says, and a mistake is one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec import __version__, bench
from specdec.cli import app, main
from specdec.tuned import Choice, Tuned, fingerprint, read_tuned
from test_peers import openvino

runner = CliRunner()


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["tune"], ["train"], ["demo"]])
def test_help_teaches(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "specdec" in result.output or "picture" in result.output


def test_version_is_the_packages() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == f"specdec {__version__}"


def test_generate_with_a_draft_prints_what_plain_decoding_prints(tiny_pair: Path) -> None:
    command = ["generate", str(tiny_pair / "target"), "--prompt", "def main(", "--max-new-tokens", "24"]
    plain = runner.invoke(app, [*command, "--num-draft-tokens", "0"])
    fast = runner.invoke(app, [*command, "--draft", str(tiny_pair / "draft"), "--stats"])
    assert plain.exit_code == fast.exit_code == 0, fast.output
    assert plain.stdout.strip() and fast.stdout == plain.stdout
    assert "mean acceptance length" in fast.stderr


def test_several_prompts_print_in_order(tiny_pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("import os\n")
    target = str(tiny_pair / "target")
    options = ["--prompt", "class A:", "--prompt-file", str(file), "--draft", "suffix", "--max-new-tokens", "4"]
    result = runner.invoke(app, ["generate", target, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.index("--- 0 (") < result.stdout.index("--- 1 (")


def test_bench_compares_on_the_users_prompts(tiny_pair: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "report"
    prompts.write_text("def a():\n    return 1\n\nimport sys\n\nnever read")
    result = runner.invoke(
        app,
        ["bench", str(tiny_pair / "target"), "--draft", str(tiny_pair / "draft"), "--prompt-file", str(prompts),
         "--batch", "2", "--temperature", "0", "--temperature", "1", "--k", "auto", "--k", "2..3", "--rounds", "1",
         "--prompts", "2", "--max-new-tokens", "8", "--out", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "report.json").read_text())
    assert measured["machine"]["cores"] >= 1 and measured["settings"]["prompts"] == 2
    assert measured["limit"]["passes_per_second"] > 0
    own = [f"{drafter} {k}" for drafter in ("draft", "draft + lookup", "lookup") for k in ("auto", "k=2", "k=3")]
    found = [(m["method"], m["batch"], m["temperature"]) for m in measured["measurements"]]
    assert found == [(name, 2, temperature) for temperature in (0.0, 1.0) for name in ("plain", *own)]
    assert "Batch 2, greedy: " in result.output and "of the limit" in result.output
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_bench_leaves_what_it_has_found(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.timed_rounds

    def interrupted(*given: Any, **settings: Any) -> Any:
        if (tmp_path / "report.json").exists():
            raise KeyboardInterrupt
        return whole(*given, **settings)

    monkeypatch.setattr(bench, "timed_rounds", interrupted)
    command = ["bench", str(tiny_pair / "target"), "--batch", "1", "--batch", "2", "--k", "2", "--rounds", "1"]
    result = runner.invoke(app, [*command, "--prompts", "2", "--max-new-tokens", "4", "--out", str(tmp_path)])
    assert result.exit_code != 0
    found = json.loads((tmp_path / "report.json").read_text())["measurements"]
    assert [(m["method"], m["batch"]) for m in found] == [("plain", 1), ("lookup k=2", 1)]


@pytest.mark.parametrize("hugging_face", [True, False])
def test_bench_measures_peers_beside_ours(tiny_pair: Path, tmp_path: Path, hugging_face: bool) -> None:
    target, draft = str(tiny_pair / "target"), str(tiny_pair / "draft")
    result = runner.invoke(
        app,
        ["bench", target, "--draft", draft, "--batch", "1", "--batch", "2", "--k", "2", "--rounds", "1", "--prompts", "2",
         "--dtype", "bfloat16", "--max-new-tokens", "6", "--peer-python", openvino(tmp_path), "--out", str(tmp_path / "r"),
         *["--peers"] * hugging_face],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r/report.json").read_text())["measurements"]
    peers = {batch: [m["method"] for m in found if m["batch"] == batch][4:] for batch in (1, 2)}
    theirs = ["OpenVINO GenAI", "OpenVINO GenAI k=2"]
    own = ["HF generate"] * hugging_face
    assert peers == {1: own + ["HF assisted k=2", "HF lookup k=2"] * hugging_face + theirs, 2: own + theirs}
    same = {m["method"]: m["same_text"] for m in found if m["batch"] == 1}
    assert same["plain"] == 2 and same["OpenVINO GenAI"] == 0


def test_what_tune_writes_is_what_generate_reads(tiny_pair: Path, tmp_path: Path) -> None:
    target, draft, file = str(tiny_pair / "target"), str(tiny_pair / "draft"), tmp_path / "best.json"
    result = runner.invoke(
        app,
        ["tune", target, "--draft", draft, "--batch", "1", "--k", "2", "--rounds", "1", "--prompts", "1",
         "--max-new-tokens", "8", "--out", str(file)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tuned = read_tuned(file)
    assert set(tuned.draft) <= {draft, "suffix"} and [c.greedy for c in tuned.choices] in ([True, False], [])
    write_tuned = Tuned((draft,), (Choice(1, True, 2, 1.5),), tuned.target, (fingerprint(tiny_pair / "draft"),))
    write_tuned.write(file)
    command = ["generate", target, "--prompt", "def main(", "--max-new-tokens", "12", "--draft", str(file), "--stats"]
    followed, given = runner.invoke(app, command), runner.invoke(app, [*command, "--num-draft-tokens", "3"])
    assert followed.exit_code == given.exit_code == 0, followed.output
    assert " 2: " in followed.stderr and " 3: " not in followed.stderr and " 3: " in given.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "/nowhere", "--prompt", "x"], "CheckpointError"),
        (["generate", "/nowhere"], "no prompt given"),
        (["train", "/nowhere.toml"], "nowhere.toml"),
        (["bench", "/nowhere", "--k", "many"], "k must be a number, a range such as 1..8, or auto, got 'many'"),
        (["tune", "nowhere/at-all"], "pass --out FILE.json"),
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
