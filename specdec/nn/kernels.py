"""Triton kernels of a decoding pass: what lies between two large products is part of one of them.

A decoding pass on a GPU reads every weight once and does little with it, so it takes as long as that reading does, plus
what every kernel waits for its predecessor: so there are few of them. Importing this module needs triton;
``TRITON_INTERPRET=1`` runs it on the CPU, for tests.

Shapes: M tokens, rows one after another; H heads, G groups (heads of keys and values), R = H / G, D channels of a head.
Every sum runs in an order that depends on the token's own row alone, never on what else is in the pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(
    stream,  # [M, width], float32: the residual stream
    added,  # [M, width], if ADDS: what goes into it first
    weights,  # [width]
    outputs,  # [M, width]
    width,
    epsilon,
    ADDS: tl.constexpr,
    WIDE: tl.constexpr,  # width rounded up to a power of two
):
    """RMSNorm of the residual stream."""
    places = tl.arange(0, WIDE)
    inside = places < width
    row = tl.program_id(0).to(tl.int64) * width
    x = tl.load(stream + row + places, inside, 0.0)
    if ADDS:
        x += tl.load(added + row + places, inside, 0.0).to(tl.float32)
        tl.store(stream + row + places, x, inside)
    x = x * tl.rsqrt(tl.sum(x * x) / width + epsilon) * tl.load(weights + places, inside, 0.0).to(tl.float32)
    tl.store(outputs + row + places, x.to(outputs.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count"])
def multiply(
    inputs,  # [M, inner]
    weights,  # [width, inner], or [2 * width, inner] if GATED
    bias,  # one per row of weights
    outputs,  # [M, width]
    count,  # M
    width,
    inner,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # SwiGLU: the first half of weights makes gates
    WHOLE: tl.constexpr,  # inner is a multiple of TILE_K
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """outputs = inputs @ weights.T, for so few tokens that reading weights is what takes time."""
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    tokens = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    is_token, is_column = tokens < count, columns < width
    source = inputs + tokens[:, None].to(tl.int64) * inner
    matrix = weights + columns[None, :].to(tl.int64) * inner
    found = tl.zeros([TILE_M, TILE_N], tl.float32)
    gates = tl.zeros([TILE_M, TILE_N], tl.float32)
    for begin in tl.range(0, inner, TILE_K, num_stages=STAGES):
        places = begin + tl.arange(0, TILE_K)
        inside = places < inner
        here = is_token[:, None] if WHOLE else is_token[:, None] & inside[None, :]
        there = is_column[None, :] if WHOLE else is_column[None, :] & inside[:, None]
        x = tl.load(source + places[None, :], here, 0.0)
        part = tl.load(matrix + places[:, None], there, 0.0)
        if GATED:
            gates = tl.dot(x, part, gates, input_precision="ieee")
            part = tl.load(matrix + width.to(tl.int64) * inner + places[:, None], there, 0.0)
        found = tl.dot(x, part, found, input_precision="ieee")
    if HAS_BIAS:
        found += tl.load(bias + (width if GATED else 0) + columns, is_column, 0.0)[None, :].to(tl.float32)
    if GATED:
        if HAS_BIAS:
            gates += tl.load(bias + columns, is_column, 0.0)[None, :].to(tl.float32)
        found *= gates / (1 + tl.exp(-gates))
    cells = tokens[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(outputs + cells, found.to(outputs.dtype.element_ty), is_token[:, None] & is_column[None, :])


@triton.jit
def swiglu(
    inputs,  # [M, 2 * width]: gates, and what they let through
    outputs,  # [M, width]
    width,
    TILE: tl.constexpr,
):
    """The activation of a feed-forward layer whose product was made elsewhere."""
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = places < width
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(inputs + row * 2 * width + places, inside, 0.0).to(tl.float32)
    up = tl.load(inputs + (row * 2 + 1) * width + places, inside, 0.0).to(tl.float32)
    tl.store(outputs + row * width + places, (gate / (1 + tl.exp(-gate)) * up).to(outputs.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["stride", "per_row", "layer"])
def turn(
    heads,  # [M, H + 2 G, D]: queries, keys and values
    query_norm,  # [D]
    key_norm,  # [D]
    cosines,  # [positions, D / 2], float32
    sines,
    lengths,  # [B]: tokens in the cache before the pass
    committed,  # [B]: those of them that are no tree
    depths,  # [M]: of a tree's nodes
    memory,  # a block; the others are where their distance from it says
    blocks,  # [B, stride]: where the row's blocks are, counted from ``memory``
    stride,
    queries,  # [M, H, D]
    per_row,  # tokens of a row
    layer,
    epsilon,
    TREE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # D
    HALF: tl.constexpr,  # D / 2, rounded up to a power of two
    BLOCK: tl.constexpr,  # tokens of a block
):
    """Rotate queries and keys by their positions (after an RMSNorm in families that have it); store keys and values."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = token // per_row
    place = tl.load(lengths + row) + token % per_row  # where it goes in its row's cache
    position = tl.load(committed + row) + tl.load(depths + token) if TREE else place
    channels = tl.arange(0, HALF)
    real = channels < SIZE // 2
    source = heads + (token.to(tl.int64) * (HEADS + 2 * GROUPS) + head) * SIZE + channels
    first, second = tl.load(source, real, 0.0), tl.load(source + SIZE // 2, real, 0.0)
    dtype = first.dtype
    if head < HEADS + GROUPS:
        first, second = first.to(tl.float32), second.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / SIZE + epsilon)
            norm = tl.where(
                head < HEADS, tl.load(query_norm + channels, real, 0.0), tl.load(key_norm + channels, real, 0.0)
            )
            first = first * scale * norm.to(tl.float32)
            query_norm += SIZE // 2
            key_norm += SIZE // 2
            norm = tl.where(
                head < HEADS, tl.load(query_norm + channels, real, 0.0), tl.load(key_norm + channels, real, 0.0)
            )
            second = second * scale * norm.to(tl.float32)
        angle = position * (SIZE // 2) + channels
        cosine, sine = tl.load(cosines + angle, real, 0.0), tl.load(sines + angle, real, 0.0)
        turned = first * cosine - second * sine
        second = (second * cosine + first * sine).to(dtype)
        first = turned.to(dtype)
    if head < HEADS:
        target = queries + (token.to(tl.int64) * HEADS + head) * SIZE + channels
        tl.store(target, first, real)
        tl.store(target + SIZE // 2, second, real)
    else:
        group = (head - HEADS) % GROUPS
        is_value = (head - HEADS) // GROUPS
        block = memory + tl.multiple_of(tl.load(blocks + row * stride + place // BLOCK), 64)
        target = block + (((layer * GROUPS + group) * 2 + is_value) * BLOCK + place % BLOCK) * SIZE + channels
        tl.store(target, first, real)
        tl.store(target + SIZE // 2, second, real)


@triton.jit(do_not_specialize=["stride", "tokens_of_pass", "per_row", "layer"])
def attend(
    queries,  # [M, H, D]
    memory,
    blocks,  # [B, stride]
    stride,
    lengths,  # [B]: tokens in the cache before the pass
    committed,  # [B]: those of them that are no tree
    seen,  # [M]: of a tree's node, which of the row's uncommitted tokens it looks at, a bit for each
    mixed,  # [M, H, D], if ALONE
    parts,  # [chunks, M, H, D], else: what every chunk of the row adds,
    peaks,  # [chunks, M, H, 2]: its largest score, and the sum of its weights
    tokens_of_pass,  # M
    per_row,
    layer,
    scale,
    CHUNK: tl.constexpr,  # tokens of the cache that a program looks at; 0: all
    ALONE: tl.constexpr,  # there is one chunk
    TREE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # D rounded up to a power of two
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # queries of a program
    STAGES: tl.constexpr,
):
    """Attention of the heads of a group over the cache, as in flash decoding (Dao et al. 2023): a chunk per program."""
    per_group: tl.constexpr = HEADS // GROUPS
    tiles = tl.cdiv(per_row * per_group, TILE)
    row, group, chunk = tl.program_id(0) // tiles, tl.program_id(1), tl.program_id(2)
    pairs = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    offsets = pairs // per_group
    is_query = offsets < per_row
    tokens = (row * per_row + offsets).to(tl.int64)
    cells = tokens * HEADS + group * per_group + pairs % per_group
    channels = tl.arange(0, WIDE)
    real = channels < SIZE
    places = cells[:, None] * SIZE + channels[None, :]
    wanted = is_query[:, None] & real[None, :]
    query = tl.load(queries + places, wanted, 0.0)
    dtype = query.dtype
    length = tl.load(lengths + row)
    end = length + per_row
    begin = chunk * CHUNK
    stop = tl.minimum(begin + CHUNK, end) if CHUNK else end
    if TREE:
        fixed = tl.load(committed + row)
        looks = tl.load(seen + tokens, is_query, 0)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    found = tl.zeros([TILE, WIDE], tl.float32)
    for start in tl.range(begin, stop, BLOCK, num_stages=STAGES):
        block = memory + tl.multiple_of(tl.load(blocks + row * stride + start // BLOCK), 64)
        keys = block + (layer * GROUPS + group) * 2 * BLOCK * SIZE
        slots = tl.arange(0, BLOCK)
        inside = (start + slots < end)[:, None] & real[None, :]
        cell = slots[:, None] * SIZE + channels[None, :]
        key = tl.load(keys + cell, inside, 0.0)
        value = tl.load(keys + BLOCK * SIZE + cell, inside, 0.0)  # early, so that both are waited for together
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        at = (start + slots)[None, :]
        if TREE:
            bit = (looks[:, None] >> tl.maximum(tl.minimum(at - fixed, 63), 0)) & 1
            visible = (at < fixed) | ((bit == 1) & (at < end))
        else:
            visible = at <= (length + offsets)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp(scores - base[:, None])
        fading = tl.exp(best - base)
        total = total * fading + tl.sum(weights, 1)
        found = found * fading[:, None] + tl.dot(weights.to(dtype), value, input_precision="ieee")
        best = peak
    if ALONE:
        total = tl.where(is_query, total, 1.0)
        tl.store(mixed + places, (found / total[:, None]).to(dtype), wanted)
    else:
        chunk_of = chunk.to(tl.int64) * tokens_of_pass * HEADS
        tl.store(parts + chunk_of * SIZE + places, found, wanted)
        tl.store(peaks + (chunk_of + cells) * 2, best, is_query)
        tl.store(peaks + (chunk_of + cells) * 2 + 1, total, is_query)


@triton.jit(do_not_specialize=["cells", "chunks"])
def combine(
    parts,  # [chunks, M, H, D]
    peaks,  # [chunks, M, H, 2]
    mixed,  # [M, H, D]
    cells,  # M * H
    chunks,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the chunks of a row add up to; those beyond its end weigh nothing."""
    cell = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDE)
    real = channels < SIZE
    best = tl.full((), float("-inf"), tl.float32)
    for chunk in range(chunks):
        best = tl.maximum(best, tl.load(peaks + (chunk * cells + cell) * 2))
    total = tl.full((), 0.0, tl.float32)
    found = tl.zeros([WIDE], tl.float32)
    for chunk in range(chunks):
        here = chunk * cells + cell
        weight = tl.exp(tl.load(peaks + here * 2) - best)
        total += weight * tl.load(peaks + here * 2 + 1)
        found += weight * tl.load(parts + here * SIZE + channels, real, 0.0)
    tl.store(mixed + cell * SIZE + channels, (found / total).to(mixed.dtype.element_ty), real)
