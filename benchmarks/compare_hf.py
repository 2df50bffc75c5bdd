"""Our engine against Hugging Face's own generation on a large target: the same models, precision, prompts and machine.

python benchmarks/compare_hf.py     prints two tables, writes benchmarks/results/compare_hf.json   (or: make bench-hf)

The target is the demo's, widened to 520 M parameters that compute the same (widen.py): a large model's cost with a
trained pair's acceptance. Batch 1 is against assisted generation at its best draft length, batch 8, where Hugging
Face refuses to assist, against plain ``generate``. Our draft lengths are chosen as it goes; Hugging Face tries its own on
some of the prompts first, and the fastest two go into the interleaved rounds that count.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

from specdec import bench, load
from specdec.bench import Measurement, Method
from specdec.controller import AUTO
from specdec.demo import demo_pair
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.machine import machine
from specdec.training.data import gather, held_out_prompts
from specdec.widen import wide_pair

RESULTS = Path(__file__).parent / "results"
DTYPE = "bfloat16"
DRAFT_LENGTHS, LOOKUP_LENGTHS = range(1, 9), (3, 5, 8)  # that Hugging Face tries; ours are chosen as it goes
PROMPT_TOKENS, LARGE_BATCH, TRIAL_PROMPTS = 128, 8, 2
HF_PLAIN, HF_ASSISTED, HF_LOOKUP = "HF generate", "HF assisted", "HF lookup"
NATIVE, ON_HF = "ours", "on HF"  # from the checkpoint, on our own decoder; from Hugging Face's model objects
FINALISTS = {HF_ASSISTED: 2}  # of each family; 1 of the others
TARGETS = {1: 1.5, LARGE_BATCH: 2.0}  # what we promise: times HF's assisted generation, times HF's plain one

Families = dict[str, dict[int | str, Method]]  # name -> draft length -> method; 0 is plain decoding


@dataclass(frozen=True)
class Contenders:
    """The models, each loaded once: Hugging Face's and our own decoder on the same checkpoints."""

    hf_target: PreTrainedModel
    hf_draft: PreTrainedModel
    native: Engine
    on_hf: Engine
    new_tokens: int

    @classmethod
    def of(cls, target: Path, draft: Path, new_tokens: int) -> Contenders:
        """Load the pair in ``DTYPE``, for Hugging Face, as model objects for us, and from its directories for us."""
        hf_target, hf_draft = (bench.hf_model(path, DTYPE) for path in (target, draft))
        native = load(target, draft=draft, dtype=DTYPE)
        on_hf = load(hf_target, draft=hf_draft)
        return cls(hf_target, hf_draft, native, on_hf, new_tokens)

    def families(self) -> Families:
        """Every way to generate at any batch size."""
        found: Families = {HF_PLAIN: {0: self._hf()}}
        for name, engine in {NATIVE: self.native, ON_HF: self.on_hf}.items():
            found[f"{name} plain"] = {0: self._own(engine, 0)}
            found[f"{name} draft"] = {AUTO: self._own(engine, AUTO)}
            assert engine.drafter is not None
            hybrid = HybridDrafter(engine.drafter, SuffixDrafter())
            both = Engine(engine.target, hybrid, vocab_size=engine.limits.vocab_size)
            found[f"{name} draft + lookup"] = {AUTO: self._own(both, AUTO)}
        return found

    def hf_speculation(self) -> Families:
        """What Hugging Face offers at batch 1 only."""
        return {
            HF_ASSISTED: {k: self._hf(assistant_model=self._assistant(k)) for k in DRAFT_LENGTHS},
            HF_LOOKUP: {k: self._hf(prompt_lookup_num_tokens=k) for k in LOOKUP_LENGTHS},
        }

    def _own(self, engine: Engine, num_draft_tokens: int | str) -> Method:
        return bench.engine_method(engine, num_draft_tokens=num_draft_tokens, max_new_tokens=self.new_tokens)

    def _hf(self, **given: object) -> Method:
        return bench.hf_method(self.hf_target, **bench.hf_settings(self.new_tokens), **given)

    def _assistant(self, num_assistant_tokens: int) -> PreTrainedModel:
        """The draft, told to propose that many tokens always; a copy, because assisting changes its configuration."""
        assistant = copy.deepcopy(self.hf_draft)
        assistant.generation_config.num_assistant_tokens = num_assistant_tokens
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        return assistant


