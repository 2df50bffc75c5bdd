"""How fast and how lean training is, next to Hugging Face's ``Trainer``; writes benchmarks/results/train_speed.json.

python benchmarks/train_speed.py [RECIPE] [--precision float32|bfloat16]

Speed: the recipe's target alone against ``Trainer`` on a ``LlamaForCausalLM`` of the same configuration, with the same
text, rows, length, precision (bfloat16: float32 weights and moments, products in bfloat16) and optimiser; and target
and draft together. In turns, in one process, the first steps of every turn left out. With OMP_NUM_THREADS=1 processor time is
measured, which is what to do on a machine that is busy with other things.

Memory: the peak of the loss alone, forward and backward, with a vocabulary of 32k and growing batch x length, against
the plain way (all logits at once); each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from specdec.machine import fast_dtype, machine
from specdec.nn.gpt import GPT, state_to_hf
from specdec.training import data
from specdec.training.memory import keep_freed_memory
from specdec.training.objective import Pair, _PairLoss
from specdec.training.optimizer import MasterAdamW
from specdec.training.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP = 3  # steps of every turn that are not timed
VOCABULARY, HIDDEN = 32_768, 512  # of the memory measurement
POSITIONS = (512, 1024, 2048, 4096)


def wait() -> float:
    """The time once the device has done its work: with one CPU thread its own, which other programs hardly disturb."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if clock() == "processor" else time.perf_counter()


def clock() -> str:
    """What seconds are measured with."""
    return "processor" if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else "wall"


class Ours:
    """Our training step, with or without a draft."""

    def __init__(
        self, recipe: Recipe, target: GPT, draft: GPT | None, dtype: torch.dtype, tokens: torch.Tensor
    ) -> None:
        self.recipe, self.tokens, self.step = recipe, tokens, 0
        overlap = draft is not None and DEVICE.type == "cuda"
        self.pair = Pair(target, draft, distillation=recipe.train.distillation, overlap=overlap).train()
        models = filter(None, (target, draft))
        self.optimizers = [MasterAdamW(model, dtype, weight_decay=recipe.train.weight_decay) for model in models]

    def seconds(self, steps: int) -> list[float]:
        """Of each of ``steps`` updates."""
        times = []
        for _ in range(steps + WARM_UP):
            start = wait()
            self._update()
            times.append(wait() - start)
        return times[WARM_UP:]

    def _update(self) -> None:
        settings = self.recipe.train
        shape = {"rows": settings.rows, "length": settings.sequence_length}
        losses = self.pair(data.batch(self.tokens, seed=0, step=self.step, **shape).to(DEVICE))
        losses.sum().backward()
        norms = [optimizer.gather_gradients() for optimizer in self.optimizers]
        assert bool(torch.isfinite(torch.stack([*losses.detach(), *norms])).all())
        for optimizer, norm in zip(self.optimizers, norms, strict=True):
            optimizer.step(settings.target_learning_rate / 10, norm, settings.clip)
        self.step += 1


class Clock(TrainerCallback):
    """Notes when the Trainer's steps begin."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.moments.append(wait())

    def on_train_end(self, *_: object, **__: object) -> None:
        self.moments.append(wait())


class HuggingFace:
    """The Trainer's step on the same target."""

    def __init__(self, recipe: Recipe, target: GPT, dtype: torch.dtype, tokens: torch.Tensor) -> None:
        self.recipe, self.dtype, self.tokens = recipe, dtype, tokens
        self.model = LlamaForCausalLM(target.config)
        self.model.load_state_dict(state_to_hf(target), strict=False)
        self.model.config.use_cache = False

    def seconds(self, steps: int) -> list[float]:
        """Of each of ``steps`` updates."""
        settings = self.recipe.train
        shape = {"rows": settings.rows, "length": settings.sequence_length - 1}  # it shifts the labels itself
        count = steps + WARM_UP
        rows = torch.cat([data.batch(self.tokens, seed=0, step=step, **shape) for step in range(count)])
        texts = [{"input_ids": row, "labels": row} for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=count, per_device_train_batch_size=settings.rows, bf16=self.dtype == torch.bfloat16,
                learning_rate=settings.target_learning_rate / 10, weight_decay=settings.weight_decay,
                max_grad_norm=settings.clip, adam_beta2=0.95, optim="adamw_torch_fused", report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=DEVICE.type == "cpu",
            )  # fmt: skip
            clock = Clock()
            Trainer(self.model, arguments, train_dataset=texts, callbacks=[clock]).train()
        return [later - earlier for earlier, later in zip(clock.moments, clock.moments[1:], strict=False)][WARM_UP:]


