"""C sources of the package, compiled for this processor when first needed and kept for the next program."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from specdec.errors import FallbackWarning
from specdec.machine import cache_directory, instructions, processor

# NaN must stay NaN, so no -ffast-math.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def compiled(*sources: Path, flags: Sequence[str] = (), purpose: str) -> ctypes.CDLL | None:
    """The library of the first of ``sources``, which includes the others.

    None without a source or a compiler; a compiler that fails, or a folder that cannot be written, is a
    FallbackWarning that says that ``purpose`` is slower. Compiling takes seconds, once.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not all(source.is_file() for source in sources):
        return None
    command = [*compiler.split(), *FLAGS, *flags]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    described = [*command, processor(), instructions(), platform.platform(), *texts]
    name = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    library = cache_directory() / "kernels" / f"{name}.so"
    try:
        if not library.is_file():
            _compile([*command, str(sources[0]), "-lm"], library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        why = _reason(error, compiler, library.parent)
        warnings.warn(f"{purpose} on CPU is slower: {why}", FallbackWarning, stacklevel=3)
        return None


def _reason(error: OSError | subprocess.CalledProcessError, compiler: str, folder: Path) -> str:
    """Why there is no library, and what to do about it: the system names the file that it failed on."""
    file = getattr(error, "filename", None)
    if file is not None and str(file) != compiler.split()[0]:
        return f"the folder {folder} cannot be written ({error}); allow it, or move it with XDG_CACHE_HOME"
    return f"{compiler} cannot compile it ({getattr(error, 'stderr', None) or error})"


def _compile(command: list[str], library: Path) -> None:
    """The library appears whole or not at all, whoever else makes it at the same time."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
        os.replace(made, library)
