"""Linear layers with packed weights, faster than ``F.linear`` at decoding's few rows.

By oneDNN 1.2 to 2 times; where oneDNN does not take bfloat16, on processors without instructions for it, by the
compiled products of nn/cpu.py, many times.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.nn.cpu import CompiledLinear, kernels

Model = TypeVar("Model", bound=nn.Module)

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on CPU. The packed weight can be applied, not read or saved; ``keep`` the other too."""

    def __init__(self, linear: nn.Linear, *, keep: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        if keep:
            self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(module: nn.Module) -> bool:
    """Whether this is a linear layer and nothing more, which oneDNN can take: on CPU, in a dtype that it runs fast."""
    if not _is_bare(module) or not torch.backends.mkldnn.is_available():
        return False
    return module.weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is_bare(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    if "forward" in vars(module) or type(module.weight) is not nn.Parameter:  # wrapped, or quantized
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype in PACKED_DTYPES


def is_slow(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether there is something faster for this linear layer."""
    return can_pack(module) or (_is_bare(module) and kernels(module.weight.dtype) is not None)


def _faster(linear: nn.Linear, keep: bool) -> nn.Module:
    """``linear``, which ``is_slow``, with its weight packed; ``keep``: beside the given one."""
    if can_pack(linear):
        return PackedLinear(linear, keep=keep)
    library = kernels(linear.weight.dtype)
    assert library is not None
    found = CompiledLinear(library, linear, dtype=linear.weight.dtype)
    if keep:
        found.weight = linear.weight
    return found


def pack_linears(model: Model, *, keep: bool = False) -> Model:
    """Replace every linear layer of ``model`` for which there is a faster one, in place; returns the model."""
    for name, child in list(model.named_children()):
        if is_slow(child):
            setattr(model, name, _faster(child, keep))
        else:
            pack_linears(child, keep=keep)
    return model


_copies: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()


def packed_copy(model: Model) -> Model:
    """A twin of ``model`` that shares its tensors and configurations, with its linear layers packed.

    The twin is kept and found again as long as the model's structure and the weights that were packed stay the same.
    ``model`` itself where nothing can be packed, or where there is no memory for a second copy of its linear layers.
    """
    linears = [module for module in model.modules() if is_slow(module)]
    if not linears or 2 * sum(_bytes(linear) for linear in linears) > _free_memory():
        return model
    state = _state(model, linears)
    known = _copies.get(model)
    if known is None or known[0] != state:
        shared: list[Any] = [*model.parameters(), *model.buffers()]
        shared += [config for module in model.modules() if (config := vars(module).get("config")) is not None]
        twin = copy.deepcopy(model, {id(part): part for part in shared}).eval()
        known = (state, pack_linears(twin, keep=True))
        _copies[model] = known
    found = known[1]
    assert isinstance(found, type(model))
    return found


def _state(model: nn.Module, linears: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What would make a twin out of date: parts that were exchanged or hooked, weights that were changed."""
    parts = tuple(
        (id(module), len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for module in model.modules()
    )
    tensors = tuple(id(tensor) for tensor in chain(model.parameters(), model.buffers()))
    with torch.no_grad():
        sums = tuple(float(weight.sum(dtype=torch.float32)) for linear in linears for weight in linear.parameters())
    return parts, tensors, sums


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def _free_memory() -> int:
    """Bytes of main memory that a program may still take; as good as endless on a system that does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
