"""A draft for a target that exists: it learns to be accepted, first on given text, then on what the target writes.

The target's own text is what a draft will meet, and it costs little here: our engine writes it, speculating with the
draft that is being trained, so that it comes faster as the draft gets better (Zhou et al. 2024, DistillSpec, arXiv
2310.08461).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.drafters.model import ModelDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError, ModelError
from specdec.lm.base import CachedLM
from specdec.lm.native import NativeLM
from specdec.load import load_lm, load_model
from specdec.nn.gpt import GPT
from specdec.training import checkpoint as files
from specdec.training import data
from specdec.training.losses import DIVERGENCES, Teacher, acceptance, distillation_loss, length_weights
from specdec.training.optimizer import MasterAdamW, fast_dtype, schedule
from specdec.training.shapes import SHAPES, draft_config, initialise

REPORT = "distill.json"


@dataclass(frozen=True)
class DistillSettings:
    """How to train the draft. Budgets: ``max_tokens`` positions learned from, ``max_seconds``; 0 is no limit.

    shape: "wide" (the target's width, a quarter of its layers: begins as some of the target's layers where they are
    built like ours), "small" (half the width) or "tiny" (a quarter, one layer).
    loss: one of ``losses.DIVERGENCES``, or "cross_entropy" (the text alone, no teacher).
    draft_tokens: how many tokens the draft will propose; positions count by what they add to the accepted length.
    teacher_entries: how many of the target's probabilities to keep per position, 0 for all.
    on_policy: share of the budget spent, at the end, on text of the target.
    patience: evaluations without a rise of the accepted length that end the run; 0 never does.
    """

    shape: str = "small"
    loss: str = "lk_hybrid"
    weigh_positions: bool = True
    draft_tokens: int = 4
    teacher_entries: int = 0
    on_policy: float = 0.5
    max_tokens: int = 0
    max_seconds: float = 0.0
    rows: int = 4
    sequence_length: int = 256
    prompt_tokens: int = 64
    new_tokens: int = 128
    prompts_per_round: int = 32
    learning_rate: float = 1e-3
    evaluate_every: int = 100_000
    evaluation_prompts: int = 8
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        losses = [*DIVERGENCES, "cross_entropy"]
        _allowed("shape", self.shape, self.shape in SHAPES, f"one of {', '.join(SHAPES)}")
        _allowed("loss", self.loss, self.loss in losses, f"one of {', '.join(losses)}")
        _allowed("on_policy", self.on_policy, 0 <= self.on_policy <= 1, "from 0 to 1")
        _allowed("learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "between 0 and 1")
        for name in ("draft_tokens", "rows", "prompt_tokens", "new_tokens", "prompts_per_round", "evaluation_prompts"):
            _allowed(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("max_tokens", "max_seconds", "teacher_entries", "patience"):
            _allowed(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        _allowed("max_tokens", self.max_tokens, self.max_tokens or self.max_seconds, "> 0 if max_seconds is 0")
        _allowed("evaluate_every", self.evaluate_every, self.evaluate_every >= 1, ">= 1")
        _allowed("sequence_length", self.sequence_length, self.sequence_length >= 8, ">= 8")


def _allowed(name: str, value: object, condition: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


@dataclass
class Evaluation:
    """After ``tokens`` positions: mean accepted length of decodes of held-out prompts, and alpha on held-out text."""

    tokens: int
    seconds: float
    greedy_length: float
    sampled_length: float
    alpha: float


@dataclass
class DistillReport:
    """What came out; ``evaluations[0]`` is before the first step, ``best`` the index of the draft that was kept."""

    settings: DistillSettings
    initialised: list[str]
    draft_parameters: int
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int = 0
    stopped_early: bool = False


def distill_checkpoint(
    target: str, out: Path, text: str, settings: DistillSettings, *, dtype: str = "auto", device: str = "auto"
) -> DistillReport:
    """``distill`` for a directory or hub id, on "stdlib" or the text below a path; raises what ``load`` raises."""
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    if not isinstance(model, GPT | PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"{target} must be a causal language model with a fast tokenizer (tokenizer.json)")
    corpus = data.gather("stdlib") if text == "stdlib" else data.gather("path", Path(text))
    return distill(model, tokenizer, corpus, out, settings)


def distill(
    target: PreTrainedModel | GPT,
    tokenizer: PreTrainedTokenizerFast,
    corpus: data.Corpus,
    out: Path,
    settings: DistillSettings,
    *,
    progress: bool = True,
) -> DistillReport:
    """Train a draft for ``target`` and save it, with its tokenizer, in ``out``; the best one so far at any time.

    Raises ``ConfigError`` when ``out`` holds something else or the text is too short, ``ModelError`` when a loss is not
    finite.
    """
    if (out / "config.json").exists() and not (out / files.MANIFEST).exists():
        raise ConfigError(f"{out} exists and was not written by a training run; choose another output folder")
    run = Distillation(target, tokenizer, corpus, settings)
    console = Console(stderr=True, quiet=not progress)
    columns = (TextColumn("distilling"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, said="")
        run.loop(out, lambda done, said: bar.update(task, completed=done, said=said))
    return run.report


class Distillation:
    """One run: target, draft, its optimiser, and the text that the target has written."""

    def __init__(
        self,
        target: PreTrainedModel | GPT,
        tokenizer: PreTrainedTokenizerFast,
        corpus: data.Corpus,
        settings: DistillSettings,
    ) -> None:
        self.target, self.tokenizer, self.settings = target.eval(), tokenizer, settings
        self.target_lm: CachedLM = load_lm(target)
        self.device = self.target_lm.device
        torch.manual_seed(settings.seed)
        config = draft_config(target.config, settings.shape, self.target_lm.vocab_size, tokenizer.eos_token_id)
        self.draft = GPT(config).to(self.device)
        initialised = initialise(self.draft, target)
        self.optimizer = MasterAdamW(self.draft.train(), fast_dtype(self.device), weight_decay=0.01)
        self.training = self._encode(corpus.training)
        self.held_out = self._encode(corpus.held_out)
        count, length = settings.evaluation_prompts, settings.prompt_tokens
        self.prompts = data.held_out_prompts(tokenizer, corpus, count=count, tokens=length)
        parameters = sum(weight.numel() for weight in self.draft.parameters())
        self.report = DistillReport(settings, initialised, parameters)
        self.start, self.tokens, self.step = time.monotonic(), 0, 0
        self.written: list[Tensor] = []

    def _encode(self, documents: tuple[data.Document, ...]) -> Tensor:
        tokens = data.encode(self.tokenizer, documents)
        least = max(self.settings.sequence_length, self.settings.prompt_tokens) + 1
        if len(tokens) <= least:
            raise ConfigError(f"the text is too short: {len(tokens)} tokens, more than {least} are needed; add text")
        return tokens

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in tokens or in time, whichever is more."""
        settings = self.settings
        by_tokens = self.tokens / settings.max_tokens if settings.max_tokens else 0.0
        by_time = (time.monotonic() - self.start) / settings.max_seconds if settings.max_seconds else 0.0
        return min(max(by_tokens, by_time), 1.0)

    def loop(self, out: Path, say: Callable[[float, str], None]) -> None:
        """Train until the budget is spent or nothing is won any more, keeping the best draft in ``out``."""
        self.evaluate(out)
        due = self.settings.evaluate_every
        while (progress := self.progress) < 1:
            on_policy = progress >= 1 - self.settings.on_policy
            loss = self.train_step(*(self.own_text() if on_policy else self.given_text()), progress)
            last = self.report.evaluations[-1]
            say(progress, f"loss {loss:.3f}, accepted length {last.greedy_length:.2f} / {last.sampled_length:.2f}")
            if self.tokens >= due or self.progress >= 1:
                due += self.settings.evaluate_every
                self.evaluate(out)
                patience = self.settings.patience
                if patience and len(self.report.evaluations) - 1 - self.report.best >= patience:
                    self.report.stopped_early = True
                    break
        self._write_report(out)

    def given_text(self) -> tuple[Tensor, int]:
        """Windows [B, T + 1] of the training text, all of whose positions are learned."""
        settings = self.settings
        shape = {"rows": settings.rows, "length": settings.sequence_length}
        return data.batch(self.training, seed=settings.seed, step=self.step, **shape), 0

    def own_text(self) -> tuple[Tensor, int]:
        """Rows [B, P + N] that the target wrote after prompts of P tokens, which are not learned."""
        if not self.written:
            self.written = list(self._write().split(self.settings.rows))
        return self.written.pop(), self.settings.prompt_tokens - 1

    def _write(self) -> Tensor:
        """A round of the target's text, half of it greedy and half sampled, in random order."""
        settings = self.settings
        count, length = settings.prompts_per_round, settings.prompt_tokens
        prompts = data.batch(self.training, rows=count, length=length - 1, seed=settings.seed + 1, step=self.step)
        output = self.engine().generate(
            prompts.tolist(),
            max_new_tokens=settings.new_tokens,
            temperature=[i % 2 for i in range(count)],
            num_draft_tokens=settings.draft_tokens,
            eos_token_id=None,
            seed=self.step,
        )
        texts = torch.cat([prompts, torch.tensor(output.token_ids)], dim=1)
        return texts[torch.randperm(count, generator=torch.Generator().manual_seed(self.step))]

    def engine(self) -> Engine:
        """Target and the draft as it is now."""
        return Engine(self.target_lm, ModelDrafter(NativeLM(self.draft)))

    def train_step(self, rows: Tensor, learned_from: int, progress: float) -> float:
        """One update on rows [B, T + 1], from position ``learned_from`` on; the loss. Raises ModelError, unchanged."""
        settings = self.settings
        tokens = rows.to(self.device)
        hidden = self.draft(tokens[:, :-1])[:, learned_from:]
        loss = self._loss(hidden, tokens, learned_from)
        loss.backward()
        norm = self.optimizer.gather_gradients()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise ModelError(
                f"distillation diverged at step {self.step}: loss {loss.item()}, gradient norm {norm.item()}; "
                "lower learning_rate"
            )
        rate = settings.learning_rate * schedule(progress, warmup=0.02, final=0.02)
        self.optimizer.step(rate, norm, 1.0)
        self.tokens += hidden.shape[0] * hidden.shape[1]
        self.step += 1
        return loss.item()

    def _loss(self, hidden: Tensor, tokens: Tensor, learned_from: int) -> Tensor:
        flat, head = hidden.flatten(0, 1), self.draft.lm_head.weight
        if self.settings.loss == "cross_entropy":
            labels = tokens[:, learned_from + 1 :].flatten()
            return nn.functional.cross_entropy(nn.functional.linear(flat, head).float(), labels)
        teacher = self._teacher(tokens[:, :-1], learned_from)
        weights = torch.ones(len(flat), device=self.device)
        if self.settings.weigh_positions:
            alpha = acceptance(flat, head, teacher).view(hidden.shape[:2])
            weights = length_weights(alpha, self.settings.draft_tokens).flatten()
        return distillation_loss(flat, head, teacher, weights, DIVERGENCES[self.settings.loss])

    @torch.no_grad()
    def _teacher(self, tokens: Tensor, learned_from: int) -> Teacher:
        parts = [
            Teacher.of(self._target_logits(row[None])[0, learned_from:], self.settings.teacher_entries)
            for row in tokens
        ]
        ids = None if parts[0].ids is None else torch.cat([part.ids for part in parts if part.ids is not None])
        return Teacher(torch.cat([part.probs for part in parts]), ids)

    def _target_logits(self, tokens: Tensor) -> Tensor:
        if isinstance(self.target, GPT):
            return self.target.lm_head(self.target(tokens))
        logits: Tensor = self.target(input_ids=tokens, use_cache=False).logits
        return logits

    def evaluate(self, out: Path) -> Evaluation:
        """Measure the draft on held-out prompts and text; save it if it is the best so far."""
        settings = self.settings
        lengths = []
        for temperature in (0.0, 1.0):
            output = self.engine().generate(
                self.prompts, max_new_tokens=settings.new_tokens // 2, temperature=temperature, seed=0,
                num_draft_tokens=settings.draft_tokens, eos_token_id=None,
            )  # fmt: skip
            lengths.append(output.stats.mean_acceptance_length)
        seconds = round(time.monotonic() - self.start, 1)
        found = Evaluation(self.tokens, seconds, lengths[0], lengths[1], self._held_out_alpha())
        history = self.report.evaluations
        history.append(found)
        best = history[self.report.best]
        if len(history) == 1 or sum(lengths) > best.greedy_length + best.sampled_length:
            self.report.best = len(history) - 1
            files.save_pretrained(self.draft, self.tokenizer, out)
        return found

    @torch.no_grad()
    def _held_out_alpha(self) -> float:
        length = self.settings.sequence_length
        found = [
            acceptance(
                self.draft(row[None, :-1]).flatten(0, 1), self.draft.lm_head.weight, self._teacher(row[None, :-1], 0)
            )
            for row in data.windows(self.held_out, length=length, limit=8).to(self.device)
        ]
        return float(torch.cat(found).mean())

    def _write_report(self, out: Path) -> None:
        files.write_text(out.parent / f"{out.name}-{REPORT}", json.dumps(asdict(self.report), indent=1) + "\n")
