"""Peers run in another interpreter: here this one with libraries that answer by what they were asked for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specdec import peers
from specdec.errors import ConfigError, PeerError
from specdec.machine import cache_directory
from specdec.peers import PeerProcess, find_peers, peer_process

CONVERTER = """
import sys
from pathlib import Path

out = Path(sys.argv[-1])
out.mkdir(parents=True)
(out / "openvino_model.xml").write_text(" ".join(sys.argv[1:-1]))
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
"""
OPENVINO = """
import numpy

class Tensor:
    def __init__(self, data):
        assert data.dtype == numpy.int64 and data.ndim == 2 and len(data) == 1
        self.data = data
"""
# A row is: the prompt's last token, draft tokens, 1 if sampled, 10 x temperature, threads, then zeros.
GENAI = """
import os, sys
from pathlib import Path
from types import SimpleNamespace as GenerationConfig, SimpleNamespace as SchedulerConfig

def draft_model(path, device, **properties):
    assert (Path(path) / "openvino_model.xml").is_file() and properties["INFERENCE_PRECISION_HINT"] == "bf16"
    return path

class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties):
        assert (Path(path) / "openvino_model.xml").is_file() and properties["INFERENCE_PRECISION_HINT"] == "bf16"
        self.threads, self.drafts = properties["INFERENCE_NUM_THREADS"], "draft_model" in properties

    def generate(self, inputs, configs):
        print("noise on standard output")
        return [GenerationConfig(m_generation_ids=[self.row(x.data[0], c)]) for x, c in zip(inputs, configs, strict=True)]

    def row(self, prompt, config):
        assert config.ignore_eos
        k = getattr(config, "num_assistant_tokens", 0)
        assert self.drafts == (k > 0)
        if k == 3:
            raise RuntimeError("three is too many")
        if k == 4:
            sys.stderr.write("no memory left")
            sys.stderr.flush()
            os._exit(1)
        tokens = [int(prompt[-1]), k, int(config.do_sample), round(10 * getattr(config, "temperature", 0)), self.threads]
        return (tokens + [0] * config.max_new_tokens)[: config.max_new_tokens - (k == 5)]
"""
VLLM = """
from types import SimpleNamespace

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    count = 0

    def __init__(self, model, dtype, enable_prefix_caching, speculative_config):
        LLM.count += 1
        assert dtype == "bfloat16" and not enable_prefix_caching
        assert speculative_config is None or speculative_config["method"] == "draft_model"
        self.k = speculative_config["num_speculative_tokens"] if speculative_config else 0

    def generate(self, prompts, params, use_tqdm):
        assert params.ignore_eos
        state = [self.k, LLM.count, round(10 * params.temperature)]
        rows = [[prompt["prompt_token_ids"][-1], *state] for prompt in prompts]
        rows = [(row + [0] * params.max_tokens)[: params.max_tokens] for row in rows]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in rows]