def speeds(recipe: Recipe, dtype: torch.dtype, steps: int, rounds: int) -> dict[str, object]:
    """Median tokens/s of the three, and the ratios asked for."""
    keep_freed_memory()  # as training does; it helps the Trainer, too
    corpus = data.gather("stdlib")
    tokenizer = data.train_tokenizer(corpus.training, recipe.tokenizer.vocab_size, 1024)
    tokens = data.encode(tokenizer, corpus.training)

    def model(which: str) -> GPT:
        shape = getattr(recipe, which)
        return GPT(shape.config(len(tokenizer), tokenizer.eos_token_id), shape.dropout).to(DEVICE)

    programs = {
        "HF Trainer": HuggingFace(recipe, model("target"), dtype, tokens),
        "target alone": Ours(recipe, model("target"), None, dtype, tokens),
        "target and draft": Ours(recipe, model("target"), model("draft"), dtype, tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(statistics.median(program.seconds(steps)))
    batch = recipe.train.rows * recipe.train.sequence_length
    pairs = list(zip(*times.values(), strict=True))  # rounds: a slow moment of the machine hits all of a round
    return {
        "recipe": recipe.name,
        "precision": str(dtype).removeprefix("torch."),
        "rows": recipe.train.rows,
        "sequence_length": recipe.train.sequence_length,
        "steps": steps,
        "rounds": rounds,
        "tokens_per_second": {name: round(batch / statistics.median(found)) for name, found in times.items()},
        "target_alone_to_trainer": round(statistics.median(hf / own for hf, own, _ in pairs), 3),
        "pair_time_to_target_alone": round(statistics.median(both / own for _, own, both in pairs), 3),
    }


def peak(way: str, positions: int) -> float:
    """Megabytes that the loss of ``positions`` adds to what its inputs take, by "fused" or "plain" (this process)."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(rows, HIDDEN, generator=generator).to(DEVICE).requires_grad_()
        for rows in (positions, VOCABULARY) * 2
    ]
    labels = torch.randint(0, VOCABULARY, (positions,), generator=generator).to(DEVICE)
    for state in states:
        state.grad = torch.zeros_like(state)  # present in either way
    _used()
    before = _used()  # what the inputs take
    if way == "fused":
        loss = _PairLoss.apply(labels, 0.9, positions, *states).sum()
    else:
        target, draft = F.linear(*states[:2]), F.linear(*states[2:])
        teacher = target.detach().log_softmax(-1)
        divergence = nn.functional.kl_div(draft.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        loss = F.cross_entropy(target, labels) + 0.1 * F.cross_entropy(draft, labels) + 0.9 * divergence
    loss.backward()
    return round(_used() - before, 1)


def _used() -> float:
    """The most memory used since the last call, in megabytes; what is in use now counts as used."""
    if DEVICE.type == "cuda":
        found = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return found
    status = Path("/proc/self/status")
    if not status.exists():  # a peak since the start of the process, which then hides what stays below it
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return found


def memory() -> dict[str, object]:
    """Peaks by positions of both ways, and what every 1,000 positions more cost."""
    found = {}
    for way in ("fused", "plain"):
        peaks = [
            float(subprocess.check_output([sys.executable, __file__, "--peak", way, str(n)], text=True).split()[-1])
            for n in POSITIONS
        ]
        slope = 1000 * (peaks[-1] - peaks[0]) / (POSITIONS[-1] - POSITIONS[0])
        found[way] = {"peak_megabytes": dict(zip(map(str, POSITIONS), peaks, strict=True)),
                      "megabytes_per_1000_positions": round(slope, 1)}  # fmt: skip
    return {"vocabulary": VOCABULARY, "hidden": HIDDEN, "models": 2, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(HERE.parent / "models/stdlib.toml"))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        sys.stdout.write(f"{peak(arguments.peak[0], int(arguments.peak[1]))}\n")
        return
    recipe = load_recipe(arguments.recipe)
    precisions = arguments.precision or ["float32", str(fast_dtype(DEVICE)).removeprefix("torch.")]
    figures: dict[str, object] = {"machine": machine(), "clock": clock(), "load_before": round(os.getloadavg()[0], 2)}
    figures["speed"] = [
        speeds(recipe, getattr(torch, name), arguments.steps, arguments.rounds) for name in dict.fromkeys(precisions)
    ]
    figures["memory"] = memory()
    text = json.dumps(figures, indent=1)
    Console().print_json(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/train_speed.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
