"""What cannot be compiled is said, with the reason that it has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from specdec.compiled import compiled
from specdec.errors import FallbackWarning

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no C compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.c"
    file.write_text("int three(void) { return 3; }\n")
    return file


def test_a_source_is_compiled_into_the_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = compiled(source, purpose="counting")
    assert library is not None and library.three() == 3
    assert len(list((tmp_path / "cache/specdec/kernels").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    with pytest.warns(
        FallbackWarning, match="counting on CPU is slower: the folder .*cannot be written.*XDG_CACHE_HOME"
    ):
        assert compiled(source, purpose="counting") is None
    kernels = tmp_path / "cache/specdec/kernels"
    kernels.parent.mkdir(parents=True)
    kernels.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(FallbackWarning, match=f"the folder {kernels} cannot be written"):
        assert compiled(source, purpose="counting") is None


def test_a_compiler_that_fails_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for compiler in ("false", str(tmp_path / "missing")):
        monkeypatch.setenv("CC", compiler)
        with pytest.warns(FallbackWarning, match=f"{compiler} cannot compile it"):
            assert compiled(source, purpose="counting") is None
    monkeypatch.delenv("CC")
    source.write_text("no C\n")
    with pytest.warns(FallbackWarning, match="cannot compile it .*error"):
        assert compiled(source, purpose="counting") is None