"""


def interpreter(folder: Path, libraries: dict[str, str]) -> str:
    """A Python that has ``libraries``: names of files -> code."""
    for name, code in libraries.items():
        file = folder / "libraries" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder / "libraries"))} exec {shlex.quote(sys.executable)} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def openvino(folder: Path) -> str:
    """A Python with OpenVINO GenAI; conversions are written into ``folder``/log."""
    converter = CONVERTER.format(log=str(folder / "log"))
    return interpreter(
        folder, {"openvino.py": OPENVINO, "openvino_genai.py": GENAI, "optimum/commands/optimum_cli.py": converter}
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for part in ("target", "draft"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    return tmp_path / "target", tmp_path / "draft"


@pytest.fixture
def opened(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerProcess]:
    monkeypatch.setattr(peers, "_REST_SECONDS", 0)
    with peer_process(openvino(tmp_path)) as process:
        process.open("openvino", *pair, dtype=torch.bfloat16, device=torch.device("cpu"))
        yield process


def test_openvino_is_asked_for_what_was_wanted(opened: PeerProcess) -> None:
    assert opened.label == "OpenVINO GenAI" and opened.affordable([1, 2, 8]) == [1, 2, 8]
    plain, drafting = opened.method(0, 6, 0.0), opened.method(2, 5, 0.8)
    run = plain([[5, 6], [7]])
    assert run.token_ids == [[6, 0, 0, 0, 1, 0], [7, 0, 0, 0, 1, 0]]
    assert 0 < run.seconds < 60 and run.stats is None
    assert drafting([[9]]).token_ids == [[9, 2, 1, 8, 1]]
    assert plain([[8]]).token_ids == [[8, 0, 0, 0, 1, 0]]


def test_checkpoints_are_converted_once_until_they_change(
    tmp_path: Path, pair: tuple[Path, Path], opened: PeerProcess
) -> None:
    opened.method(1, 4, 0.0)([[1]])
    target, draft = pair
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[:4] for line in log] == [["export", "openvino", "--model", str(m)] for m in (draft, target)]
    assert all("--task text-generation-with-past --weight-format fp16" in line for line in log)
    folders = {file.parent.name for file in (cache_directory() / "peers" / "openvino").glob("*/openvino_model.xml")}
    assert folders and not any("." in name for name in folders)
    (target / "config.json").write_text('{"changed": true}')
    with peer_process(opened.python) as again:
        again.open("openvino", *pair, dtype=torch.bfloat16, device=torch.device("cpu"))
        again.method(1, 4, 0.0)([[1]])
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[3] for line in log] == [str(draft), str(target), str(target)]


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (3, r"OpenVINO GenAI .* says RuntimeError: three is too many"),
        (4, r"(?s)OpenVINO GenAI .* ended without an answer: .*no memory left"),
        (5, r"made \[5\] tokens per prompt where 6 were asked for"),
    ],
)
def test_what_goes_wrong_there_is_told_here(opened: PeerProcess, length: int, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        opened.method(length, 6, 0.0)([[1]])
    if length != 4:
        assert opened.method(0, 1, 0.0)([[2]]).token_ids == [[2]]


def test_openvino_refuses_models_that_are_not_on_the_cpu(opened: PeerProcess, pair: tuple[Path, Path]) -> None:
    with pytest.raises(PeerError, match="cpu only, and the target is on cuda"):
        opened.open("openvino", *pair, dtype=torch.bfloat16, device=torch.device("cuda"))


def test_vllm_has_an_engine_for_every_length(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    platform = "from types import SimpleNamespace\ncurrent_platform = SimpleNamespace(device_type='cpu')\n"
    python = interpreter(tmp_path, {"vllm/__init__.py": VLLM, "vllm/platforms.py": platform})
    with peer_process(python) as process:
        assert process.installed() == ["vllm"]
        process.open("vllm", *pair, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert process.label == "vLLM" and process.affordable([1, 2, 3, 4, 5, 6]) == [3, 5]
        plain, three = process.method(0, 4, 0.0), process.method(3, 4, 0.5)
        assert plain([[5], [6]]).token_ids == [[5, 0, 1, 0], [6, 0, 1, 0]]
        assert three([[5]]).token_ids == [[5, 3, 2, 5]] and plain([[5]]).token_ids == [[5, 0, 2, 0]]
        with pytest.raises(PeerError, match="runs on cpu, and the target is on cuda"):
            process.open("vllm", *pair, dtype=torch.bfloat16, device=torch.device("cuda"))


def test_the_interpreters_that_were_given_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (openvino(tmp_path / name) for name in ("a", "b"))
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "c", {"vllm/__init__.py": ""}))
    assert find_peers([first, second]) == {"openvino": first, "vllm": sys.executable}
    assert find_peers([]) == {"vllm": sys.executable}


def test_an_interpreter_that_is_none_or_has_no_peer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nowhere/python cannot be run"):
        find_peers(["nowhere/python"])
    with pytest.raises(ConfigError, match="expected a Python interpreter"):
        find_peers(["true"])
    empty = tmp_path / "empty"
    empty.write_text("#!/bin/sh\nread line\necho '{\"peers\": []}'\n")
    empty.chmod(0o755)
    with pytest.raises(ConfigError, match="has none of openvino, vllm"):
        find_peers([str(empty)])
    monkeypatch.setattr(sys, "executable", str(empty))
    assert find_peers([]) == {}
