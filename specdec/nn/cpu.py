"""``GPT`` on CPU for the few tokens of a decoding pass: cpu.c, compiled for this processor when first needed.

Where there is no C compiler, or a model's dtype is neither bfloat16 nor float32, ``kernels`` is None and torch runs it.
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from specdec.nn.compiled import compiled
from specdec.nn.gpt import GPT, head_size

PRODUCTS = ("qkv", "o", "gate_up", "down")  # of a block, in the order in which they run
WHOLE = 16  # to multiples of which sizes are padded; see cpu.c
EMBED, QKV, ATTEND, GATE_UP, DOWN, FINAL, NOTE = range(7)  # the stages of cpu.c
WORTH_A_THREAD = 2**21  # multiplications, some tens of microseconds
_LARGE, _TRIES = (1 << 16, 1 << 12), 8  # a weight that caches do not hold, and how often it is read


class Linear(Structure):
    """A packed weight; see ``pack``."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64), ("scale", c_void_p)]


class Layer(Structure):
    """Pointers to one block's weights."""

    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in PRODUCTS),
        ("number", c_int64),
    ]


class Model(Structure):
    """Sizes and pointers of a whole model."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "heads", "groups", "head_dim", "inner")),
        ("eps", c_float),
        ("embedding", c_void_p),
        ("vocabulary", c_int64),
        ("norm", c_void_p),
        ("head", Linear),
        ("layer", POINTER(Layer)),
        ("hidden_norm", c_void_p),
        ("keeps_norm", c_int64),
    ]


class Pass(Structure):
    """One pass over M tokens of several rows."""

    kept: object  # what the pointers point to must live as long

    _fields_ = [
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("ids", "positions", "places", "row_of")),
        ("rows", c_int64),
        *((name, c_void_p) for name in ("row_begins", "blocks")),
        ("block_stride", c_int64),
        *((name, c_void_p) for name in ("seen", "bases", "cosines", "sines", "x", "h", "wide")),
        *((name, c_int64) for name in ("ld_h", "ld_wide", "last_states", "taps")),
        *((name, c_void_p) for name in ("tapped", "features")),
        ("threads", c_int64),
    ]


@cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for models of ``dtype``; None where there are none. Compiling takes seconds, once."""
    found = compiled("cpu.c", dtype=dtype, purpose="decoding")
    if found is not None:
        found.readable.restype = found.lanes.restype = found.byte_pair.restype = c_int64
    return found


