"""A draft for a target that exists: it learns to be accepted, first on given text, then on what the target writes.

The target's own text is what a draft will meet, and it costs little here: our engine writes it, speculating with the
draft that is being trained, so that it comes faster as the draft gets better (Zhou et al. 2024, DistillSpec, arXiv
2310.08461).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.checkpoints import load_lm, load_model
from specdec.drafters.model import ModelDrafter
from specdec.drafters.tokenmap import TokenMap, most_frequent
from specdec.drafters.vocabularies import mapped_drafter
from specdec.engine import Engine
from specdec.errors import ConfigError, ModelError
from specdec.lm.base import CachedLM
from specdec.lm.native import native_lm
from specdec.machine import batch_rows, fast_dtype
from specdec.nn.divergences import DIVERGENCES
from specdec.nn.gpt import GPT
from specdec.places import check_apart, check_folder
from specdec.training import checkpoint as files
from specdec.training import data
from specdec.training.cards import DISTILLED, draft_card
from specdec.training.distill_recipe import REPORT, DistillReport, DistillSettings, Evaluation, read_report
from specdec.training.interrupt import Interrupt
from specdec.training.losses import Teacher, acceptance, distillation_loss, length_weights
from specdec.training.memory import keep_freed_memory
from specdec.training.optimizer import MasterAdamW, schedule
from specdec.training.own_text import own_text
from specdec.training.shapes import initialise, new_draft


def distill_checkpoint(
    target: str,
    out: Path,
    text: str,
    settings: DistillSettings,
    *,
    dtype: str = "auto",
    device: str = "auto",
    resume: bool = True,
) -> DistillReport:
    """``distill`` for a directory or hub id, on "stdlib" or the text below a path; raises what ``load`` raises."""
    check_apart(target, out)
    output_folder(out, resume=resume)
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    if not isinstance(model, GPT | PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"{target} must be a causal language model with a fast tokenizer (tokenizer.json)")
    corpus = data.gather("stdlib") if text == "stdlib" else data.gather("path", Path(text))
    return distill(model, tokenizer, corpus, out, settings, name=Path(target).name, resume=resume)


def distill(
    target: PreTrainedModel | GPT,
    tokenizer: PreTrainedTokenizerFast,
    corpus: data.Corpus,
    out: Path,
    settings: DistillSettings,
    *,
    name: str = "the target",
    progress: bool = True,
    resume: bool = True,
) -> DistillReport:
    """Train a draft for ``target`` and save it, with its tokenizer, in ``out``; the best one so far at any time.

    ``name`` is what the model card calls the target. Ctrl-C and SIGTERM save a checkpoint (in OUT-checkpoints) before
    they end the run, and the same call goes on from it; a finished run is returned as it is; ``resume=False`` starts
    over. Raises ``ConfigError`` when ``out`` holds something else or the text is too short, ``CheckpointError`` when the
    checkpoints are damaged, ``ModelError`` when a loss is not finite.
    """
    out = output_folder(out, resume=resume)
    console = Console(stderr=True, quiet=not progress)
    columns = (TextColumn("distilling"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with evaluating(target), Progress(*columns, console=console) as bar:
        run = Distillation(target, tokenizer, corpus, settings, out, name)
        if resume and (finished := run.finished()) is not None:
            return finished
        run.begin(partial(bar.console.print, markup=False), resume=resume)
        task = bar.add_task("", total=1.0, said="")
        run.loop(lambda done, said: bar.update(task, completed=done, said=said))
    return run.report


def output_folder(out: Path, *, resume: bool) -> Path:
    """``out``, links followed. Raises ``ConfigError`` where drafts cannot be written, or would delete something else."""
    out = check_folder(out)
    if not (resume and beside(out, REPORT).exists()):  # else the run is finished, and nothing is written
        files.refuse_others(out, _is_distilled)
    return out


def _is_distilled(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and DISTILLED in card.read_text(encoding="utf-8", errors="replace")


def beside(out: Path, what: str) -> Path:
    """The place next to the folder of a draft for what else its run keeps."""
    return out.with_name(f"{out.name}-{what}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards as it was given."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Distillation:
    """One run: target, draft, its optimiser, and the text that the target has written. The target is in eval mode."""

    def __init__(
        self,
        target: PreTrainedModel | GPT,
        tokenizer: PreTrainedTokenizerFast,
        corpus: data.Corpus,
        settings: DistillSettings,
        out: Path,
        name: str = "the target",
    ) -> None:
        self.target, self.tokenizer, self.settings = target, tokenizer, settings
        self.out, self.name = out, name
        self.folder, self.report_file = beside(out, "checkpoints"), beside(out, REPORT)
        self.target_lm: CachedLM = load_lm(target)
        self.device = self.target_lm.device
        self.batch_rows = settings.rows or batch_rows(self.device)
        torch.manual_seed(settings.seed)
        self.training = self._encode(corpus.training)
        vocab_size, end = self.target_lm.vocab_size, tokenizer.eos_token_id
        self.token_map = self._trimmed(vocab_size, end)
        if self.token_map is not None:
            vocab_size, end = len(self.token_map.to_target), None if end is None else self.token_map.lists[1][end]
        self.draft = new_draft(target.config, settings.shape, vocab_size, end, settings.context).to(self.device)
        initialised = initialise(self.draft, target, None if self.token_map is None else self.token_map.to_target)
        keep_freed_memory()
        self.optimizer = MasterAdamW(self.draft.train(), fast_dtype(self.device), weight_decay=0.01)
        self.held_out = self._encode(corpus.held_out)
        count, length = settings.evaluation_prompts, settings.prompt_tokens
        self.prompts = data.held_out_prompts(tokenizer, corpus, count=count, tokens=length)
        parameters = sum(weight.numel() for weight in self.draft.parameters())
        self.report = DistillReport(settings, self._identity(corpus), initialised, parameters)
        self.start, self.tokens, self.step = time.monotonic(), 0, 0
        self.written: list[Tensor] = []

    def _encode(self, documents: tuple[data.Document, ...]) -> Tensor:
        tokens = data.encode(self.tokenizer, documents)
        least = max(self.settings.sequence_length, self.settings.prompt_tokens) + 1
        if len(tokens) <= least:
            raise ConfigError(f"the text is too short: {len(tokens)} tokens, more than {least} are needed; add text")
        return tokens

    def _trimmed(self, vocab_size: int, end: int | None) -> TokenMap | None:
        """The vocabulary of a draft that has only the most frequent tokens of the training text."""
        size = self.settings.draft_vocab_size
        if not size:
            return None
        if size >= vocab_size:
            raise ConfigError(f"draft_vocab_size must be below the target's {vocab_size}, got {size}; 0 keeps them all")
        chosen = most_frequent(self.training, size, [] if end is None else [end])
        return TokenMap.of(chosen, vocab_size).to(self.device)

    def _own(self, tokens: Tensor) -> Tensor:
        """The target's ids as the draft's."""
        return tokens if self.token_map is None else self.token_map.to_draft[tokens]

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in tokens or in time, whichever is more."""
        settings = self.settings
        by_tokens = self.tokens / settings.max_tokens if settings.max_tokens else 0.0
        by_time = (time.monotonic() - self.start) / settings.max_seconds if settings.max_seconds else 0.0
        return min(max(by_tokens, by_time), 1.0)

    def loop(self, say: Callable[[float, str], None]) -> None:
        """Train until the budget is spent or nothing is won any more, keeping the best draft."""
        every = self.settings.evaluate_every
        if not self.report.evaluations:
            self.evaluate()
        with Interrupt() as interrupt:
            while (progress := self.progress) < 1 and not self.report.stopped_early:
                if interrupt.received is not None:
                    self.save()
                    interrupt.end_program()
                on_policy = progress >= 1 - self.settings.on_policy
                before = self.tokens
                loss = self.train_step(*(self.own_text() if on_policy else self.given_text()), progress)
                last = self.report.evaluations[-1]
                say(progress, f"loss {loss:.3f}, accepted length {last.greedy_length:.2f} / {last.sampled_length:.2f}")
                if self.tokens // every > before // every or self.progress >= 1:
                    self.evaluate()
                    self.save()
        files.write_text(self.report_file, json.dumps(asdict(self.report), indent=1) + "\n")
        files.clear_checkpoints(self.folder)

    def given_text(self) -> tuple[Tensor, int]:
        """Windows [B, T + 1] of the training text, all of whose positions are learned."""
        settings = self.settings
        shape = {"rows": self.batch_rows, "length": settings.sequence_length}
        return data.batch(self.training, seed=settings.seed, step=self.step, **shape), 0

    def own_text(self) -> tuple[Tensor, int]:
        """Rows [B, P + N] that the target wrote after prompts of P tokens, which are not learned."""
        if not self.written:
            self.written = list(self._write().split(self.batch_rows))
        return self.written.pop(), self.settings.prompt_tokens - 1

    def _write(self) -> Tensor:
        """A round of the target's text, half of it greedy and half sampled, in random order."""
        settings = self.settings
        count, length = settings.prompts_per_round, settings.prompt_tokens
        prompts = data.batch(self.training, rows=count, length=length - 1, seed=settings.seed + 1, step=self.step)
        return own_text(
            self.engine(), prompts, new_tokens=settings.new_tokens, draft_tokens=settings.draft_tokens, seed=self.step
        )

    def engine(self) -> Engine:
        """Target and the draft as it is now."""
        lm = native_lm(self.draft)
        return Engine(
            self.target_lm, ModelDrafter(lm) if self.token_map is None else mapped_drafter(lm, self.token_map)
        )

    def train_step(self, rows: Tensor, learned_from: int, progress: float) -> float:
        """One update on rows [B, T + 1], from position ``learned_from`` on; the loss. Raises ModelError, unchanged."""
        settings = self.settings
        tokens = rows.to(self.device)
        hidden = self.draft(self._own(tokens[:, :-1]))[:, learned_from:]
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
            labels = self._own(tokens[:, learned_from + 1 :]).flatten()
            unknown = -100 if self.token_map is None else len(head) - 1  # never to be proposed
            return nn.functional.cross_entropy(nn.functional.linear(flat, head).float(), labels, ignore_index=unknown)
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
        """In the draft's ids: where it has fewer, the target's law given that one of these follows."""
        if isinstance(self.target, GPT):
            logits: Tensor = self.target.lm_head(self.target(tokens))
        else:
            logits = self.target(input_ids=tokens, use_cache=False).logits
        return logits if self.token_map is None else self.token_map.gather(logits)

    def evaluate(self) -> Evaluation:
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
            files.save_pretrained(
                self.optimizer.snapshot(), self.tokenizer, self.out, self._card(found), self.token_map
            )
        patience = settings.patience
        self.report.stopped_early = bool(patience) and len(history) - 1 - self.report.best >= patience
        return found

    @torch.no_grad()
    def _held_out_alpha(self) -> float:
        length = self.settings.sequence_length
        found = [
            acceptance(
                self.draft(self._own(row[None, :-1])).flatten(0, 1),
                self.draft.lm_head.weight,
                self._teacher(row[None, :-1], 0),
            )
            for row in data.windows(self.held_out, length=length, limit=8).to(self.device)
        ]
        return float(torch.cat(found).mean())

    def finished(self) -> DistillReport | None:
        """The report of a finished run in the output folder, whose draft is intact; None when there is none."""
        if not self.report_file.exists():
            return None
        report = read_report(self.report_file)
        self._check_identity(report.identity)
        files.verify_folder(self.out)
        return report

    def begin(self, say: Callable[[str], None], *, resume: bool) -> None:
        """Continue from the newest intact checkpoint, if there is one; without ``resume`` remove what is there."""
        if not resume:
            self.report_file.unlink(missing_ok=True)
            files.clear_checkpoints(self.folder)
            return
        checkpoint = files.load_checkpoint(self.folder, say)
        if checkpoint is None:
            return
        meta, state = checkpoint.meta, checkpoint.state
        self._check_identity(meta.identity)
        self.written = list(state.pop("written").split(self.batch_rows)) if "written" in state else []
        self.optimizer.load(state)
        self.step, self.tokens, self.start = meta.step, meta.notes["tokens"], self.start - meta.seconds
        self.report.best = meta.notes["best"]
        self.report.evaluations = [Evaluation(**one) for one in meta.notes["evaluations"]]
        say(f"continuing from step {self.step} in {self.folder}")

    def save(self) -> None:
        """Write a checkpoint."""
        state = self.optimizer.state()
        if self.written:
            state["written"] = torch.cat(self.written)
        notes = {
            "tokens": self.tokens,
            "best": self.report.best,
            "evaluations": [asdict(evaluation) for evaluation in self.report.evaluations],
        }
        dtype = str(self.draft.embed_tokens.weight.dtype).removeprefix("torch.")
        seconds = time.monotonic() - self.start
        meta = files.Meta(self.report.identity, self.step, seconds, dtype, notes=notes)
        files.save_checkpoint(self.folder, files.Checkpoint(meta, state))

    def _identity(self, corpus: data.Corpus) -> str:
        """Of everything that the draft depends on."""
        given = json.dumps([asdict(self.settings), corpus.fingerprint(), self.target.config.to_dict()], default=str)
        with torch.no_grad():
            sums = [float(weight.sum(dtype=torch.float32)) for weight in self.target.parameters()]
        return hashlib.sha256(f"{given} {sums}".encode()).hexdigest()

    def _check_identity(self, found: str) -> None:
        if found != self.report.identity:
            raise ConfigError(
                f"{self.out} belongs to a draft for another target, of other settings or other text; choose another "
                "folder, or distill with resume=False (--fresh) to replace it"
            )

    def _card(self, found: Evaluation) -> str:
        settings = self.settings
        share = (
            f"; the last {settings.on_policy:.0%} of the time on text of the target's own" if settings.on_policy else ""
        )
        figures = [
            ("tokens per target pass, greedy", f"{found.greedy_length:.2f}"),
            ("tokens per target pass, temperature 1", f"{found.sampled_length:.2f}"),
            ("probability that one drafted token is accepted at temperature 1", f"{found.alpha:.1%}"),
            ("tokens per draft", str(settings.draft_tokens)),
        ]
        trained = f"{found.tokens:,} tokens of text in {found.seconds:,.0f} s, with the loss `{settings.loss}`{share}."
        kind = "A Llama-style" if isinstance(self.draft, GPT) else "An LSTM"
        return draft_card(self.name, kind, self.report.draft_parameters, trained, figures)
