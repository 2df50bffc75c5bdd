"""Our GPT on a GPU: its pass as a handful of Triton kernels a layer; see kernels.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from specdec.nn import kernels
from specdec.nn.gpt import GPT, Block

FEW = 32  # tokens whose products are ours; with more, arithmetic counts, and torch's are better at it
MOST_TOKENS = 256  # of a decoding pass; larger ones read prompts
_SHARED = 96 * 1024  # bytes of fast memory that a program may fill with keys and values that are on their way
CHUNK = 256  # tokens of the cache that one program of a decoding pass looks at
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Weights(NamedTuple):
    """A projection."""

    matrix: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> Weights:
        """Those of ``linear``."""
        return cls(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


class Layer(NamedTuple):
    """A block; ``query_norm`` and ``key_norm`` are Qwen3's."""

    norm: Tensor
    qkv: Weights
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Weights
    mlp_norm: Tensor
    gate_up: Weights
    down: Weights


class Pass(NamedTuple):
    """What a pass over B rows of T tokens reads; int64 tensors on the model's device.

    ids [B, T]; lengths and committed [B]: tokens in the cache, and how many of them are no tree. blocks [B, n]: where the
    rows' blocks are, counted in numbers from ``memory``, a block itself. longest: an upper bound of a row's tokens. Of
    trees, depths and seen [B, T]: how many nodes are above a token's, and which of the row's uncommitted tokens it looks
    at, a bit for each.
    """

    ids: Tensor
    lengths: Tensor
    committed: Tensor
    memory: Tensor
    blocks: Tensor
    longest: int
    depths: Tensor | None = None
    seen: Tensor | None = None


