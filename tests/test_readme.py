"""Every command of the README runs, and its Python example too."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.fixture
def workspace(tiny_pair: Path, tmp_path: Path) -> Path:
    """A folder like the repository root, in which models/tiny is trained already (training has its own test)."""
    shutil.copytree(tiny_pair, tmp_path / "models/tiny")
    shutil.copy(ROOT / "models/tiny.toml", tmp_path / "models/tiny.toml")
    return tmp_path


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_targets_exist(command: list[str]) -> None:
    subprocess.run([*command, "-n"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", commands("specdec"), ids=lambda command: command[1])
def test_commands_run(command: list[str], workspace: Path) -> None:
    program = [sys.executable, "-c", "from specdec.cli import main; main()"]
    subprocess.run([*program, *command[1:]], cwd=workspace, check=True, capture_output=True)


def test_python_example_runs(workspace: Path) -> None:
    for block in blocks("python"):
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=workspace, check=True, capture_output=True, text=True
        )
        assert "mean acceptance length" in result.stdout


def test_the_contributed_drafter_works_and_changes_nothing(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's example drafter, run as it stands there."""
    import specdec
    from specdec.drafting import NAMES

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    scope: dict[str, type] = {}
    monkeypatch.setattr("specdec.drafting.NAMES", dict(NAMES))
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], scope)  # noqa: S102
    target = tiny_pair / "target"
    plain = specdec.generate(target, "import os", draft=None, max_new_tokens=16)
    for draft in (scope["RepeatLast"](), "repeat"):
        fast = specdec.generate(target, "import os", draft=draft, max_new_tokens=16)
        assert fast.token_ids == plain.token_ids
        assert fast.stats.num_draft_tokens > 0
