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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.errors import CheckpointError, ConfigError, ModelError
from specdec.nn.gpt import GPT
from specdec.training import checkpoint as files
from specdec.training import data
from specdec.training.interrupt import Interrupt
from specdec.training.objective import agreement, pair_losses
from specdec.training.optimizer import MasterAdamW, fast_dtype, schedule
from specdec.training.progress import TrainingProgress
from specdec.training.recipe import Recipe, ShapeRecipe

EVALUATION_TOKENS = 8_192  # held-out tokens: a standard error of about 0.5 % on the agreement, in a few seconds
REPORT = "report.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class TrainReport:
    """What came out. Losses are nats per token on held-out text; see ``objective.Agreement`` for the agreement."""

    recipe: str
    identity: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    target_parameters: int
    draft_parameters: int
    target_loss: float
    draft_loss: float
    acceptance: float
    top1: float
    device: str
    dtype: str
    versions: dict[str, str]
    skipped: int = 0


def train(recipe: Recipe, out: Path, *, progress: bool = True, resume: bool = True) -> TrainReport:
    """Train the pair of ``recipe`` into ``out``/target and ``out``/draft, and write ``out``/report.json.

    An unfinished run is continued, a finished one is returned as it is; ``resume=False`` starts over. Ctrl-C and
    SIGTERM save a checkpoint before they end the run. Raises ConfigError when ``out`` belongs to another recipe or
    text, CheckpointError when its checkpoints are damaged, ModelError when a loss is not finite.
    """
    start = time.monotonic()
    with TrainingProgress(f"training {recipe.name}", visible=progress) as bar:
        source = asdict(recipe.data)
        corpus = data.gather(source.pop("source"), Path(path) if (path := source.pop("path")) else None, **source)
        identity = f"{recipe.fingerprint()[:32]}-{corpus.fingerprint()[:32]}"
        _check_folder(out)
        if not resume:
            _clear(out)
        if (finished := _finished(out, identity)) is not None:
            return finished
        run = Run(recipe, corpus, identity, start)
        run.resume(out / "checkpoints", bar)
        run.loop(out / "checkpoints", bar)
        report = run.finish(out)
        files.clear_checkpoints(out / "checkpoints")
        bar.say(
            f"{out}: target {report.target_loss:.3f}, draft {report.draft_loss:.3f} nats/token on held-out text; "
            f"they agree on {report.top1:.1%} of the most probable tokens"
        )
    return report


