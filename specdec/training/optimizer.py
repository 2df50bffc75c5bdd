"""AdamW on float32 master weights, while the model itself computes in the precision its processor is fast at.

A bfloat16 model reads and writes half the memory and needs no casts, which autocast would repeat every step. On one
Zen 5 core a 512 x 512 product takes 0.51 ms in bfloat16 and 2.26 ms in float32.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from specdec.nn.gpt import GPT

_BETAS = (0.9, 0.95)  # the usual choice for language models (GPT-3, Llama): runs too short for 0.999
_PROBE_SIZE, _PROBES = 512, 8  # about 30 ms
_STATE = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """The optimiser of one model: float32 weights and moments, and the model's working copy kept equal to them."""

    def __init__(self, model: GPT, dtype: torch.dtype, *, weight_decay: float) -> None:
        self.model = model
        self.masters = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
        for weight in model.parameters():  # not model.to(dtype): rotary frequencies stay float32
            weight.data = weight.data.to(dtype)
        matrices = [master for master in self.masters.values() if master.ndim >= 2]
        vectors = [master for master in self.masters.values() if master.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, fused=True)

    def gather_gradients(self) -> Tensor:
        """Move the model's gradients to the masters in float32; their norm, a scalar."""
        for name, weight in self.model.named_parameters():
            self.masters[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    def step(self, learning_rate: float, norm: Tensor, clip: float) -> None:
        """Update with gradients scaled to a norm of at most ``clip`` (0: as they are)."""
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        torch._foreach_copy_([weight.data for weight in self.model.parameters()], list(self.masters.values()))

    def release(self) -> None:
        """Leave the float32 masters in the model as its weights; this optimiser is then done."""
        for name, weight in self.model.named_parameters():
            weight.data = self.masters[name]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        state = {f"master.{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            if master in self.adamw.state:
                state |= {f"{key}.{name}": self.adamw.state[master][key] for key in (*_STATE, "step")}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            if f"step.{name}" in state:
                loaded = {key: state[f"{key}.{name}"].to(master.device) for key in (*_STATE, "step")}
                self.adamw.state[master] = loaded
        self.write_back()


def schedule(progress: float, *, warmup: float, final: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: linear warm-up, then half a cosine down to ``final``."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    position = min((progress - warmup) / (1 - warmup), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * position))


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies it clearly faster than float32, else float32.

    A CPU is asked by a measurement of some milliseconds: some list the instruction and emulate it.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # then thread time is all of the work, and other programs cannot disturb the measurement
    try:
        times = [(_matmul_seconds(torch.float32), _matmul_seconds(torch.bfloat16)) for _ in range(_PROBES)]
    finally:
        torch.set_num_threads(threads)
    full, half = (min(column) for column in zip(*times, strict=True))
    return torch.bfloat16 if half < 0.67 * full else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Processor seconds of one matrix product in this thread."""
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    start = time.thread_time()
    torch.mm(matrix, matrix)
    return time.thread_time() - start