class CudaModel:
    """The weights of a ``GPT``, which it shares, and the pass over them."""

    def __init__(self, model: GPT, block: int) -> None:
        """``block``: tokens of a block of the cache."""
        self.block = block
        blocks = _blocks(model)
        attention = blocks[0].self_attn
        self.heads, self.groups, self.head_dim = attention.heads, attention.groups, attention.head_dim
        self.config, self.epsilon = model.config, model.config.rms_norm_eps
        self.embedding = model.embed_tokens.weight.detach()
        self.head, self.norm = Weights.of(model.lm_head), model.norm.weight.detach()
        self.layers = [_layer(block) for block in blocks]
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
        """Hidden states [B * T, hidden] after the last norm, and the outputs of the layers in ``taps``."""
        stream = functional.embedding(read.ids.flatten(), self.embedding).float()
        added, kept = None, {}
        for number, layer in enumerate(self.layers):
            mixed = self._attend(number, layer, self._normalised(stream, added, layer.norm), read)
            if number - 1 in taps:
                kept[number - 1] = stream.to(self.dtype, copy=True)  # with what the layer before has added
            inner = self._normalised(stream, self._product(mixed, layer.output), layer.mlp_norm)
            added = self._product(self._product(inner, layer.gate_up, gated=True), layer.down)
        return self._normalised(stream, added, self.norm), [kept[layer] for layer in taps]

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, V] in float32, of hidden states [M, hidden]."""
        return self._product(hidden.to(self.dtype), self.head, dtype=torch.float32)

    def _normalised(self, stream: Tensor, added: Tensor | None, weights: Tensor) -> Tensor:
        """RMSNorm of ``stream`` [M, hidden], which changes in place if something is ``added`` [M, hidden]."""
        count, width = stream.shape
        outputs = torch.empty(stream.shape, dtype=self.dtype, device=self.device)
        kernels.normalise[count,](
            stream, added, weights, outputs, width, self.epsilon, ADDS=added is not None,
            WIDE=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
        return outputs

    def _attend(self, number: int, layer: Layer, inputs: Tensor, read: Pass) -> Tensor:
        """[M, heads * head_dim] of inputs [M, hidden]."""
        rows, width = read.ids.shape
        heads = self._product(inputs, layer.qkv)
        shape = {"HEADS": self.heads, "GROUPS": self.groups, "SIZE": self.head_dim, "BLOCK": self.block}
        queries = torch.empty(rows * width, self.heads * self.head_dim, dtype=self.dtype, device=self.device)
        stride = read.blocks.stride(0)
        kernels.turn[rows * width, self.heads + 2 * self.groups](
            heads, layer.query_norm, layer.key_norm, self.cosines, self.sines, read.lengths, read.committed, read.depths,
            read.memory, read.blocks, stride, queries, width, number, self.epsilon, TREE=read.depths is not None,
            HAS_NORM=layer.query_norm is not None, HALF=triton.next_power_of_2(self.head_dim // 2), **shape,
        )  # fmt: skip
        mixed = torch.empty_like(queries)
        chunks = 1 if rows * width > MOST_TOKENS else -(-read.longest // CHUNK)
        parts = torch.empty(chunks if chunks > 1 else 0, *queries.shape, device=self.device)
        peaks = torch.empty(len(parts), rows * width, self.heads, 2, device=self.device)
        pairs = width * (self.heads // self.groups)
        most = 64 if self.dtype.itemsize == 2 else 16  # more do not fit into a processor's registers
        tile = min(most, max(16, triton.next_power_of_2(pairs)))
        wide = max(16, triton.next_power_of_2(self.head_dim))
        kernels.attend[rows * -(-pairs // tile), self.groups, chunks](
            queries, read.memory, read.blocks, stride, read.lengths, read.committed, read.seen, mixed, parts, peaks,
            rows * width, width, number, self.head_dim**-0.5,
            CHUNK=CHUNK if chunks > 1 else 0, ALONE=chunks == 1, TREE=read.seen is not None, WIDE=wide, TILE=tile,
            STAGES=max(1, min(3, _SHARED // (2 * self.block * wide * self.dtype.itemsize))), **shape,
        )  # fmt: skip
        if chunks > 1:
            cells = rows * width * self.heads
            kernels.combine[cells,](parts, peaks, mixed, cells, chunks, SIZE=self.head_dim, WIDE=wide)
        return mixed

    def _product(
        self, inputs: Tensor, weights: Weights, *, gated: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[M, width] of inputs [M, inner], in ``dtype`` (default: the weights')."""
        (count, inner), width = inputs.shape, len(weights.matrix) // (2 if gated else 1)
        if count > FEW:
            found = functional.linear(inputs, weights.matrix, weights.bias)
            return self._gated(found) if gated else found.to(dtype or self.dtype)
        outputs = torch.empty(count, width, dtype=dtype or self.dtype, device=self.device)
        tile = Tile.of(inner, gated, self.dtype)
        tokens = 16 if count <= 16 else 32
        kernels.multiply[-(-width // tile.columns), -(-count // tokens)](
            inputs, weights.matrix, weights.bias, outputs, count, width, inner, HAS_BIAS=weights.bias is not None,
            GATED=gated, WHOLE=inner % tile.inner == 0, TILE_M=tokens, TILE_N=tile.columns, TILE_K=tile.inner,
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return outputs

    def _gated(self, inputs: Tensor) -> Tensor:
        """[M, width] of gates and what they let through, [M, 2 * width]."""
        count, width = len(inputs), inputs.shape[1] // 2
        outputs = torch.empty(count, width, dtype=self.dtype, device=self.device)
        kernels.swiglu[count, -(-width // 1024)](inputs, outputs, width, TILE=1024)
        return outputs


class Tile(NamedTuple):
    """What a program of ``kernels.multiply`` takes at a time; the same for any number of tokens, as its sums must be."""

    columns: int
    inner: int
    stages: int
    warps: int

    @classmethod
    def of(cls, inner: int, gated: bool, dtype: torch.dtype) -> Tile:
        """For sums over ``inner`` products."""
        wide = 256 if dtype.itemsize == 2 else 64
        return cls(16, min(wide, max(16, triton.next_power_of_2(inner))), 3 if gated else 4, 2)


def _blocks(model: GPT) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


def _layer(block: Block) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    norms = [None if norm is None else norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    return Layer(
        norm=block.input_layernorm.weight.detach(),
        qkv=Weights.of(attention.qkv_proj),
        query_norm=norms[0],
        key_norm=norms[1],
        output=Weights.of(attention.o_proj),
        mlp_norm=block.post_attention_layernorm.weight.detach(),
        gate_up=Weights.of(mlp.gate_up_proj),
        down=Weights.of(mlp.down_proj),
    )


def readable(model: GPT) -> bool:
    """Whether kernels are there for this model."""
    weight = model.embed_tokens.weight
    runs = weight.is_cuda or bool(triton.knobs.runtime.interpret)
    is_even = _blocks(model)[0].self_attn.head_dim % 2 == 0
    are_plain = all(type(weight) is nn.Parameter for weight in model.parameters())  # none of torchao's, say
    return runs and weight.dtype in DTYPES and model.pattern is None and is_even and are_plain
