"""The command line does what its help says, and a mistake is one clear line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec import __version__, bench
from specdec.cli import app, main
from specdec.errors import ConfigError, SpecDecError
from specdec.training import trainer
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
    assert said in error and "Traceback" not in error and error.count("\n") == 1


def refused(*arguments: object) -> str:
    """What the command says on refusing these arguments."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SpecDecError), result.output
    return str(result.exception)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def target(tiny_pair: Path, tmp_path: Path) -> Path:
    """A copy, as commands that fail here could overwrite it."""
    return Path(shutil.copytree(tiny_pair / "target", tmp_path / "target"))


TRAINERS = [["distill"], ["train", "--drafter", "eagle3"], ["train", "--drafter", "block", "--fresh"]]


@pytest.mark.parametrize("command", TRAINERS)
def test_the_target_is_never_overwritten(
    command: list[str], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, link = contents(target), tmp_path / "link"
    link.symlink_to(target)
    monkeypatch.chdir(target)
    for out in (target, link, tmp_path / "x/../target", "."):
        assert "another folder than the model's" in refused(*command, target, "--out", out)
    assert "another folder than the model's" in refused(*command, ".", "--out", target)
    assert contents(target) == before and link.is_symlink()


@pytest.mark.parametrize("command", TRAINERS)
def test_a_folder_of_something_else_is_never_deleted(command: list[str], target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    (out / "thesis/chapter.tex").write_text("years of work")
    assert "is not empty and was not written by a training run" in refused(*command, target, "--out", out)
    (out / "manifest.json").write_text('{"training.json": {}, "README.md": {}}')
    (out / "training.json").write_text("{}")
    (out / "README.md").write_text("It was distilled by [specdec]")
    assert "holds thesis, which no training run wrote" in refused(*command, target, "--out", out)
    assert (out / "thesis/chapter.tex").read_text() == "years of work"
    pair = shutil.copytree(target, tmp_path / "pair/draft")
    assert "was not written by a training run like this one" in refused(*command, target, "--out", pair)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(1500)))
    return file


@pytest.mark.parametrize(
    "command",
    [["distill", "--max-tokens", "300", "--draft-shape", "tiny"], ["train", "--drafter", "eagle3", "--tokens", "1"]],
)
def test_a_folder_of_its_own_is_replaced_and_links_are_followed(
    command: list[str], target: Path, text: Path, tmp_path: Path
) -> None:
    real, out = tmp_path / "real", tmp_path / "out[red]"
    real.mkdir()
    out.symlink_to(real)
    for fresh in ([], ["--fresh"]):
        result = runner.invoke(app, [*command, str(target), "--data", str(text), "--out", str(out), *fresh])
        assert result.exit_code == 0, result.output
        assert "out[red]" in result.output
        assert out.is_symlink() and (real / "config.json").is_file()
    (real / "mine.txt").write_text("notes")
    assert "holds mine.txt, which no training run wrote" in refused(*command, target, "--out", out, "--fresh")


def test_places_that_cannot_be_written_to_are_refused_before_any_work(tmp_path: Path) -> None:
    """Nothing of the model is looked at: there is none."""
    file, recipe = tmp_path / "file", Path(__file__).parents[1] / "models/tiny.toml"
    file.write_text("mine")
    for command in (*TRAINERS, ["bench"]):
        for out in (file, file / "below"):
            assert "--out must be a folder" in refused(*command, "/nowhere", "--out", out)
    assert "--out must be a folder" in refused("train", recipe, "--out", file)
    for command, option in ((["check", "/nowhere"], "--out"), (["demo"], "--picture")):
        assert f"{option} must be a file in a folder that exists" in refused(*command, option, tmp_path / "no/x.png")
        assert f"{option} must be a file, got" in refused(*command, option, tmp_path)
    assert "--picture must end in one of" in refused("demo", "--picture", tmp_path / "x.gif2")
    (tmp_path / "x.json").mkdir()
    assert "--out must be a file, got" in refused("tune", "/nowhere", "--out", tmp_path / "x.json")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "option",
    ["--seconds=600", "--tokens=1", "--data=x", "--on-policy=0", "--dtype=auto", "--device=cpu", "--width=0",
     "--draft-vocab-size=9"],
)  # fmt: skip
def test_options_of_heads_are_refused_with_a_recipe(option: str) -> None:
    assert f"{option.split('=')[0]} goes with --drafter only" in refused("train", "/nowhere.toml", option)


def test_the_help_says_what_goes_with_drafter() -> None:
    shown = runner.invoke(app, ["train", "--help"]).output.partition("Only with --drafter")[2]
    assert all(option in shown for option in ("--seconds", "--tokens", "--data", "--width", "--dtype"))
    assert "--fresh" not in shown


def test_prompt_files_that_are_no_text_are_refused(tiny_pair: Path, tmp_path: Path) -> None:
    target, latin, binary = tiny_pair / "target", tmp_path / "latin.txt", tmp_path / "binary"
    latin.write_bytes("na\u00efve".encode("latin-1"))
    binary.write_bytes(bytes(range(256)))
    for file in (latin, binary, tmp_path, tmp_path / "none.txt"):
        for command in ("generate", "bench"):
            assert f"{file} cannot be read as text" in refused(command, target, "--prompt-file", file)


def test_brackets_are_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("/no/[where]", "/no/[/red]"):
        monkeypatch.setattr(sys, "argv", ["specdec", "generate", model, "--prompt", "x"])
        with pytest.raises(SystemExit):
            main()
        assert model in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--3", "-", "1.5", "many"])
def test_draft_lengths_that_are_none_are_refused(given: str, tiny_pair: Path) -> None:
    said = refused("generate", tiny_pair / "target", "--prompt", "x", f"--num-draft-tokens={given}")
    assert f'or "auto", got {given!r}' in said


def test_a_finished_recipe_says_that_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = Path(__file__).parents[1] / "models/tiny.toml", tmp_path / "pair [2]"
    monkeypatch.setattr(trainer, "_finished", lambda out, identity: object())
    result = runner.invoke(app, ["train", str(recipe), "--out", str(out)])
    assert result.exit_code == 0
    said = " ".join(result.stderr.split())
    assert "tiny is trained already, see" in said and "; --fresh trains it anew" in said and "0%" not in said


def test_check_uses_as_many_prompts_as_it_is_told(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(engine: Any, *, prompts: Any, **settings: Any) -> Any:
        seen.append(prompts)
        raise ConfigError("seen")

    monkeypatch.setattr(sys.modules["specdec.check"], "check", spy)
    assert refused("check", tiny_pair / "target", "--prompts", "3") == "seen"
    assert refused("check", tiny_pair / "target") == "seen"
    assert [len(prompt) for prompt in seen[0]] == [128] * 3 and seen[1] is None


def test_generate_slides_past_the_context(tiny_pair: Path) -> None:
    context = json.loads((tiny_pair / "target/config.json").read_text())["max_position_embeddings"]
    command = ["generate", str(tiny_pair / "target"), "--prompt", "a b " * context, "--max-new-tokens", "4"]
    assert 'context="slide"' in refused(*command)
    result = runner.invoke(app, [*command, "--context", "slide"])
    assert result.exit_code == 0 and result.stdout
    assert "context must be one of" in refused(*command, "--context", "roll")