class Run:
    """One run's text, models, optimisers and clock."""

    def __init__(self, recipe: Recipe, corpus: data.Corpus, identity: str, start: float) -> None:
        self.recipe, self.settings, self.identity = recipe, recipe.train, identity
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise ConfigError(f"training runs in one process, got {accelerator.num_processes}; start it with python")
        self.device = accelerator.device
        context = min(recipe.target.max_position_embeddings, recipe.draft.max_position_embeddings)
        self.tokenizer = data.train_tokenizer(corpus.training, recipe.tokenizer.vocab_size, context)
        self.training = self._encode(corpus.training)
        self.held_out = self._encode(corpus.held_out)
        self.step, self.start, self.steps_here, self.skipped = 0, start, 0, 0
        self.tokenizer_hash = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        torch.manual_seed(self.settings.seed)
        self._build(_DTYPES.get(self.settings.precision) or fast_dtype(self.device))

    def _encode(self, documents: tuple[data.Document, ...]) -> Tensor:
        tokens = data.encode(self.tokenizer, documents)
        if len(tokens) <= self.settings.sequence_length:
            raise ConfigError(
                f"the text is too short: {len(tokens)} tokens, and a batch needs windows of "
                f"{self.settings.sequence_length + 1}; lower train.sequence_length or add text"
            )
        return tokens

    def _build(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.target, self.draft = (_model(shape, self.tokenizer) for shape in (self.recipe.target, self.recipe.draft))
        self.optimizers: list[tuple[MasterAdamW, float]] = []
        rates = (self.settings.target_learning_rate, self.settings.draft_learning_rate)
        for model, rate in zip((self.target, self.draft), rates, strict=True):
            model.to(self.device).train()
            self.optimizers.append((MasterAdamW(model, dtype, weight_decay=self.settings.weight_decay), rate))

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

    def loop(self, folder: Path, bar: TrainingProgress) -> None:
        """Train until the budget is spent, with checkpoints below ``folder``."""
        saved = begin = time.monotonic()
        batch_tokens = self.settings.rows * self.settings.sequence_length
        with Interrupt() as interrupt:
            while (progress := self.progress) < 1:
                losses = self.train_step(progress)
                now = time.monotonic()
                speed = self.steps_here * batch_tokens / (now - begin)
                bar.update(self.progress, losses=losses, tokens_per_second=speed, seconds=self.seconds)
                due = self.settings.checkpoint_seconds and now - saved >= self.settings.checkpoint_seconds
                if interrupt.received:
                    path = self.save(folder)
                    bar.say(f"stopped at step {self.step}; run the same command again to continue from {path}")
                    interrupt.end_program()
                if due:
                    saved = now
                    self.save_if_possible(folder, bar)
        if self.settings.checkpoint_seconds:  # whatever happens while the models are measured then costs no training
            self.save_if_possible(folder, bar)

    def train_step(self, progress: float) -> tuple[float, float]:
        """One update of both models at ``progress`` of the schedule; their losses.

        A loss or gradient that is not finite changes no weight: its batch is skipped as often as the recipe allows, and
        is a ModelError from then on.
        """
        settings = self.settings
        shape = {"rows": settings.rows, "length": settings.sequence_length}
        tokens = data.batch(self.training, seed=settings.seed, step=self.step, **shape).to(self.device)
        target_loss, draft_loss = pair_losses(self.target, self.draft, tokens, distillation=settings.distillation)
        torch.autograd.backward([target_loss, draft_loss])
        norms = [optimizer.gather_gradients() for optimizer, _ in self.optimizers]
        losses = (target_loss.item(), draft_loss.item())
        if not all(map(math.isfinite, (*losses, *map(float, norms)))):
            self._skip(losses, norms)
            return losses
        factor = schedule(progress, warmup=settings.warmup, final=settings.final_learning_rate)
        for (optimizer, rate), norm in zip(self.optimizers, norms, strict=True):
            optimizer.step(rate * factor, norm, settings.clip)
        self.step += 1
        self.steps_here += 1
        return losses

    def _skip(self, losses: tuple[float, float], norms: list[Tensor]) -> None:
        """Count a batch that is not learned from; ModelError when the recipe allows no more of them."""
        for optimizer, _ in self.optimizers:
            optimizer.adamw.zero_grad()
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

    def save_if_possible(self, folder: Path, bar: TrainingProgress) -> None:
        """Write a checkpoint; a disk that does not take it is said, and costs no more than that."""
        try:
            self.save(folder)
        except CheckpointError as error:
            bar.say(f"{error}; training goes on")

    def save(self, folder: Path) -> Path:
        """Write a checkpoint; its path."""
        state = files.random_state(self.device)
        for name, (optimizer, _) in zip(("target", "draft"), self.optimizers, strict=True):
            state |= {f"{name}.{key}": tensor for key, tensor in optimizer.state().items()}
        dtype = str(self.dtype).removeprefix("torch.")
        meta = files.Meta(self.identity, self.step, self.seconds, dtype, self.tokenizer_hash, self.skipped)
        return files.save_checkpoint(folder, files.Checkpoint(meta, state))

    def resume(self, folder: Path, bar: TrainingProgress) -> None:
        """Continue from the newest intact checkpoint below ``folder``, if there is one."""
        checkpoint = files.load_checkpoint(folder, bar.say)
        if checkpoint is None:
            return
        _check_identity(checkpoint.meta.identity, self.identity, folder.parent)
        if checkpoint.meta.tokenizer != self.tokenizer_hash:
            raise CheckpointError(
                f"the checkpoints in {folder} were trained with another tokenizer than the one this version of the "
                "tokenizers package makes of the same text; install the version in use then, or train with "
                "resume=False (--fresh)"
            )
        if _DTYPES[checkpoint.meta.dtype] != self.dtype:
            self._build(_DTYPES[checkpoint.meta.dtype])
        for name, (optimizer, _) in zip(("target", "draft"), self.optimizers, strict=True):
            own = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith(f"{name}.")}
            optimizer.load({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
        files.set_random_state(checkpoint.state, self.device)
        self.step, self.skipped = checkpoint.meta.step, checkpoint.meta.skipped
        self.start -= checkpoint.meta.seconds
        bar.say(f"continuing from step {self.step} in {folder}")

    def finish(self, out: Path) -> TrainReport:
        """Write both models in float32, measure them on held-out text, and write the report last."""
        for optimizer, _ in self.optimizers:
            optimizer.release()
        trained = self.seconds
        files.save_pretrained(self.target, self.tokenizer, out / "target")
        files.save_pretrained(self.draft, self.tokenizer, out / "draft")
        length = self.settings.sequence_length
        windows = data.windows(self.held_out, length=length, limit=EVALUATION_TOKENS // length).to(self.device)
        measured = agreement(self.target, self.draft, windows)
        tokens = self.step * self.settings.rows * length
        report = TrainReport(
            recipe=self.recipe.name,
            identity=self.identity,
            steps=self.step,
            tokens=tokens,
            seconds=round(trained, 2),
            tokens_per_second=round(tokens / trained, 1),
            target_parameters=sum(weight.numel() for weight in self.target.parameters()),
            draft_parameters=sum(weight.numel() for weight in self.draft.parameters()),
            **asdict(measured),
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            skipped=self.skipped,
        )
        files.write_text(out / REPORT, json.dumps(asdict(report), indent=1) + "\n")
        return report


def _model(shape: ShapeRecipe, tokenizer: PreTrainedTokenizerFast) -> GPT:
    model = GPT(shape.config(len(tokenizer), tokenizer.eos_token_id), shape.dropout)
    with torch.no_grad():  # what enters the residual stream adds up to the same size at any depth (GPT-2, section 2.3)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * shape.num_hidden_layers))
    return model


def _finished(out: Path, identity: str) -> TrainReport | None:
    """The report of a finished run in ``out`` whose models are intact; None when there is no finished run."""
    path = out / REPORT
    if not path.exists():
        return None
    try:
        report = TrainReport(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; train with resume=False to start over") from error
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


def _check_folder(out: Path) -> None:
    """Refuse to replace a folder that no run of ours wrote."""
    for path in (out / "target", out / "draft"):
        if path.exists() and not (path / files.MANIFEST).exists():
            raise ConfigError(f"{path} exists and was not written by a training run; choose another output folder")


def _clear(out: Path) -> None:
    """Remove what an earlier run wrote into ``out``, and nothing else."""
    (out / REPORT).unlink(missing_ok=True)
    files.clear_checkpoints(out / "checkpoints")
    for name in ("target", "draft"):
        shutil.rmtree(out / name, ignore_errors=True)
