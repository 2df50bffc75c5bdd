"""Training a target and its draft together: one pass over the text, the same batches, all positions in parallel.

The draft learns from the target's logits of the same step, so it needs no second run and no stored logits; it follows
a moving teacher, which costs little because both end their schedules together.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.errors import CheckpointError, ConfigError, ModelError
from specdec.machine import fast_dtype
from specdec.nn.gpt import GPT
from specdec.nn.lstm import LSTM, Trainable
from specdec.places import check_folder
from specdec.training import checkpoint as files
from specdec.training import data
from specdec.training.cards import pair_card
from specdec.training.interrupt import Interrupt
from specdec.training.journal import Journal
from specdec.training.memory import keep_freed_memory
from specdec.training.objective import Pair, agreement
from specdec.training.optimizer import MasterAdamW, schedule
from specdec.training.parallel import Parallel
from specdec.training.progress import TrainingProgress
from specdec.training.recipe import Recipe, ShapeRecipe
from specdec.training.report import CURVES, LOG, REPORT, TENSORBOARD, TrainReport, read_report

EVALUATION_TOKENS = 8_192  # held-out tokens: a standard error of about 0.5 % on the agreement, in a few seconds
DECODED_PROMPTS, DECODED_TOKENS = 8, 64  # of the real decode of an evaluation, context permitting
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")

Decode = Callable[[Trainable, Trainable, list[list[int]], int], float]
"""(target, draft, prompts, new tokens per prompt) -> mean acceptance length of a real greedy decode."""


def train(
    recipe: Recipe, out: Path, *, progress: bool = True, resume: bool = True, decode: Decode | None = None
) -> TrainReport:
    """Train the pair of ``recipe`` into ``out``/target and ``out``/draft; write report.json, log.jsonl and curves.png.

    An unfinished run is continued, a finished one is returned as it is; ``resume=False`` starts over. Ctrl-C and
    SIGTERM save a checkpoint before they end the run. ``decode`` is what evaluations measure accepted lengths with
    (``load.accepted_length``). Raises ConfigError when ``out`` belongs to another recipe or text, CheckpointError when
    its checkpoints are damaged, ModelError when a loss is not finite.
    """
    start = time.monotonic()
    check_folder(out)
    parallel = Parallel(recipe.train, out)
    with TrainingProgress(f"training {recipe.name}", visible=progress and parallel.main) as bar:
        source = asdict(recipe.data)
        corpus = data.gather(source.pop("source"), Path(path) if (path := source.pop("path")) else None, **source)
        identity = f"{recipe.fingerprint()[:32]}-{corpus.fingerprint()[:32]}"
        parallel.once(lambda: _prepare(out, resume))
        if (finished := parallel.once(lambda: _finished(out, identity))) is not None:
            bar.end(f"{recipe.name} is trained already, see {out}; --fresh trains it anew")
            return finished
        run = Run(recipe, corpus, identity, start, parallel, out, decode)
        run.resume(bar)
        try:
            run.loop(bar)
            report = run.finish()
        finally:
            run.journal.close()
            parallel.close()
        parallel.once(lambda: files.clear_checkpoints(run.folder))
        bar.say(
            f"{out}: target {report.target_loss:.3f}, draft {report.draft_loss:.3f} nats/token on held-out text; "
            f"they agree on {report.top1:.1%} of the most probable tokens"
        )
    return report


class Run:
    """One run's text, models, optimisers and clock."""

    def __init__(
        self, recipe: Recipe, corpus: data.Corpus, identity: str, start: float, parallel: Parallel, out: Path,
        decode: Decode | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.settings, self.identity = recipe, recipe.train, identity
        self.parallel, self.device, self.decode = parallel, parallel.device, decode
        self.out, self.folder = out, out / "checkpoints"
        context = min(recipe.target.max_position_embeddings, recipe.draft.max_position_embeddings)
        self.tokenizer = data.train_tokenizer(corpus.training, recipe.tokenizer.vocab_size, context)
        self.training = self._encode(corpus.training)
        self.held_out = self._encode(corpus.held_out)
        self.step, self.start, self.steps_here, self.skipped = 0, start, 0, 0
        self.tokenizer_hash = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        self.journal = Journal(out, parallel.accelerator, writes=parallel.main)
        asked = parallel.precision or self.settings.precision
        self._build(_DTYPES.get(asked) or fast_dtype(self.device))

    def _encode(self, documents: tuple[data.Document, ...]) -> Tensor:
        tokens = data.encode(self.tokenizer, documents)
        if len(tokens) <= self.settings.sequence_length:
            raise ConfigError(
                f"the text is too short: {len(tokens)} tokens, and a batch needs windows of "
                f"{self.settings.sequence_length + 1}; lower train.sequence_length or add text"
            )
        return tokens

    def _build(self, dtype: torch.dtype) -> None:
        keep_freed_memory()
        self.dtype = dtype
        torch.manual_seed(self.settings.seed)
        self.target, self.draft = (_model(shape, self.tokenizer) for shape in (self.recipe.target, self.recipe.draft))
        for model, device in zip((self.target, self.draft), self.parallel.devices, strict=True):
            model.to(device).train()
            if self.settings.compile:
                for layer in model.layers:
                    layer.compile()
        distillation, overlap = self.settings.distillation, self.parallel.overlap
        pair = Pair(self.target, self.draft, distillation=distillation, overlap=overlap)
        self.parallel.shard(pair, dtype)
        decay = self.settings.weight_decay
        rates = (self.settings.target_learning_rate, self.settings.draft_learning_rate)
        models = zip((self.target, self.draft), rates, strict=True)
        self.optimizers = [(MasterAdamW(model, dtype, weight_decay=decay), rate) for model, rate in models]
        self.pair = self.parallel.wrap(pair)
        if self.parallel.rank:  # the same weights everywhere, and dropout of one's own
            torch.manual_seed(self.settings.seed + self.parallel.rank)

    @property
    def seconds(self) -> float:
        """Time spent on this run, interrupted parts included."""
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in steps or in time, whichever is more."""
        by_steps = self.step / self.settings.max_steps if self.settings.max_steps else 0.0
        by_time = self.seconds / self.settings.max_seconds if self.settings.max_seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def loop(self, bar: TrainingProgress) -> None:
        """Train until the budget is spent, with checkpoints and evaluations on the way."""
        saved = evaluated = begin = time.monotonic()
        batch_tokens = self.settings.rows * self.settings.sequence_length
        with Interrupt() as interrupt:
            while True:
                now = time.monotonic()
                progress, stop, save, evaluate = self.parallel.agree(
                    self.progress,
                    interrupt.received is not None,
                    _due(self.settings.checkpoint_seconds, now - saved),
                    _due(self.settings.evaluate_seconds, now - evaluated),
                )
                if stop:
                    path = self.save()
                    bar.say(f"stopped at step {self.step}; run the same command again to continue from {path}")
                    interrupt.end_program()
                    raise SystemExit(0)  # the signal reached another process only
                if save:
                    self.save_if_possible(bar)
                    saved = time.monotonic()
                if progress >= 1:
                    break
                losses = self.train_step(progress)
                every = self.settings.evaluate_steps
                if evaluate or (every and self.step % every == 0):
                    self.evaluate()
                    evaluated = time.monotonic()
                speed = self.steps_here * batch_tokens / (time.monotonic() - begin)
                bar.update(self.progress, losses=losses, tokens_per_second=speed, seconds=self.seconds)
        if self.settings.checkpoint_seconds:  # whatever happens while the models are measured then costs no training
            self.save_if_possible(bar)

    def train_step(self, progress: float) -> tuple[float, float]:
        """One update of both models at ``progress`` of the schedule; their losses.

        A loss or gradient that is not finite changes no weight: its batch is skipped as often as the recipe allows, and
        is a ModelError from then on.
        """
        settings = self.settings
        losses, norms = self._gradients()
        if not all(map(math.isfinite, (*losses, *map(float, norms)))):
            self._skip(losses, norms)
            return losses
        factor = schedule(progress, warmup=settings.warmup, final=settings.final_learning_rate, decay=settings.decay)
        for (optimizer, rate), norm in zip(self.optimizers, norms, strict=True):
            optimizer.step(rate * factor, norm, settings.clip)
        self.step += 1
        self.steps_here += 1
        values = {"target_loss": losses[0], "draft_loss": losses[1], "rate": factor, "seconds": round(self.seconds, 2)}
        self.journal.update(self.step, values)
        return losses

    def _gradients(self) -> tuple[tuple[float, float], list[Tensor]]:
        """Losses of this step's batch over all processes, and the norms of their gradients, gathered."""
        settings = self.settings
        tokens = data.batch(
            self.training, rows=settings.rows, length=settings.sequence_length, seed=settings.seed, step=self.step
        )
        end = self.tokenizer.eos_token_id if settings.separate_documents else None
        learned = tokens[:, :-1].numel() if end is None else int((tokens[:, :-1] != end).sum())
        total = torch.zeros(2, device=self.device)
        for part in self.parallel.parts(tokens, settings.accumulate):
            losses = self.pair(part, end, learned / self.parallel.size)  # gradients are averaged over processes
            losses.sum().backward()
            total += losses.detach()
            norms = [optimizer.gather_gradients() for optimizer, _ in self.optimizers]  # sums in float32
        target, draft = self.parallel.mean(total).tolist()
        return (target, draft), norms

    def _skip(self, losses: tuple[float, float], norms: list[Tensor]) -> None:
        """Count a batch that is not learned from; ModelError when the recipe allows no more of them."""
        for optimizer, _ in self.optimizers:
            optimizer.forget_gradients()
        allowed = self.settings.max_skipped_batches
        if self.skipped >= allowed:
            raise ModelError(
                f"training diverged at step {self.step}: losses {losses[0]} (target) and {losses[1]} (draft), gradient "
                f"norms {float(norms[0])} and {float(norms[1])}, after {self.skipped} such batches of the {allowed} that "
                "train.max_skipped_batches allows; no weight was changed. Lower the learning rates of the recipe"
            )
        self.skipped += 1
        self.step += 1
        self.steps_here += 1

    def evaluate(self) -> dict[str, Any]:
        """Measure both models as they are now; on the main process, while the others wait at their next step."""
        target, draft = (optimizer.whole() for optimizer, _ in self.optimizers)
        found = self._measure(target, draft) if self.parallel.main else {}
        for model in (self.target, self.draft):
            model.train()
        return found

    def _measure(self, target: Trainable, draft: Trainable) -> dict[str, Any]:
        """Losses and agreement on held-out text, and the mean accepted length of a short decode; also logged."""
        length = self.settings.sequence_length
        windows = data.windows(self.held_out, length=length, limit=EVALUATION_TOKENS // length).to(self.device)
        found = asdict(agreement(target, draft, windows)) | {"mean_acceptance_length": None}
        if self.decode is not None:
            context = min(model.config.max_position_embeddings for model in (target, draft))
            size = min(DECODED_TOKENS, context // 4, length)
            prompts = data.windows(self.held_out, length=size, limit=DECODED_PROMPTS)[:, :-1].tolist()
            found["mean_acceptance_length"] = self.decode(target, draft, prompts, size)
        self.journal.evaluation(self.step, found)
        self.journal.flush()
        return found

    def save_if_possible(self, bar: TrainingProgress) -> None:
        """Write a checkpoint; a disk that does not take it is said, and costs no more than that."""
        try:
            self.save()
        except CheckpointError as error:
            bar.say(f"{error}; training goes on")

    def save(self) -> Path:
        """Write a checkpoint; its path."""
        state = self.parallel.random_state()
        for name, (optimizer, _) in zip(("target", "draft"), self.optimizers, strict=True):
            state |= {f"{name}.{key}": tensor for key, tensor in optimizer.state().items()}
        dtype = str(self.dtype).removeprefix("torch.")
        meta = files.Meta(self.identity, self.step, self.seconds, dtype, self.tokenizer_hash, self.skipped)
        self.journal.flush()
        return self.parallel.once(lambda: files.save_checkpoint(self.folder, files.Checkpoint(meta, state)))

    def resume(self, bar: TrainingProgress) -> None:
        """Continue from the newest intact checkpoint, if there is one, and open the log there."""
        checkpoint = files.load_checkpoint(self.folder, bar.say)
        if checkpoint is not None:
            self._continue(checkpoint)
            bar.say(f"continuing from step {self.step} in {self.folder}")
        self.journal.begin(self.step)

    def _continue(self, checkpoint: files.Checkpoint) -> None:
        meta = checkpoint.meta
        _check_identity(meta.identity, self.identity, self.out)
        if meta.tokenizer != self.tokenizer_hash:
            raise CheckpointError(
                f"the checkpoints in {self.folder} were trained with another tokenizer than the one this version of "
                "the tokenizers package makes of the same text; install the version in use then, or train with "
                "resume=False (--fresh)"
            )
        if _DTYPES[meta.dtype] != self.dtype:
            self._build(_DTYPES[meta.dtype])
        for name, (optimizer, _) in zip(("target", "draft"), self.optimizers, strict=True):
            own = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith(f"{name}.")}
            optimizer.load({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
        self.parallel.set_random_state(checkpoint.state)
        self.step, self.skipped = meta.step, meta.skipped
        self.start -= meta.seconds

    def finish(self) -> TrainReport:
        """Measure both models on held-out text in float32, write them with their cards, and the report last."""
        trained = self.seconds
        target, draft = (optimizer.release() for optimizer, _ in self.optimizers)
        return self.parallel.once(lambda: self._write(target, draft, trained))

    def _write(self, target: Trainable, draft: Trainable, trained: float) -> TrainReport:
        tokens = self.step * self.settings.rows * self.settings.sequence_length
        report = TrainReport(
            recipe=self.recipe.name,
            identity=self.identity,
            steps=self.step,
            tokens=tokens,
            seconds=round(trained, 2),
            tokens_per_second=round(tokens / trained, 1),
            target_parameters=sum(weight.numel() for weight in target.parameters()),
            draft_parameters=sum(weight.numel() for weight in draft.parameters()),
            **self._measure(target, draft),
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            skipped=self.skipped,
            processes=self.parallel.size,
            sharded=self.parallel.sharded,
        )
        for name, model in (("target", target), ("draft", draft)):
            files.save_pretrained(model, self.tokenizer, self.out / name, pair_card(name, self.recipe, report))
        files.write_text(self.out / REPORT, json.dumps(asdict(report), indent=1) + "\n")
        return report


def _due(every: float, passed: float) -> bool:
    return every > 0 and passed >= every


def _model(shape: ShapeRecipe, tokenizer: PreTrainedTokenizerFast) -> Trainable:
    if shape.kind == "lstm":
        return LSTM(shape.lstm_config(len(tokenizer), tokenizer.eos_token_id), shape.dropout)
    model = GPT(shape.config(len(tokenizer), tokenizer.eos_token_id), shape.dropout)
    with torch.no_grad():  # what enters the residual stream adds up to the same size at any depth (GPT-2, section 2.3)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * shape.num_hidden_layers))
    return model


def _finished(out: Path, identity: str) -> TrainReport | None:
    """The report of a finished run in ``out`` whose models are intact; None when there is no finished run."""
    if not (out / REPORT).exists():
        return None
    report = read_report(out / REPORT)
    _check_identity(report.identity, identity, out)
    for name in ("target", "draft"):
        files.verify_folder(out / name)
    return report


def _check_identity(found: str, expected: str, out: Path) -> None:
    if found != expected:
        raise ConfigError(
            f"{out} holds a pair of another recipe, or of other text; choose another folder, or train with "
            "resume=False to replace it"
        )


def _prepare(out: Path, resume: bool) -> None:
    """Refuse to delete what no run of ours wrote; without ``resume``, remove what an earlier run wrote."""
    if not (resume and (out / REPORT).exists()):  # else the run is finished, and nothing is written
        for name in ("target", "draft"):
            files.refuse_others(out / name, lambda folder: True)
    if resume:
        return
    for name in (REPORT, LOG, CURVES):
        (out / name).unlink(missing_ok=True)
    files.clear_checkpoints(out / "checkpoints")
    for name in ("target", "draft", TENSORBOARD):
        shutil.rmtree(out / name, ignore_errors=True)
