"""Training a feature head for a frozen target: it learns from what the target makes of text, computed on the way.

Nothing is stored between steps: the hidden states of a corpus would take thousands of times its size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.errors import ConfigError, ModelError
from specdec.machine import batch_rows, fast_dtype
from specdec.nn.gpt import GPT
from specdec.nn.heads import FeatureHead
from specdec.training import checkpoint as files
from specdec.training import data
from specdec.training.interrupt import Interrupt
from specdec.training.memory import keep_freed_memory
from specdec.training.optimizer import MasterMuon, schedule
from specdec.training.own_text import own_text

if TYPE_CHECKING:
    from specdec.engine import Engine

REPORT = "training.json"
Model: TypeAlias = GPT | PreTrainedModel


@dataclass(frozen=True)
class HeadSettings:
    """How to train a head. Budgets: ``max_tokens`` learned from, ``max_seconds``; 0 is no limit.

    Batches are ``rows`` of ``sequence_length`` tokens; 0 rows for few (``batch_rows``), which teaches most. on_policy: share
    of the budget spent, at the end, on text of the target's own. evaluations: how often to decode on the way; the head
    that did best is kept. draft_tokens: how many tokens drafts of these decodes have. clip: of the gradient's norm.
    """

    max_tokens: int = 0
    max_seconds: float = 0.0
    rows: int = 0
    sequence_length: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.02
    clip: float = 1.0
    on_policy: float = 0.0
    evaluations: int = 5
    evaluation_prompts: int = 8
    draft_tokens: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 128
    prompts_per_round: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.max_tokens > 0 or self.max_seconds > 0):
            raise ConfigError("training a head needs a budget: max_seconds or max_tokens must be more than 0")
        if not 0 <= self.on_policy <= 1 or not 0 <= self.warmup < 1:
            raise ConfigError(f"on_policy and warmup are shares from 0 to 1, got {self.on_policy} and {self.warmup}")
        if not 0 < self.learning_rate < 1 or self.clip < 0:
            raise ConfigError(
                f"learning_rate must be between 0 and 1 and clip >= 0, got {self.learning_rate} and {self.clip}"
            )
        if self.rows < 0:
            raise ConfigError(f"rows must be >= 0, got {self.rows}")
        for name in ("evaluations", "evaluation_prompts", "draft_tokens", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.sequence_length < 16:
            raise ConfigError(f"sequence_length must be >= 16, got {self.sequence_length}")


@dataclass(frozen=True)
class Evaluation:
    """After learning from ``tokens``: tokens per target pass of decodes of held-out prompts, greedy and at temperature 1.

    ``loss`` is the mean since the evaluation before.
    """

    tokens: int
    seconds: float
    loss: float | None
    greedy_length: float
    sampled_length: float

    @property
    def length(self) -> float:
        """Both together."""
        return self.greedy_length + self.sampled_length


@dataclass
class HeadReport:
    """What came out; ``evaluations[0]`` is before the first step, ``best`` the index of the head that was kept."""

    settings: HeadSettings
    parameters: int
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int = 0

    def table(self, title: str) -> Table:
        """What the evaluations found, for people."""
        table = Table("tokens", "loss", "accepted length, greedy", "T=1", title=title)
        for i, e in enumerate(self.evaluations):
            loss = "" if e.loss is None else f"{e.loss:.3f}"
            style = "bold green" if i == self.best else None
            table.add_row(f"{e.tokens:,}", loss, f"{e.greedy_length:.2f}", f"{e.sampled_length:.2f}", style=style)
        return table


class Reader:
    """A frozen target: what some of its layers put out for text, and its logits."""

    def __init__(self, model: Model, layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)

    @torch.no_grad()  # not inference mode: the head's gradients need these tensors
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, len(layers) * H] and logits [B, T, V] of tokens [B, T]."""
        if not isinstance(self.model, GPT):
            output = self.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
            return torch.cat([output.hidden_states[layer + 1] for layer in self.layers], dim=-1), output.logits
        found: dict[int, Tensor] = {}

        def catch(layer: int, module: nn.Module, inputs: object, output: Tensor) -> None:
            found[layer] = output

        hooks = [self.model.layers[layer].register_forward_hook(partial(catch, layer)) for layer in self.layers]
        try:
            logits: Tensor = self.model.lm_head(self.model(tokens))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([found[layer] for layer in self.layers], dim=-1), logits


