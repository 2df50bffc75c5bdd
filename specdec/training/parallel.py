"""Where a run computes: one process or several, one device or two; accelerate says which, torch does it.

`accelerate launch` decides the number of processes, their device and whether weights are copied (DDP) or sharded
(FSDP2). Every process reads the same text and draws the same batch, and takes its own rows of it, so that a recipe
means the same training however many there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from specdec.errors import CheckpointError, ConfigError, SpecDecError
from specdec.nn.lstm import Trainable
from specdec.training.objective import Pair
from specdec.training.recipe import TrainRecipe

Result = TypeVar("Result")


class Parallel:
    """The processes and devices of one run."""

    def __init__(self, settings: TrainRecipe, out: Path) -> None:
        _check_trackers(settings.trackers)
        self.accelerator = Accelerator(log_with=list(settings.trackers) or None, project_dir=str(out))
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.sharded = self.size > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        own = self.accelerator.device
        self.devices = [
            own if name == "auto" else _device(name, key)
            for key, name in (("target_device", settings.target_device), ("draft_device", settings.draft_device))
        ]
        if self.size > 1 and self.devices != [own, own]:
            raise ConfigError(
                f"train.target_device and train.draft_device must be 'auto' in {self.size} processes, which have a "
                "device each; remove them, or start one process"
            )
        if settings.rows % (self.size * settings.accumulate):
            raise ConfigError(
                f"train.rows must be a multiple of processes x train.accumulate ({self.size} x {settings.accumulate}), "
                f"got {settings.rows}"
            )

    @property
    def device(self) -> torch.device:
        """Where batches go and losses are computed: the target's."""
        return self.devices[0]

    @property
    def precision(self) -> str | None:
        """What `accelerate launch --mixed_precision` asks for, which goes before the recipe; None for nothing."""
        asked = self.accelerator.mixed_precision
        if asked not in ("no", "bf16"):
            raise ConfigError(f"training runs in float32 or bfloat16, got --mixed_precision {asked}; use bf16 or no")
        return "bfloat16" if asked == "bf16" else None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def overlap(self) -> bool:
        """Whether both models share one GPU of one process, in a stream each."""
        return self.size == 1 and self.device.type == "cuda" and self.devices[0] == self.devices[1]

    def shard(self, pair: Pair, dtype: torch.dtype) -> None:
        """Under FSDP2, leave each process its part of every weight; computation is in ``dtype``, sums in float32."""
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        models: list[Trainable] = [pair.target] if pair.draft is None else [pair.target, pair.draft]
        for model in models:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(pair, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def wrap(self, pair: Pair) -> nn.Module:
        """The module to call: under DDP one that averages gradients over processes."""
        if self.size == 1 or self.sharded:
            return pair
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(pair, device_ids=devices)

    def parts(self, rows: Tensor, accumulate: int) -> list[Tensor]:
        """This process's rows of a batch [rows, T], in ``accumulate`` parts, on the target's device."""
        own = rows.chunk(self.size)[self.rank]
        return list(own.to(self.device).chunk(accumulate))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size > 1:
            distributed.all_reduce(values)
            values = values / self.size
        return values

    def agree(self, progress: float, *flags: bool) -> tuple[float, ...]:
        """The main process's ``progress``, and of each flag whether any process raised it: clocks and signals differ."""
        if self.size == 1:
            return progress, *flags
        found = torch.tensor(
            [progress if self.main else 0.0, *map(float, flags)], dtype=torch.float64, device=self.device
        )
        distributed.all_reduce(found)
        return tuple(found.tolist())

    def gather(self, value: Result) -> list[Result]:
        """``value`` of every process, in order."""
        if self.size == 1:
            return [value]
        found: list[Result] = [value] * self.size
        distributed.all_gather_object(found, value)
        return found

    def once(self, action: Callable[[], Result]) -> Result:
        """Let the main process do what the others must wait for; its result or its SpecDecError, everywhere."""
        if self.size == 1:
            return action()
        outcome: list[Result | SpecDecError | None] = [None]
        if self.main:
            try:
                outcome[0] = action()
            except SpecDecError as error:
                outcome[0] = error
        distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], SpecDecError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def random_state(self) -> dict[str, Tensor]:
        """States of the random generators that dropout draws from, of all processes and devices."""
        own = {"random.cpu": torch.get_rng_state()}
        for device in sorted({str(device) for device in self.devices if device.type == "cuda"}):
            own[self._name(device)] = torch.cuda.get_rng_state(device)
        return {f"{key}.{rank}": state for rank, states in enumerate(self.gather(own)) for key, state in states.items()}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``random_state`` returned. Raises CheckpointError when a generator of ours is missing."""
        devices = sorted({str(device) for device in self.devices if device.type == "cuda"})
        names = [f"{name}.{self.rank}" for name in ("random.cpu", *map(self._name, devices))]
        if missing := [name for name in names if name not in state]:
            raise CheckpointError(
                f"the checkpoint has no state of {', '.join(missing)}, without which dropout would not go on as it "
                "would have; continue with as many processes and the kind of device that wrote it, or start over with "
                "resume=False (--fresh)"
            )
        torch.set_rng_state(state[names[0]].cpu())
        for name, device in zip(names[1:], devices, strict=True):
            torch.cuda.set_rng_state(state[name].cpu(), device)

    def _name(self, device: str) -> str:
        """Of a GPU's generator: a process that has one calls it by no number, wherever it is placed next time."""
        return "random.cuda" if torch.device(device) == self.device else "random.cuda.draft"

    def close(self) -> None:
        """Finish the trackers' files."""
        if self.accelerator.trackers:
            self.accelerator.end_training()


def _device(name: str, key: str) -> torch.device:
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    raise ConfigError(f"train.{key} = {name!r} is no device of this machine; use 'auto', 'cpu', 'cuda:0', ...")


def _check_trackers(names: tuple[str, ...]) -> None:
    from accelerate.utils import is_tensorboard_available

    if "tensorboard" in names and not is_tensorboard_available():
        raise ConfigError(
            "train.trackers names 'tensorboard', which is not installed: pip install tensorboard; log.jsonl and "
            "curves.png are written without it"
        )
