"""Our GPT on a GPU: its pass as a handful of Triton kernels a layer; see kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from specdec.nn import kernels
from specdec.nn.gpt import GPT

MOST_TOKENS = 64  # of a pass whose products are ours; with more, arithmetic counts, and torch's products are better at it
CHUNK = 256  # tokens of the cache that one program of a decoding pass looks at
DTYPES = (torch.bfloat16, torch.float32)  # float16 cannot hold what is normalised after the product and not before


class Weights(NamedTuple):
    """A projection."""

    matrix: Tensor
    bias: Tensor | None
    norm: Tensor | None = None  # of its inputs

    @classmethod
    def of(cls, linear: nn.Linear, norm: nn.Module | None = None) -> Weights:
        """Those of ``linear`` behind ``norm``."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(linear.weight.detach(), bias, None if norm is None else norm.weight.detach())


class Layer(NamedTuple):
    """A block; the two norms are those of Qwen3's queries and keys."""

    qkv: Weights
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Weights
    gate_up: Weights
    down: Weights


@dataclass
class Pass:
    """What a pass over B rows of T tokens reads; tensors on the model's device.

    ids, places, positions and seen [B, T] int64: see ``lm.cpu.Tokens``; lengths and committed [B]: tokens in the cache,
    and how many of them are no tree. blocks [B, n]: addresses of the rows' blocks. longest: an upper bound of places.
    """

    ids: Tensor
    places: Tensor
    positions: Tensor
    lengths: Tensor
    committed: Tensor
    blocks: Tensor
    longest: int
    seen: Tensor | None = None


