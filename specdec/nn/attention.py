"""Attention that does not look at everything: patterns for long contexts, each behind one interface.

Full attention of n tokens makes n^2 / 2 scores. Every pattern here makes fewer, in training and when tokens come one by
one, and says with ``reference`` what it computes, densely and plainly; tests hold ``attend`` to it.

- ``Full``, ``Window`` (Longformer, Beltagy et al. 2020, arXiv 2004.05150, with attention sinks, Xiao et al. 2023),
  ``BigBird`` (Zaheer et al. 2020, arXiv 2007.14062), ``Axial`` (Ho et al. 2019, arXiv 1912.12180): softmax over some keys.
- ``Pooled`` (Liu et al. 2018, arXiv 1801.10198) and ``LowRank`` (Linformer, Wang et al. 2020, arXiv 2006.04768): a block
  of 64 tokens that is complete is seen as a few means or learned mixtures; the query's own block token by token. So no
  token sees later ones, which Linformer's mixtures over the whole text would.
- ``Hierarchical``: the mean keys of complete blocks choose which of them are looked at token by token (as in Yuan et al.
  2025, arXiv 2502.11089, without its training of the choice).
- ``Linear`` (Katharopoulos et al. 2020, arXiv 2006.16236; random features: Choromanski et al. 2020, arXiv 2009.14794):
  a feature map takes the place of softmax, and the past is one matrix per head.

Shapes: B rows, H heads, T queries, L keys, D head size; queries are scaled here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 64


class Pattern(nn.Module, ABC):
    """Who may look at whom, and how."""

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Of whole texts: queries, keys and values [B, H, T, D]; [B, H, T, D]."""

    @abstractmethod
    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Of the queries [B, H, T, D] at ``positions`` [B, T], over keys and values [B, H, L, D] of all tokens so far."""

    @abstractmethod
    def scores(self, length: int) -> int:
        """How many scores one head makes of a text of ``length`` tokens."""


class _Masked(Pattern):
    """Softmax over the keys that a mask allows."""

    @abstractmethod
    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the token at position ``queries`` may look at the one at ``keys``; shapes are broadcast."""

    @abstractmethod
    def blocks(self, count: int) -> Tensor:
        """Which of ``count`` blocks of keys each block of queries may look at, [count, M]; -1 for none."""

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        places = torch.arange(keys.shape[2], device=keys.device)
        visible = self.visible(positions.unsqueeze(-1), places) & (places <= positions.unsqueeze(-1))
        return _softmax(queries, keys, values, visible.unsqueeze(1))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Blocks of queries over the blocks of keys that they may look at."""
        length = queries.shape[2]
        count = -(-length // BLOCK)
        table = self.blocks(count).to(queries.device)
        q, k, v = (_in_blocks(x, count) for x in (queries, keys, values))
        k, v = (x[:, :, table.clamp(min=0)].flatten(3, 4) for x in (k, v))  # [B, H, count, M * BLOCK, D]
        places = torch.arange(count * BLOCK, device=queries.device).view(count, BLOCK)
        seen = places[table.clamp(min=0)].masked_fill((table < 0).unsqueeze(-1), length).flatten(1)
        own, seen = places.unsqueeze(-1), seen.unsqueeze(1)
        visible = self.visible(own, seen) & (seen <= own) & (seen < length)
        mixed = _softmax(q, k, v, visible | (own >= length))  # padding looks anywhere, for finite numbers
        return mixed.flatten(2, 3)[:, :, :length]

    def scores(self, length: int) -> int:
        count = -(-length // BLOCK)
        return int((self.blocks(count) >= 0).sum()) * BLOCK**2


class Full(_Masked):
    """Every token looks at all before it."""

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        return keys <= queries

    def blocks(self, count: int) -> Tensor:
        places = torch.arange(count).expand(count, -1)
        return places.where(places <= torch.arange(count).unsqueeze(1), -1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    def scores(self, length: int) -> int:
        return length * (length + 1) // 2


class Window(_Masked):
    """The latest ``size`` tokens and the first ``sinks`` ones."""

    def __init__(self, size: int = 256, sinks: int = 4) -> None:
        super().__init__()
        self.size, self.sinks = size, sinks

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (queries - keys < self.size) | (keys < self.sinks)

    def blocks(self, count: int) -> Tensor:
        return _near(count, self.size, -(-self.sinks // BLOCK))


class BigBird(_Masked):
    """A window, the first ``sinks`` tokens, and ``random`` blocks of 64 tokens further back for each block."""

    def __init__(self, size: int = 128, sinks: int = 64, random: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.size, self.sinks, self.random, self.seed = size, sinks, random, seed

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        near = (queries - keys < self.size) | (keys < self.sinks)
        blocks, wanted = queries // BLOCK, keys // BLOCK
        chosen = self._chosen(int(blocks.max()) + 1).to(queries.device)[blocks]
        return near | (chosen == wanted.unsqueeze(-1)).any(-1)

    def blocks(self, count: int) -> Tensor:
        near = _near(count, self.size, -(-self.sinks // BLOCK))
        far = self._chosen(count)
        twice = (far.unsqueeze(-1) == near.unsqueeze(1)).any(-1)
        return torch.cat([near, far.masked_fill(twice, -1)], dim=1)

    def _chosen(self, count: int) -> Tensor:
        return _random_blocks(count, self.random, self.seed)


class Axial(Pattern):
    """The text as rows of ``width`` tokens: a token looks along its row and up its column."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, heads, length, size = queries.shape
        count = -(-length // self.width)
        q, k, v = (_in_blocks(x, count, self.width) for x in (queries, keys, values))  # [B, H, count, width, D]
        q = q * size**-0.5
        along = q @ k.transpose(-1, -2)
        upward = (q.transpose(2, 3) @ k.transpose(2, 3).transpose(-1, -2)).transpose(
            2, 3
        )  # [B, H, count, width, count]
        infinity = float("-inf")
        along = along.masked_fill(
            torch.ones(self.width, self.width, dtype=torch.bool, device=q.device).triu(1), infinity
        )
        later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(0)  # the own row is counted already
        upward = upward.masked_fill(later.unsqueeze(1), infinity)
        weights = torch.cat([along, upward], dim=-1).softmax(-1)
        mixed = weights[..., : self.width] @ v
        mixed = mixed + (weights[..., self.width :].transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)
        return mixed.reshape(rows, heads, -1, size)[:, :, :length]

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        own, places = positions.unsqueeze(-1), torch.arange(keys.shape[2], device=keys.device)
        visible = (places // self.width == own // self.width) | (places % self.width == own % self.width)
        return _softmax(queries, keys, values, (visible & (places <= own)).unsqueeze(1))

    def scores(self, length: int) -> int:
        count = -(-length // self.width)
        return count * self.width * (self.width + count)


class _Summarised(Pattern):
    """Complete blocks of 64 tokens are seen as ``summaries`` keys and values; the query's own block token by token."""

    def __init__(self, summaries: int = 4) -> None:
        super().__init__()
        self.summaries = summaries

    @abstractmethod
    def summarise(self, blocks: Tensor) -> Tensor:
        """Of keys or values [..., BLOCK, D], [..., summaries, D]."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        length = queries.shape[2]
        count = -(-length // BLOCK)
        q, k, v = (_in_blocks(x, count) for x in (queries, keys, values))
        short = [self.summarise(x).flatten(2, 3) for x in (k, v)]  # [B, H, count * summaries, D]
        both = [
            torch.cat([x.unsqueeze(2).expand(-1, -1, count, -1, -1), own], dim=3)
            for x, own in zip(short, (k, v), strict=True)
        ]
        places, block = torch.arange(BLOCK, device=q.device), torch.arange(count, device=q.device)
        earlier = block.repeat_interleave(self.summaries) < block.unsqueeze(1)  # [count, count * summaries]
        own = (places <= places.unsqueeze(1)).expand(count, -1, -1)
        visible = torch.cat([earlier.unsqueeze(1).expand(-1, BLOCK, -1), own], dim=-1)
        return _softmax(q, both[0], both[1], visible).flatten(2, 3)[:, :, :length]

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        full = keys.shape[2] // BLOCK
        both = []
        for x in (keys, values):
            whole = x[:, :, : full * BLOCK].unflatten(2, (full, BLOCK))
            both.append(torch.cat([self.summarise(whole).flatten(2, 3), x], dim=2))
        own, places = positions.unsqueeze(-1), torch.arange(keys.shape[2], device=keys.device)
        block = torch.arange(full, device=keys.device).repeat_interleave(self.summaries)
        near = (places // BLOCK == own // BLOCK) & (places <= own)
        visible = torch.cat([block < own // BLOCK, near], dim=-1)
        return _softmax(queries, both[0], both[1], visible.unsqueeze(1))

    def scores(self, length: int) -> int:
        count = -(-length // BLOCK)
        return count * BLOCK * (BLOCK + count * self.summaries)


class Pooled(_Summarised):
    """Means of neighbouring keys and values."""

    def summarise(self, blocks: Tensor) -> Tensor:
        return blocks.unflatten(-2, (self.summaries, -1)).mean(-2)


class LowRank(_Summarised):
    """Learned mixtures of a block's keys and values."""

    def __init__(self, summaries: int = 4) -> None:
        super().__init__(summaries)
        start = torch.eye(summaries).repeat_interleave(BLOCK // summaries, dim=1) * summaries / BLOCK  # means
        self.mixture = nn.Parameter(start)

    def summarise(self, blocks: Tensor) -> Tensor:
        return self.mixture.to(blocks.dtype) @ blocks


class Hierarchical(Pattern):
    """The ``chosen`` complete blocks whose mean key the query likes best, and its own block, token by token."""

    def __init__(self, chosen: int = 4) -> None:
        super().__init__()
        self.chosen = chosen

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        length = queries.shape[2]
        count = -(-length // BLOCK)
        q, k, v = (_in_blocks(x, count) for x in (queries, keys, values))
        q = q * q.shape[-1] ** -0.5
        places = torch.arange(count * BLOCK, device=q.device).view(count, BLOCK)
        liked = self._liked(q.flatten(2, 3), k, places.flatten()).unflatten(2, (count, BLOCK))
        mixed = [  # every token looks at blocks of its own: gathered for one block of queries at a time, in backward again
            checkpoint(self._of_block, q[:, :, own], k, v, liked[:, :, own], own, use_reentrant=False)
            for own in range(count)
        ]
        return torch.cat(mixed, dim=2)[:, :, :length]

    def _of_block(self, queries: Tensor, keys: Tensor, values: Tensor, liked: Tensor, own: int) -> Tensor:
        """Of the queries [B, H, BLOCK, D] of the block ``own``, over keys and values [B, H, count, BLOCK, D]."""
        places = torch.arange(BLOCK, device=queries.device)
        near = queries @ keys[:, :, own].transpose(-1, -2)
        near = near.masked_fill(places > places.unsqueeze(1), float("-inf"))
        rows, heads = (
            torch.arange(n, device=queries.device).view(shape)
            for n, shape in ((keys.shape[0], (-1, 1, 1, 1)), (keys.shape[1], (-1, 1, 1)))
        )
        index = liked.clamp(min=0)  # [B, H, BLOCK, chosen]
        far_keys, far_values = (x[rows, heads, index].flatten(3, 4) for x in (keys, values))
        far = (far_keys @ queries.unsqueeze(-1)).squeeze(-1)
        far = far.masked_fill((liked < 0).repeat_interleave(BLOCK, dim=-1), float("-inf"))
        weights = torch.cat([near, far], dim=-1).softmax(-1)
        return weights[..., :BLOCK] @ values[:, :, own] + (weights[..., None, BLOCK:] @ far_values).squeeze(-2)

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        full, places = keys.shape[2] // BLOCK, torch.arange(keys.shape[2], device=keys.device)
        own = positions[:, None, :, None]
        near = (places // BLOCK == own // BLOCK) & (places <= own)
        if not full:
            return _softmax(queries, keys, values, near)
        blocks = keys[:, :, : full * BLOCK].unflatten(2, (full, BLOCK))
        liked = self._liked(queries, blocks, positions[:, None])
        far = (liked.unsqueeze(-1) == places // BLOCK).any(-2)
        return _softmax(queries, keys, values, near | far)

    def scores(self, length: int) -> int:
        return length * (-(-length // BLOCK) + (1 + self.chosen) * BLOCK)

    def _liked(self, queries: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
        """Blocks [B, H, T, chosen] of keys [B, H, count, BLOCK, D], -1 where there are fewer before the query's own."""
        count = blocks.shape[2]
        liking = queries @ blocks.mean(3).transpose(-1, -2)
        later = torch.arange(count, device=blocks.device) >= positions.unsqueeze(-1) // BLOCK
        found = liking.masked_fill(later, float("-inf")).topk(min(self.chosen, count), dim=-1)
        return found.indices.masked_fill(found.values == float("-inf"), -1)


class Linear(Pattern):
    """A feature map in place of softmax: "elu" (elu + 1), or "random" (positive random features of the softmax kernel)."""

    def __init__(self, features: str = "elu", size: int = 64, head_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.features = features
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("directions", torch.randn(size, head_size, generator=generator))

    def map(self, x: Tensor) -> Tensor:
        """Positive features [..., F] of queries or keys [..., D]."""
        if self.features == "elu":
            return F.elu(x.float()) + 1
        assert isinstance(self.directions, Tensor)
        x = x.float() * x.shape[-1] ** -0.25
        projected = x @ self.directions.t() - x.square().sum(-1, keepdim=True) / 2
        return projected.exp() / math.sqrt(len(self.directions)) + 1e-6

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Within blocks by scores, across them by the state of all before."""
        length = queries.shape[2]
        count = -(-length // BLOCK)
        q, k, v = (_in_blocks(x, count) for x in (self.map(queries), self.map(keys), _with_ones(values)))
        state = k.transpose(-1, -2) @ v  # [B, H, count, F, D + 1]
        before = state.cumsum(2) - state
        mixed = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
        return _divided(mixed.flatten(2, 3)[:, :, :length], values)

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        places = torch.arange(keys.shape[2], device=keys.device)
        weights = self.map(queries) @ self.map(keys).transpose(-1, -2)
        weights = weights * (places <= positions.unsqueeze(-1)).unsqueeze(1)
        return _divided(weights @ _with_ones(values), values)

    def step(self, state: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One more token [B, H, D] behind a ``state`` [B, H, F, D + 1] (zeros at first): the state then, and its output."""
        state = state + self.map(key).unsqueeze(-1) * _with_ones(value).unsqueeze(-2)
        mixed = (self.map(query).unsqueeze(-2) @ state).squeeze(-2)
        return state, _divided(mixed, value)

    def scores(self, length: int) -> int:
        return -(-length // BLOCK) * BLOCK**2


PATTERNS: dict[str, type[Pattern]] = {
    "full": Full, "window": Window, "bigbird": BigBird, "axial": Axial, "pooled": Pooled, "low rank": LowRank,
    "hierarchical": Hierarchical, "linear": Linear,
}  # fmt: skip


def _softmax(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _in_blocks(x: Tensor, count: int, size: int = BLOCK) -> Tensor:
    """[B, H, T, D] as [B, H, count, size, D], zeros behind the end."""
    return F.pad(x, (0, 0, 0, count * size - x.shape[2])).unflatten(2, (count, size))


def _near(count: int, size: int, first: int) -> Tensor:
    """Per block of queries, the blocks within ``size`` tokens before it and the ``first`` ones, [count, M]; -1 for none."""
    back = -(-(size - 1) // BLOCK)
    own = torch.arange(count).unsqueeze(1)
    near = own - torch.arange(back, -1, -1)
    sinks = torch.arange(min(first, count)).expand(count, -1)
    return torch.cat([sinks.masked_fill(sinks >= near[:, :1].clamp(min=0), -1), near.clamp(min=-1)], dim=1)


@lru_cache(maxsize=64)
def _random_blocks(count: int, number: int, seed: int) -> Tensor:
    """``number`` different blocks before each of ``count``, [count, number]; -1 where there are fewer.

    A block's choice depends on its own number alone, so that a longer text changes nothing.
    """
    chosen = torch.full((count, number), -1)
    for block in range(1, count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        found = torch.randperm(block, generator=generator)[:number]
        chosen[block, : len(found)] = found
    return chosen


def _with_ones(values: Tensor) -> Tensor:
    """Values, and a 1 whose mixture is the sum of the weights."""
    return F.pad(values.float(), (0, 1), value=1.0)


def _divided(mixed: Tensor, like: Tensor) -> Tensor:
    return (mixed[..., :-1] / mixed[..., -1:]).to(like.dtype)