def label(family: str, num_draft_tokens: int | str) -> str:
    """How a method is called in tables."""
    return f"{family} k={num_draft_tokens}" if num_draft_tokens else family


def race(
    families: Families, prompts: list[list[int]], batch: int, rounds: int, progress: Callable[[str, int], None]
) -> tuple[dict[str, list[bench.Run]], dict[str, dict[int | str, float]]]:
    """Runs of every family's fastest methods in interleaved rounds, and tokens per second of all in the round before.

    At batch 1 prompts are run one by one (the first few in the round before), otherwise ``batch`` of them at once.
    """
    tried: dict[str, dict[int | str, float]] = {}
    finalists: dict[str, Method] = {}
    for family, methods in families.items():
        at_batch = {k: method if batch > 1 else bench.one_by_one(method) for k, method in methods.items()}
        trial = prompts[: TRIAL_PROMPTS if batch == 1 else batch]
        if len(at_batch) > 1:
            progress(f"batch {batch}: draft lengths of {family}", 0)
            next(iter(at_batch.values()))(prompts[:batch])  # the first call warms up
            runs = {k: method(trial) for k, method in at_batch.items()}
            tried[family] = {k: sum(map(len, run.token_ids)) / run.seconds for k, run in runs.items()}
        best = sorted(at_batch, key=lambda k: -tried.get(family, {}).get(k, 0.0))[: FINALISTS.get(family, 1)]
        finalists.update({label(family, k): at_batch[k] for k in best})
    progress(f"batch {batch}: rounds", len(finalists) * (rounds + 1))
    return bench.timed_rounds(finalists, prompts, rounds=rounds, progress=lambda: progress("", 1)), tried


def fastest(found: list[Measurement], family: str) -> Measurement:
    """The family's fastest method."""
    return max((m for m in found if m.method.split(" k=")[0] == family), key=lambda m: m.tokens_per_second)


def verdict(runs: Mapping[str, list[bench.Run]], batch: int) -> tuple[list[Measurement], list[dict[str, object]]]:
    """All measurements relative to the one that is to be beaten, and how much faster each of our ways is."""
    plain = bench.summaries(runs, baseline=HF_PLAIN, batch=batch)
    rival = fastest(plain, HF_ASSISTED if batch == 1 else HF_PLAIN).method
    found = bench.summaries(runs, baseline=rival, batch=batch)
    families = dict.fromkeys(m.method.split(" k=")[0] for m in found)
    ours = [fastest(found, family) for family in families if family.startswith((NATIVE, ON_HF))]
    return found, [
        {"batch": batch, "ours": m.method, "rival": rival, "ratio": m.speedup, "wanted": TARGETS[batch]} for m in ours
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=3, help="at batch 1, one after the other")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, choices=list(TARGETS), nargs="+", default=list(TARGETS))
    given = parser.parse_args()
    console = Console()
    target, draft = wide_pair(demo_pair())
    contenders = Contenders.of(target, draft, given.new_tokens)
    assert contenders.native.tokenizer is not None
    prompts = held_out_prompts(
        contenders.native.tokenizer, gather("stdlib"), count=max(given.prompts, LARGE_BATCH), tokens=PROMPT_TOKENS
    )
    rows: list[dict[str, object]] = []
    lines: list[dict[str, object]] = []
    tried: dict[int, dict[str, dict[int | str, float]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    for batch in given.batch:
        families = contenders.families() | (contenders.hf_speculation() if batch == 1 else {})
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def progress(stage: str, steps: int, bar: Progress = bar, task: object = task) -> None:
                if stage:
                    bar.update(task, description=stage, total=steps or None, completed=0)
                else:
                    bar.advance(task, steps)

            chosen = prompts[: given.prompts if batch == 1 else batch]
            runs, tried[batch] = race(families, chosen, batch, given.rounds, progress)
        found, reached = verdict(runs, batch)
        console.print(bench.table(found, f"520 M target, {DTYPE}; speedup: to {reached[0]['rival']}"))
        rows += [m.as_dict() for m in found]
        lines += reached
    for line in lines:
        console.print(
            f"batch {line['batch']}: {line['ours']} is {line['ratio']:.2f}x {line['rival']}, wanted {line['wanted']}x"
        )
    settings = {**vars(given), "prompt_tokens": PROMPT_TOKENS, "dtype": DTYPE, "target": target.name}
    figures = {"machine": machine(), "settings": settings, "promises": lines, "tried": tried, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare_hf.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