class CudaModel:
    """The weights of a ``GPT``, which it shares, and the pass over them."""

    def __init__(self, model: GPT, block: int) -> None:
        """``block``: tokens of a block of the cache."""
        self.block = block
        attention = model.layers[0].self_attn
        self.heads, self.groups, self.head_dim = attention.heads, attention.groups, attention.head_dim
        self.epsilon = model.config.rms_norm_eps
        self.embedding = model.embed_tokens.weight.detach()
        self.head = Weights.of(model.lm_head, model.norm)
        self.layers = [_layer(block) for block in model.layers]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.block_numel = len(self.layers) * self.groups * 2 * block * self.head_dim
        self._angles = model.frequencies.float().to(self.device), model.rope_scale
        self.cosines = self.sines = torch.empty(0, self.head_dim // 2, device=self.device)

    def know_positions(self, length: int) -> bool:
        """Have the rotary angles of the first ``length`` positions; whether that moved them."""
        if length <= len(self.cosines):
            return False
        frequencies, scale = self._angles
        angles = torch.arange(max(1024, 2 * length), device=self.device).float().unsqueeze(1) * frequencies
        self.cosines, self.sines = angles.cos() * scale, angles.sin() * scale
        return True

    def forward(self, read: Pass, taps: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """The residual stream [B * T, hidden] (float32) of a pass, and that after the layers in ``taps``."""
        stream = functional.embedding(read.ids.flatten(), self.embedding).float()
        kept = {}
        for number, layer in enumerate(self.layers):
            mixed = self._attend(number, layer, stream, read)
            self._product(mixed, layer.output, adds_to=stream)
            self._product(self._product(stream, layer.gate_up, gated=True), layer.down, adds_to=stream)
            if number in taps:
                kept[number] = stream.to(self.dtype)
        return stream, [kept[layer] for layer in taps]

    def logits(self, stream: Tensor) -> Tensor:
        """[M, V] in float32, of the residual stream [M, hidden]."""
        return self._product(stream, self.head, dtype=torch.float32)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [M, V] of hidden states [M, hidden] that are normalised already."""
        return self._product(hidden.to(self.dtype), self.head._replace(norm=None), dtype=torch.float32)

    def _attend(self, number: int, layer: Layer, stream: Tensor, read: Pass) -> Tensor:
        """[M, heads * head_dim]."""
        rows, width = read.ids.shape
        heads = self._product(stream, layer.qkv)
        shape = {"HEADS": self.heads, "GROUPS": self.groups, "SIZE": self.head_dim, "BLOCK": self.block}
        queries = torch.empty(rows * width, self.heads * self.head_dim, dtype=self.dtype, device=self.device)
        stride = read.blocks.stride(0)
        kernels.turn[rows * width, self.heads + 2 * self.groups](
            heads, layer.query_norm, layer.key_norm, self.cosines, self.sines, read.positions, read.places, read.blocks,
            stride, queries, width, number, self.epsilon,
            HAS_NORM=layer.query_norm is not None, HALF=triton.next_power_of_2(self.head_dim // 2), **shape,
        )  # fmt: skip
        mixed = torch.empty_like(queries)
        chunks = 1 if rows * width > MOST_TOKENS else -(-read.longest // CHUNK)
        parts = torch.empty(chunks if chunks > 1 else 0, *queries.shape, device=self.device)
        peaks = torch.empty(len(parts), rows * width, self.heads, 2, device=self.device)
        pairs = width * (self.heads // self.groups)
        tile = min(64, max(16, triton.next_power_of_2(pairs)))
        wide = max(16, triton.next_power_of_2(self.head_dim))
        kernels.attend[rows * -(-pairs // tile), self.groups, chunks](
            queries, read.blocks, stride, read.lengths, read.committed, read.seen, mixed, parts, peaks, rows * width,
            width, number, self.head_dim**-0.5,
            CHUNK=CHUNK if chunks > 1 else 0, ALONE=chunks == 1, TREE=read.seen is not None, WIDE=wide, TILE=tile,
            **shape,
        )  # fmt: skip
        if chunks > 1:
            cells = rows * width * self.heads
            kernels.combine[cells,](parts, peaks, mixed, cells, chunks, SIZE=self.head_dim, WIDE=wide)
        return mixed

    def _product(
        self,
        inputs: Tensor,
        weights: Weights,
        *,
        gated: bool = False,
        adds_to: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[M, width] of inputs [M, inner], in ``dtype`` (default: the weights'); ``adds_to`` is changed in place."""
        count, inner = inputs.shape
        if count > MOST_TOKENS:
            return self._large_product(inputs, weights, gated, adds_to, dtype)
        width = len(weights.matrix) // (2 if gated else 1)
        outputs = adds_to
        if outputs is None:
            outputs = torch.empty(count, width, dtype=dtype or self.dtype, device=self.device)
        tile = Tile.of(count, width, inner, gated, self.dtype)
        kernels.project[-(-width // tile.columns), -(-count // tile.tokens)](
            inputs, weights.matrix, weights.norm, weights.bias, outputs, count, width, inner, self.epsilon,
            HAS_NORM=weights.norm is not None, HAS_BIAS=weights.bias is not None, GATED=gated,
            ADDS=adds_to is not None, WHOLE=inner % tile.inner == 0, TILE_M=tile.tokens, TILE_N=tile.columns,
            TILE_K=tile.inner, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return outputs

    def _large_product(
        self, inputs: Tensor, weights: Weights, gated: bool, adds_to: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        if weights.norm is not None:
            scale = inputs.square().mean(-1, keepdim=True).add_(self.epsilon).rsqrt_()
            inputs = (inputs * scale).to(self.dtype) * weights.norm
        found = functional.linear(inputs, weights.matrix, weights.bias)
        if gated:
            gate, up = found.chunk(2, dim=-1)
            found = functional.silu(gate) * up
        return found.to(dtype or self.dtype) if adds_to is None else adds_to.add_(found)


class Tile(NamedTuple):
    """How the programs of ``kernels.project`` share the work."""

    tokens: int
    columns: int
    inner: int
    stages: int
    warps: int

    @classmethod
    def of(cls, count: int, width: int, inner: int, gated: bool, dtype: torch.dtype) -> Tile:
        """For M = ``count`` tokens. ``inner``, and so the order of a sum, depends on the model alone."""
        tokens = min(64, max(16, triton.next_power_of_2(count)))
        deep = min(256 if dtype.itemsize == 2 else 64, max(16, triton.next_power_of_2(inner)))
        columns = 16 if width <= 16 * 256 else 32
        return cls(tokens, columns, deep, 3 if gated else 4, 4)


def _layer(block: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    norms = [None if norm is None else norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    return Layer(
        Weights.of(attention.qkv_proj, block.input_layernorm),
        norms[0],
        norms[1],
        Weights.of(attention.o_proj),
        Weights.of(mlp.gate_up_proj, block.post_attention_layernorm),
        Weights.of(mlp.down_proj),
    )


def readable(model: GPT) -> bool:
    """Whether kernels are there for this model."""
    weight, attention = model.embed_tokens.weight, model.layers[0].self_attn
    runs = weight.is_cuda or triton.knobs.runtime.interpret
    return runs and weight.dtype in DTYPES and model.pattern is None and attention.head_dim % 2 == 0
