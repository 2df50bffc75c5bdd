"""Other libraries that generate, measured beside ours; each in a process of the interpreter that has it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from specdec.bench import Method, Run
from specdec.errors import ConfigError, PeerError
from specdec.machine import cache_directory

WORKER = Path(__file__).with_name("worker.py")
LABELS = {"openvino": "OpenVINO GenAI", "vllm": "vLLM"}
_FEW_LENGTHS = {"vllm": (3, 5)}  # it needs an engine for each, which take memory and minutes
_REST_SECONDS = 0.3  # after a call: threads of the other process spin for a while, and would slow what comes next
_FAREWELL_SECONDS = 10
_TOLD = 400  # characters of another program's complaint


class PeerProcess:
    """A worker that runs in another interpreter; ``peer_process`` starts and ends it."""

    def __init__(self, python: str, process: subprocess.Popen[str], log: TextIO) -> None:
        self.python, self.label = python, Path(python).name
        self._process, self._log, self._name = process, log, ""

    def installed(self) -> list[str]:
        """Peers that this interpreter can import."""
        found: list[str] = self._ask(do="list")["peers"]
        return found

    def open(self, name: str, target: Path, draft: Path | None, *, dtype: torch.dtype, device: torch.device) -> None:
        """Choose the peer and the models; they are loaded when they are first needed."""
        self._name, self.label = name, LABELS[name]
        self._ask(
            do="open", peer=name, target=str(target.resolve()), draft=draft and str(draft.resolve()),
            dtype=str(dtype).removeprefix("torch."), device=device.type, threads=torch.get_num_threads(),
            cache=str(cache_directory() / "peers"),
        )  # fmt: skip

    def affordable(self, lengths: Sequence[int]) -> list[int]:
        """Those of the draft lengths that can be measured within reason."""
        few = _FEW_LENGTHS.get(self._name)
        return [k for k in lengths if few is None or k in few]

    def method(self, num_draft_tokens: int, max_new_tokens: int, temperature: float) -> Method:
        """Generate there; seconds are measured there too, so that the pipe is not counted."""

        def run(prompts: Sequence[Sequence[int]]) -> Run:
            answer = self._ask(
                do="generate", prompts=[list(prompt) for prompt in prompts], draft_tokens=num_draft_tokens,
                new_tokens=max_new_tokens, temperature=temperature,
            )  # fmt: skip
            time.sleep(_REST_SECONDS)
            if [len(row) for row in answer["token_ids"]] != [max_new_tokens] * len(prompts):
                made = sorted({len(row) for row in answer["token_ids"]})
                raise PeerError(f"{self.label} made {made} tokens per prompt where {max_new_tokens} were asked for")
            return Run(answer["token_ids"], answer["seconds"])

        return run

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # a pipe without another end
            line = ""
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"{self.label} ({self.python}) ended without an answer: {self._complaint()}") from None
        if "error" in answer:
            raise PeerError(f"{self.label} ({self.python}) says {answer['error'][:_TOLD]}")
        return answer

    def _complaint(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()[-_TOLD:] or "nothing was written to its standard error"


@contextmanager
def peer_process(python: str) -> Iterator[PeerProcess]:
    """A worker in that interpreter, ended with the block. Raises ``ConfigError`` where there is none."""
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        except OSError as error:
            raise ConfigError(f"{python} cannot be run: {error}; expected a Python interpreter") from error
        try:
            yield PeerProcess(python, process, log)
        finally:
            try:
                process.communicate(timeout=_FAREWELL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def find_peers(pythons: Sequence[str]) -> dict[str, str]:
    """Which interpreter has which peer: those given come first, then the one that runs this.

    Raises ``ConfigError`` for one that was given and has none.
    """
    found: dict[str, str] = {}
    for python in [*pythons, sys.executable]:
        try:
            with peer_process(python) as process:
                installed = process.installed()
        except PeerError as error:
            raise ConfigError(f"{error}; expected a Python interpreter") from error
        if python in pythons and not installed:
            raise ConfigError(f"{python} has none of {', '.join(LABELS)}; install one there, or leave it out")
        found.update({name: python for name in installed if name not in found})
    return found