def pad(size: int, to: int = WHOLE) -> int:
    """The next multiple of ``to``."""
    return -(-size // to) * to


def pair(dtype: torch.dtype) -> int:
    """How many neighbouring k lie side by side."""
    return 2 if dtype == torch.bfloat16 else 1


def pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
    """A weight [N, K] in the order in which ``library``, a cpu.c, reads it, padded with zeros."""
    step, lanes = pair(weight.dtype), library.lanes()
    rows, columns = weight.shape
    padded = nn.functional.pad(weight, (0, pad(columns, step) - columns, 0, pad(rows) - rows))
    return padded.view(-1, lanes, pad(columns, step) // step, step).transpose(1, 2).contiguous()


def blocks_of(model: GPT) -> list[Any]:
    """The model's layers; torch does not tell their type."""
    return list(model.layers)


class CpuModel:
    """A ``GPT``'s weights packed, and the structure that a compiled ``library`` reads. The ``GPT`` is not kept."""

    def __init__(self, library: ctypes.CDLL, model: GPT, *, in_bytes: bool = False) -> None:
        self.library = library
        config, self.dtype, self.in_bytes = model.config, model.embed_tokens.weight.dtype, in_bytes
        self._kept: list[Tensor] = []  # what the structures point into
        self.layers = (Layer * config.num_hidden_layers)()
        for ours, layer in zip(self.layers, blocks_of(model), strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            ours.input_norm = self._floats(layer.input_layernorm.weight)
            ours.post_norm = self._floats(layer.post_attention_layernorm.weight)
            for name in ("q_norm", "k_norm"):
                norm = getattr(attention, name, None)
                setattr(ours, name, None if norm is None else self._floats(norm.weight))
            ours.qkv, ours.o = self._linear(attention.qkv_proj), self._linear(attention.o_proj)
            ours.gate_up, ours.down = self._linear(mlp.gate_up_proj), self._linear(mlp.down_proj)
        for number, ours in enumerate(self.layers):
            ours.number = number
        self.hidden, self.vocab_size = config.hidden_size, config.vocab_size
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, head_size(config)
        )  # fmt: skip
        self.inner = config.intermediate_size
        self.head = self._linear(model.lm_head)
        embedding = self._keep(model.embed_tokens.weight.detach().contiguous())
        self.struct = Model(
            config.num_hidden_layers, self.hidden, self.heads, self.groups, self.head_dim, self.inner,
            config.rms_norm_eps, embedding, self.vocab_size, self._floats(model.norm.weight), self.head, self.layers,
        )  # fmt: skip
        self._count()
        self.widest_input = max(
            pad(n) for n in (self.hidden, self.layers[0].qkv.k, self.heads * self.head_dim, self.inner)
        )
        self.widest_output = max(self.layers[0].qkv.n, self.layers[0].gate_up.n + WHOLE)

    def view(self, layers: Sequence[int], *, in_bytes: bool = False) -> CpuModel:
        """The same model with these of its layers, and with products in bytes if so asked; all else is shared."""
        view = copy.copy(self)
        view._kept = [*self._kept]
        view.layers = (Layer * len(layers))(*(self.layers[layer] for layer in layers))
        if in_bytes and not self.in_bytes:
            view.in_bytes = True
            packed = {tensor.data_ptr(): tensor for tensor in self._kept}
            for layer in view.layers:
                for name in PRODUCTS:
                    linear = getattr(layer, name)
                    setattr(layer, name, view._rounded(packed[linear.weight], linear))
            view.head = view._rounded(packed[self.head.weight], self.head)
        own = {field[0]: getattr(self.struct, field[0]) for field in Model._fields_}
        view.struct = Model(**{**own, "layers": len(layers), "head": view.head, "layer": view.layers})
        view._count()
        return view

    def read_beside(self, norm: nn.RMSNorm, *, keeps_norm: bool) -> None:
        """From now on every token is read beside a hidden state, which takes ``norm``: an EAGLE-3 head's way."""
        self.struct.hidden_norm, self.struct.keeps_norm = self._floats(norm.weight), keeps_norm

    def _count(self) -> None:
        self.reference = ctypes.byref(self.struct)
        self.multiplications = sum(
            linear.n * linear.k for layer in self.layers for linear in (getattr(layer, name) for name in PRODUCTS)
        )

    def _rounded(self, packed: Tensor, linear: Linear) -> Linear:
        """``linear``, whose weight is ``packed``, rounded to 127 steps per row, half the size of bfloat16."""
        weight = packed.float()  # [N / lanes, K / pair, lanes, pair]
        scale = weight.abs().amax(dim=(1, 3)).clamp(min=torch.finfo(torch.float32).tiny) / 63
        steps = (weight / scale[:, None, :, None]).round().clamp(-63, 63) + 64
        if self.library.byte_pair() == 1:
            steps = steps.transpose(2, 3)
        kept = self._keep(steps.to(torch.uint8).contiguous()), self._keep(scale.flatten())
        return Linear(kept[0], linear.bias, linear.n, linear.k, kept[1])

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, vector: Tensor) -> int:
        return self._keep(nn.functional.pad(vector.detach().float(), (0, pad(len(vector)) - len(vector))))

    def _linear(self, layer: nn.Linear) -> Linear:
        packed = pack(self.library, layer.weight.detach())
        bias = None if layer.bias is None else self._floats(layer.bias)
        found = Linear(None, bias, pad(layer.out_features), pad(layer.in_features, pair(self.dtype)))
        if self.in_bytes:
            return self._rounded(packed, found)
        found.weight = self._keep(packed)
        return found


def threads_for(multiplications: int) -> int:
    """How many threads are worth waiting for each other."""
    return min(torch.get_num_threads(), 1 + multiplications // WORTH_A_THREAD)


def product(library: ctypes.CDLL, by: Linear, x: Tensor, out: Tensor) -> None:
    """out [M, n] = x [M, k or more] times the packed weight."""
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)), ctypes.c_void_p(out.data_ptr())
    threads = ctypes.c_int64(threads_for(len(x) * by.n * by.k))
    library.product(ctypes.byref(by), ctypes.c_int64(len(x)), *pointers, ctypes.c_int64(out.stride(0)), threads)


class CompiledLinear(nn.Module):
    """A linear layer on ``product``, which any number of rows costs what they are; results are of ``dtype``."""

    def __init__(self, library: ctypes.CDLL, linear: nn.Linear, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach()
        (self.out_features, self.in_features), step = weight.shape, pair(weight.dtype)
        self.library, self.packed = library, pack(library, weight)
        self.bias = None if linear.bias is None else nn.functional.pad(linear.bias.detach().float(), (0, pad(1)))
        self.by = Linear(
            self.packed.data_ptr(), None if self.bias is None else self.bias.data_ptr(),
            pad(self.out_features), pad(self.in_features, step),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or x.dtype != self.packed.dtype or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"a layer of {self.packed.dtype} on cpu takes {self.in_features} inputs, got {tuple(x.shape)} of {x.dtype} "
                f"on {x.device}"
            )
        flat = nn.functional.pad(x.reshape(-1, self.in_features), (0, self.by.k - self.in_features)).contiguous()
        out = torch.empty(len(flat), self.by.n, dtype=torch.float32)
        product(self.library, self.by, flat, out)
        return out[:, : self.out_features].reshape(*x.shape[:-1], -1).to(self.dtype)


def read_bandwidth() -> float:
    """Bytes per second of a large bfloat16 weight, multiplied with one vector; 0 where nothing is compiled."""
    library = kernels(torch.bfloat16)
    if library is None:
        return 0.0
    rows, columns = _LARGE
    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    by, x = Linear(weight.data_ptr(), None, rows, columns), weight[:1].clone()
    out, found = torch.empty(1, rows, dtype=torch.float32), []
    for _ in range(_TRIES):
        started = time.perf_counter()
        product(library, by, x, out)
        found.append(time.perf_counter() - started)
    return weight.numel() * weight.element_size() / min(found)