def train_head(
    target: Model,
    head: FeatureHead,
    tokenizer: PreTrainedTokenizerFast,
    corpus: data.Corpus,
    out: Path,
    settings: HeadSettings,
    *,
    engine: Callable[[FeatureHead], Engine],
    progress: bool = True,
) -> HeadReport:
    """Train ``head`` for ``target`` and keep the best one so far in ``out``, which appears whole or not at all.

    ``engine`` makes the engine of the target and a head, for evaluations and the target's own text. The target is in eval
    mode and shares its embedding with the head. Ctrl-C and SIGTERM end the run after an evaluation. Raises ``ConfigError``
    when the text is too short, ``ModelError`` when a loss is not finite.
    """
    console = Console(stderr=True, quiet=not progress)
    columns = (TextColumn("training a head"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    run = HeadTraining(target, head, tokenizer, corpus, out, settings, engine)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, said="")
        run.loop(lambda done, said: bar.update(task, completed=done, said=said))
    return run.report


class HeadTraining:
    """One run: target, head, its optimiser, its text, and the clock."""

    def __init__(
        self, target: Model, head: FeatureHead, tokenizer: PreTrainedTokenizerFast, corpus: data.Corpus, out: Path,
        settings: HeadSettings, engine: Callable[[FeatureHead], Engine],
    ) -> None:  # fmt: skip
        self.reader, self.head, self.out, self.settings = Reader(target, head.layers), head, out, settings
        self.make_engine = engine
        weight = next(target.parameters())
        self.device = weight.device
        self.batch_rows = settings.rows or batch_rows(self.device)
        keep_freed_memory()
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16) else fast_dtype(self.device)
        torch.manual_seed(settings.seed)
        self.optimizer = MasterMuon(cast(GPT, head.to(self.device).train()), dtype, weight_decay=0.01)
        self.training = data.encode(tokenizer, corpus.training)
        least = max(settings.sequence_length, settings.prompt_tokens)
        if len(self.training) <= least:
            raise ConfigError(f"the text is too short: {len(self.training)} tokens, more than {least} are needed")
        count, length = settings.evaluation_prompts, settings.prompt_tokens
        self.prompts = data.held_out_prompts(tokenizer, corpus, count=count, tokens=length)
        trained = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
        self.report = HeadReport(settings, trained)
        self.start, self.tokens, self.step = time.monotonic(), 0, 0
        self.written: list[Tensor] = []
        self._losses: list[float] = []

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in tokens or in time, whichever is more."""
        settings = self.settings
        by_tokens = self.tokens / settings.max_tokens if settings.max_tokens else 0.0
        by_time = (time.monotonic() - self.start) / settings.max_seconds if settings.max_seconds else 0.0
        return min(max(by_tokens, by_time), 1.0)

    def loop(self, say: Callable[[float, str], None]) -> None:
        """Train until the budget is spent, keeping the best head."""
        self.evaluate()
        self.start = time.monotonic()
        with Interrupt() as interrupt:
            while (progress := self.progress) < 1 and interrupt.received is None:
                loss, figures = self.train_step(progress)
                last, length = self.report.evaluations[-1], figures.get("mean_acceptance_length", 0.0)
                said = f"loss {loss:.3f}, accepted length {length:.2f}, decoding {last.greedy_length:.2f}"
                say(progress, f"{said} / {last.sampled_length:.2f}")
                if self.progress * self.settings.evaluations >= len(self.report.evaluations):
                    self.evaluate()
            if interrupt.received is not None:
                self.evaluate()
                interrupt.end_program()

    def train_step(self, progress: float) -> tuple[float, dict[str, float]]:
        """One update at ``progress`` of the schedule; its loss and figures. Raises ModelError, with no weight changed."""
        settings = self.settings
        on_policy = progress >= 1 - settings.on_policy
        tokens, begin = self.own_text() if on_policy else (self.given_text(), 0)
        tokens = tokens.to(self.device)
        loss, figures = self.head.loss(tokens, *self.reader.read(tokens), begin)
        loss.backward()
        norm = self.optimizer.gather_gradients()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise ModelError(
                f"training the head diverged at step {self.step}: loss {loss.item()}, gradient norm {norm.item()}; "
                "lower learning_rate"
            )
        rate = settings.learning_rate * schedule(progress, warmup=settings.warmup, final=0.02)
        self.optimizer.step(rate, norm, settings.clip)
        self.tokens += len(tokens) * (tokens.shape[1] - begin)
        self.step += 1
        self._losses.append(loss.item())
        return loss.item(), figures

    def given_text(self) -> Tensor:
        """Windows [B, T] of the training text."""
        settings = self.settings
        shape = {"rows": self.batch_rows, "length": settings.sequence_length - 1}
        return data.batch(self.training, seed=settings.seed, step=self.step, **shape)

    def own_text(self) -> tuple[Tensor, int]:
        """Rows [B, T] that the target wrote after prompts of the training text, which end with the token of that number."""
        settings = self.settings
        if not self.written:
            count, length = max(settings.prompts_per_round, self.batch_rows), settings.prompt_tokens
            prompts = data.batch(self.training, rows=count, length=length - 1, seed=settings.seed + 1, step=self.step)
            lengths = {"new_tokens": settings.new_tokens, "draft_tokens": settings.draft_tokens}
            self.written = list(own_text(self.engine(), prompts, seed=self.step, **lengths).split(self.batch_rows))
        return self.written.pop(), settings.prompt_tokens - 1

    def engine(self) -> Engine:
        """The target and the head as it is now."""
        return self.make_engine(self.head)

    def evaluate(self) -> Evaluation:
        """Decode held-out prompts; keep the head if it is the best so far."""
        settings, lengths, engine = self.settings, [], self.engine()
        for temperature in (0.0, 1.0):
            output = engine.generate(
                self.prompts, max_new_tokens=settings.new_tokens // 2, temperature=temperature, seed=0,
                num_draft_tokens=settings.draft_tokens, eos_token_id=None,
            )  # fmt: skip
            lengths.append(output.stats.mean_acceptance_length)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses = []
        found = Evaluation(self.tokens, round(time.monotonic() - self.start, 1), loss, lengths[0], lengths[1])
        history = self.report.evaluations
        history.append(found)
        if len(history) == 1 or found.length >= history[self.report.best].length:
            self.report.best = len(history) - 1
            files.write_folder(self.out, self._write)
        return found

    def _write(self, folder: Path) -> None:
        self.head.save(folder)
        (folder / REPORT).write_text(json.dumps(asdict(self.report), indent=1) + "\n", encoding="utf-8")
