"""A peer behind a pipe: keeps models in another library and generates when told. Imports nothing of specdec.

It is run as a file by the interpreter that has the library. A line of JSON comes in, one goes out: ``list`` gives the
peers that are installed, ``open`` names models, ``generate`` gives the new tokens of every prompt and the seconds they
took. What goes wrong is the answer's ``error``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

Tokens = list[list[int]]

OPENVINO_WEIGHTS = {"float32": "fp32", "float16": "fp16", "bfloat16": "fp16"}
OPENVINO_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class Peer(Protocol):
    """Another library that generates; end-of-text is ignored, so that all make the same number of tokens."""

    def generate(self, prompts: Tokens, draft_tokens: int, new_tokens: int, temperature: float) -> tuple[Tokens, float]:
        """New tokens of every prompt and the seconds of the call; loads and converts models when they are needed."""


class OpenVino:
    """OpenVINO GenAI's pipeline with continuous batching, on checkpoints that it converts once."""

    library = "openvino_genai"

    def __init__(self, job: dict[str, Any]) -> None:
        if job["device"] != "cpu":
            raise ValueError(f"OpenVINO is measured on cpu only, and the target is on {job['device']}")
        self.job, self.pipelines = job, dict[bool, Any]()

    def generate(self, prompts: Tokens, draft_tokens: int, new_tokens: int, temperature: float) -> tuple[Tokens, float]:
        genai, openvino = import_module(self.library), import_module("openvino")
        numpy = import_module("numpy")
        if (drafting := draft_tokens > 0) not in self.pipelines:
            self.pipelines[drafting] = self._pipeline(genai, drafting)
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = new_tokens, True
        config.do_sample = temperature > 0
        if temperature > 0:
            config.temperature, config.rng_seed = temperature, time.time_ns() % 2**32
        if drafting:
            config.num_assistant_tokens = draft_tokens
        started = time.perf_counter()
        results = self.pipelines[drafting].generate(inputs, [config] * len(inputs))
        seconds = time.perf_counter() - started
        return [list(result.m_generation_ids[0]) for result in results], seconds

    def _pipeline(self, genai: Any, drafting: bool) -> Any:
        properties = {
            "INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[self.job["dtype"]],
            "INFERENCE_NUM_THREADS": self.job["threads"],
        }
        if drafting:
            draft = self._converted(Path(self.job["draft"]))
            properties["draft_model"] = genai.draft_model(str(draft), "CPU", **properties)
        target = self._converted(Path(self.job["target"]))
        return genai.ContinuousBatchingPipeline(str(target), genai.SchedulerConfig(), "CPU", properties)

    def _converted(self, checkpoint: Path) -> Path:
        """The checkpoint in OpenVINO's format; converted once for each state of its files."""
        form = OPENVINO_WEIGHTS[self.job["dtype"]]
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.iterdir() if f.is_file())
        name = hashlib.sha256(json.dumps([str(checkpoint.resolve()), form, files]).encode()).hexdigest()[:16]
        place = Path(self.job["cache"]) / "openvino" / name
        if not place.is_dir():
            unfinished = place.with_name(f"{name}.{os.getpid()}")
            export = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(checkpoint)]
            options = ["--task", "text-generation-with-past", "--weight-format", form, str(unfinished)]
            subprocess.run([sys.executable, *export, *options], check=True, stdin=subprocess.DEVNULL)
            unfinished.rename(place)
        return place


class Vllm:
    """vLLM, one of its engines for every draft length: there it is a property of the engine."""

    library = "vllm"

    def __init__(self, job: dict[str, Any]) -> None:
        if job["device"] == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
        os.environ["HF_HUB_OFFLINE"] = "1"
        place = import_module("vllm.platforms").current_platform.device_type
        if place != job["device"]:
            raise ValueError(f"this vLLM runs on {place}, and the target is on {job['device']}")
        self.job, self.engines = job, dict[int, Any]()

    def generate(self, prompts: Tokens, draft_tokens: int, new_tokens: int, temperature: float) -> tuple[Tokens, float]:
        vllm = import_module(self.library)
        if draft_tokens not in self.engines:
            self.engines[draft_tokens] = self._engine(vllm, draft_tokens)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = vllm.SamplingParams(
            temperature=temperature, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )  # fmt: skip
        started = time.perf_counter()
        results = self.engines[draft_tokens].generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return [list(result.outputs[0].token_ids) for result in results], seconds

    def _engine(self, vllm: Any, draft_tokens: int) -> Any:
        speculation = {"model": self.job["draft"], "num_speculative_tokens": draft_tokens, "method": "draft_model"}
        return vllm.LLM(
            model=self.job["target"], dtype=self.job["dtype"], enable_prefix_caching=False,
            speculative_config=speculation if draft_tokens else None,
        )  # fmt: skip


PEERS: dict[str, type[OpenVino | Vllm]] = {"openvino": OpenVino, "vllm": Vllm}


class Worker:
    """Answers requests; at most one peer is open."""

    def __init__(self) -> None:
        self.peer: Peer | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the request asked for."""
        if request["do"] == "list":
            return {"peers": [name for name, peer in PEERS.items() if find_spec(peer.library) is not None]}
        if request["do"] == "open":
            self.peer = PEERS[request["peer"]](request)
            return {}
        if self.peer is None:
            raise ValueError("generate came before open")
        tokens, seconds = self.peer.generate(
            request["prompts"], request["draft_tokens"], request["new_tokens"], request["temperature"]
        )
        return {"token_ids": tokens, "seconds": seconds}


def main() -> None:
    """Answer until the input ends."""
    # Libraries print as they like: what they write to standard output must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001  another library raises what it likes; the user is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
