"""The house stays in order: imports point down, public names are listed, only one package is installed."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import build_meta

import specdec

ROOT = Path(specdec.__file__).parent
# Lowest first. A module may import those of lower layers and of its own; a package stands for all its modules.
LAYERS = [
    ["errors", "machine", "places", "limit", "compiled", "graphs", "precision"],
    ["draws"],
    ["sampling"],
    ["processors"],
    ["draft"],
    [
        "verify",
        "stats",
        "tree",
        "lm.features",
        "lm.weights",
        "lm.cache",
        "lm.clock",
        "lm.base",
        "nn",
        "text",
        "costs",
        "experience",
        "plans",
        "rounds",
        "output",
    ],
    ["lm"],
    ["sequences", "scoring"],
    ["controller", "judge", "ledger"],
    ["choice", "pacing"],
    ["lessons"],
    ["control"],
    ["drafters", "requests", "training"],
    ["encoded", "admission", "ahead", "occupied"],
    ["engine"],
    ["tuned"],
    ["checkpoints"],
    ["drafting"],
    ["load"],
    ["generate", "plugin", "check"],
    [""],  # specdec itself, the public names
    ["bench", "picture", "report", "peers", "sweep", "tune", "lm_eval", "distill"],
    ["heads"],
    ["widen"],
    ["demo"],
    ["options"],
    ["cli"],
    ["__main__"],
]
MAX_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of the package by its name below ``specdec``."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def layer(module: str) -> int:
    """The layer of the longest entry that names the module or a package of it."""
    places = {name: i for i, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next((places[name] for name in names if name in places), None)
    assert found is not None, f"specdec.{module} is in no layer; add it to LAYERS in {__file__}"
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that the code imports, wherever in it; what only type checkers see is exempt."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("specdec").lstrip(".") for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            if is_ours(node.module or ""):
                module = (node.module or "").removeprefix("specdec").lstrip(".")
                for alias in node.names:
                    inner = f"{module}.{alias.name}".lstrip(".")
                    yield inner if inner in MODULES else module
        else:
            yield from imports(node)


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "specdec"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for imported in imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        assert layer(imported) <= layer(module) or imported == module, (
            f"specdec.{module} imports specdec.{imported}, which is a higher layer. "
            "Move what both need down, or pass it in as an argument"
        )


def test_the_check_of_imports_sees_every_form_of_them() -> None:
    code = """
import specdec.engine
from specdec.lm import base, nothing
from specdec import cli, Engine
if TYPE_CHECKING:
    from specdec.sequences import Step
def f():
    from specdec.load import load
import torch, specdecx
"""
    assert list(imports(ast.parse(code))) == ["engine", "lm.base", "lm", "cli", "", "load"]
    assert layer("lm.base") < layer("lm.native") < layer("sequences") < layer("engine") < layer("") < layer("cli")
    assert all(name in MODULES for names in LAYERS for name in names if name not in ("bench", "picture", "demo", "cli"))


def test_only_the_door_and_the_command_line_know_training() -> None:
    allowed = {"load", "demo", "cli", "bench", "distill", "heads"}
    for module, file in MODULES.items():
        if not module.startswith("training") and module not in allowed:
            found = set(imports(ast.parse(file.read_text(encoding="utf-8"))))
            assert not any(name.startswith("training") for name in found), module


def test_public_names_are_those_that_are_listed() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    bound = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    bound |= {"__version__"}
    assert specdec.__all__ == sorted(bound)
    assert all(hasattr(specdec, name) for name in specdec.__all__)
    star: dict[str, object] = {}
    exec("from specdec import *", star)  # noqa: S102
    assert set(star) - {"__builtins__"} == set(specdec.__all__)


def test_every_public_thing_says_what_it_is() -> None:
    for name in specdec.__all__:
        if name != "__version__":
            assert (getattr(specdec, name).__doc__ or "").strip(), name
    for module, file in MODULES.items():
        text = file.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"specdec.{module} has no docstring"


def test_files_are_short() -> None:
    for module, file in MODULES.items():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, f"specdec.{module}"


FORBIDDEN = {
    r"trust_remote_code\s*=\s*True": "remote code is never run for the user",
    r"import pickle|pickle\.load|torch\.load\(": "nothing is unpickled",
    r"\bprint\(": "a library does not print",
    r"/(home|root|work|tmp|Users)/": "a path of somebody's machine",
    r"\b(TODO|FIXME|XXX|HACK)\b": "finish it or leave it out",
    r"\btransformers\.\S*\._|from transformers.* import _": "private parts of transformers are touched in lm/hf.py only",
    r"except:": "a bare except hides bugs",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_package_does_without(pattern: str) -> None:
    for module, file in MODULES.items():
        if (module, pattern) in {("cli", r"\bprint\(")} or (module == "lm.hf" and "transformers" in pattern):
            continue
        code = re.sub(r"\.print\(", "", file.read_text(encoding="utf-8"))
        found = re.search(pattern, code)
        assert found is None, f"specdec.{module} has {found[0]!r}: {FORBIDDEN[pattern]}"


def test_recipes_and_studies_are_no_packages() -> None:
    for folder in ("models", "evals", "benchmarks", "docs"):
        assert not list((ROOT.parent / folder).rglob("__init__.py")), f"{folder}/ would be installed as a package"


def test_the_wheel_holds_specdec_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT.parent / name).read_bytes())
    for folder in ("specdec", "models", "evals", "benchmarks", "tests", "docs"):
        for file in (ROOT.parent / folder).rglob("*"):
            if file.suffix in (".py", ".toml", ".typed", ".json", ".md") and "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    monkeypatch.chdir(source)
    (tmp_path / "dist").mkdir()
    wheel = build_meta.build_wheel(str(tmp_path / "dist"))
    names = zipfile.ZipFile(tmp_path / "dist" / wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"specdec", f"specdec-{specdec.__version__}.dist-info"}
    shipped = {str(file.relative_to(ROOT.parent)) for file in MODULES.values()}
    assert shipped <= set(names)
    assert "specdec/py.typed" in names and any(name.endswith("recipes/demo.toml") for name in names)


def test_every_file_is_in_the_description_of_the_house() -> None:
    text = (ROOT.parent / "docs/structure.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_/]+\.(?:py|c|h))`", text))
    files = [file for kind in ("py", "c", "h") for file in ROOT.rglob(f"*.{kind}")]
    assert named == {str(file.relative_to(ROOT)) for file in files if not file.name.startswith("__")}
