"""AdamW and Muon on float32 master weights, while the model itself computes in the precision its processor is fast at.

A bfloat16 model reads and writes half the memory and needs no casts, which autocast would repeat every step. On one
Zen 5 core a 512 x 512 product takes 0.51 ms in bfloat16 and 2.26 ms in float32.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from specdec.nn.lstm import Trainable

_BETAS = (0.9, 0.95)  # the usual choice for language models (GPT-3, Llama): runs too short for 0.999
_TABLES = ("lm_head", "markov_out")  # linear layers with a row per token: most of a step's gradients are of a few rows


class MasterAdamW:
    """The optimiser of one model: float32 weights and moments, and the model's working copy kept equal to them.

    Of a model sharded by FSDP2 it holds this process's part; norms and what ``state`` returns are of the whole.
    """

    _moments = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # AdamW's, and Muon's

    def __init__(self, model: Trainable, dtype: torch.dtype, *, weight_decay: float) -> None:
        self.model = model
        self.sharded = any(isinstance(weight, DTensor) for weight in model.parameters())
        self.masters = {name: _local(weight.detach()).float().clone() for name, weight in model.named_parameters()}
        if not self.sharded:  # FSDP2 keeps float32 and computes in the dtype of its policy
            for weight in model.parameters():  # not model.to(dtype): rotary frequencies stay float32
                weight.data = weight.data.to(dtype)
        matrices = [self.masters[name] for name, weight in model.named_parameters() if weight.ndim >= 2]
        vectors = [self.masters[name] for name, weight in model.named_parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, fused=True)
        self._optimizers: list[torch.optim.Optimizer] = [self.adamw]

    def gather_gradients(self) -> Tensor:
        """Add the model's gradients to those of the masters, in float32; the norm of the sum, a scalar."""
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                gradient, master = _local(weight.grad).float(), self.masters[name]
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])
        if self.sharded:
            norm = norm.square()
            torch.distributed.all_reduce(norm)
            norm = norm.sqrt()
        return norm

    def forget_gradients(self) -> None:
        """Drop what ``gather_gradients`` has gathered."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self, learning_rate: float, norm: Tensor, clip: float) -> None:
        """Update with gradients scaled to a norm of at most ``clip`` (0: as they are)."""
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), clip, norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        self.forget_gradients()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        weights = [_local(weight.detach()) for weight in self.model.parameters()]
        torch._foreach_copy_(weights, list(self.masters.values()))

    def release(self) -> Trainable:
        """The model with the float32 masters as its weights, in one piece; this optimiser is then done."""
        if self.sharded:
            return self.whole()
        for name, weight in self.model.named_parameters():
            weight.data = self.masters[name]
        return self.model

    @torch.no_grad()
    def whole(self) -> Trainable:
        """The model as it is now if it is in one piece, or a copy put together of all processes' parts."""
        if not self.sharded:
            return self.model
        state = {name: self._full(master, name) for name, master in self.masters.items()}
        model = type(self.model)(self.model.config).to(next(iter(state.values())).device)
        for name, weight in model.named_parameters():
            weight.copy_(state[name])
        return model

    def snapshot(self) -> Trainable:
        """A copy of the model with the float32 masters as its weights; of a model that is not sharded."""
        model = copy.deepcopy(self.model)
        for name, weight in model.named_parameters():
            weight.data = self.masters[name].clone()
        return model

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        state = {f"master.{name}": self._full(master, name) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            found = self._state_of(name).get(master, {})
            state |= {f"{key}.{name}": self._full(found[key], name) for key in self._moments if key in found}
            if "step" in found:
                state[f"step.{name}"] = found["step"]
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
        for name, master in self.masters.items():
            master.copy_(self._part(state[f"master.{name}"], name))
            moments = [key for key in self._moments if f"{key}.{name}" in state]
            loaded = {key: self._part(state[f"{key}.{name}"], name).to(master.device) for key in moments}
            if f"step.{name}" in state:
                loaded["step"] = state[f"step.{name}"].to(master.device)
            if loaded:
                self._state_of(name)[master] = loaded
        self.write_back()

    def _state_of(self, name: str) -> dict[Tensor, Any]:
        """The state of the optimiser that updates the weight ``name``."""
        return self.adamw.state

    def _full(self, part: Tensor, name: str) -> Tensor:
        """The whole of a tensor that is laid out as the weight ``name`` is."""
        weight = self.model.get_parameter(name)
        if not isinstance(weight, DTensor):
            return part
        whole = DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        return whole.full_tensor()

    def _part(self, full: Tensor, name: str) -> Tensor:
        """This process's part of ``full``."""
        weight = self.model.get_parameter(name)
        if not isinstance(weight, DTensor):
            return full
        whole = full.to(self.masters[name].device)
        return distribute_tensor(whole, weight.device_mesh, weight.placements).to_local().clone()


class MasterMuon(MasterAdamW):
    """The same, with Muon for the matrices inside the model; AdamW for the others.

    What Muon subtracts has all its singular values near 1, so that rare directions are learned as fast as frequent ones
    (Jordan 2024). Its steps are scaled to be as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning
    rate is for both. Not for sharded models: it needs whole matrices.
    """

    def __init__(self, model: Trainable, dtype: torch.dtype, *, weight_decay: float) -> None:
        super().__init__(model, dtype, weight_decay=weight_decay)
        assert not self.sharded
        self._inner = {
            f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and min(module.weight.shape) > 1 and name not in _TABLES
        } & self.masters.keys()  # fmt: skip
        matrices = [master for name, master in self.masters.items() if name in self._inner]
        taken = set(map(id, matrices))
        for group in self.adamw.param_groups:
            group["params"] = [master for master in group["params"] if id(master) not in taken]
        self.muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._optimizers.append(self.muon)

    def _state_of(self, name: str) -> dict[Tensor, Any]:
        return self.muon.state if name in self._inner else self.adamw.state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def schedule(progress: float, *, warmup: float, final: float, decay: float = 1.0) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: linear warm-up, then half a cosine down to ``final``.

    The cosine takes the last ``decay`` of the run; the rate is stable between warm-up and it (warm-up, stable, decay).
    """
    if progress < warmup:
        return max(progress / warmup, 0.01)
    begin = max(warmup, 1 - decay)
    position = min(max(progress - begin, 0.0) / (1 - begin), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * position))
