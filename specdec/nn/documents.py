"""Packed documents: rows that hold several texts, none of which sees another.

Positions restart with every document, so that each is computed as if it stood alone. On CPU attention runs document by
document, which costs less the shorter they are; on a GPU it is one FlexAttention kernel that skips what is masked.

Shapes: B rows, T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.nn.causal import causal_attention


class Documents:
    """Where the documents of tokens [B, T] lie; each ends with the token ``end_of_text``, or with its row."""

    def __init__(self, tokens: Tensor, end_of_text: int) -> None:
        self.tokens, self.end_of_text = tokens, end_of_text
        rows, length = tokens.shape
        ends = tokens == end_of_text
        self.ids = F.pad(ends[:, :-1].long().cumsum(1), (1, 0))
        place = torch.arange(length, device=tokens.device).expand(rows, -1)
        begins = F.pad(ends[:, :-1], (1, 0))
        self.positions = place - torch.where(begins, place, 0).cummax(1).values
        self.learned = ~ends  # the label of an end of text is the first token of a document that it does not see
        self._sizes: list[int] | None = None
        self._block_mask: Any = None

    def to(self, device: torch.device) -> Documents:
        """The same documents for a model on another device."""
        return Documents(self.tokens.to(device), self.end_of_text)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        """Causal attention inside documents of queries [B, T, H, D] over keys and values [B, T, G, D]; [B, T, H, D]."""
        if queries.device.type == "cuda":
            return self._attend_masked(queries, keys, values, dropout)
        parts = zip(*(x.flatten(0, 1).split(self.sizes) for x in (queries, keys, values)), strict=True)
        mixed = [_causal(queries, keys, values, dropout) for queries, keys, values in parts]
        return torch.cat(mixed).view(*self.ids.shape, *mixed[0].shape[1:])

    @property
    def sizes(self) -> list[int]:
        """Tokens of every document, row after row."""
        if self._sizes is None:
            begins = (self.positions == 0).flatten().nonzero().flatten().tolist()
            self._sizes = [
                end - begin for begin, end in zip(begins, [*begins[1:], self.positions.numel()], strict=True)
            ]
        return self._sizes

    def _attend_masked(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        if dropout:  # FlexAttention has none
            mask = (self.ids[:, None, :, None] == self.ids[:, None, None, :]).tril()
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, mask, dropout, enable_gqa=queries.shape[1] != keys.shape[1]
            )
        else:
            mixed = _flex_attention()(queries, keys, values, block_mask=self.block_mask(), enable_gqa=True)
        return mixed.transpose(1, 2)

    def block_mask(self) -> Any:
        """FlexAttention's description of who sees whom; the same for all layers."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            ids, (rows, length) = self.ids, self.ids.shape

            def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (query >= key) & (ids[row, query] == ids[row, key])

            self._block_mask = create_block_mask(sees, rows, None, length, length, device=ids.device)
        return self._block_mask


def _causal(queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
    """Attention of one document: queries [T, H, D], keys and values [T, G, D]."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
    return causal_attention(queries, keys, values, dropout)[0].transpose(0, 1)


@cache
def _flex_attention() -> Any:
    """FlexAttention compiled once; without compilation it would materialise every score."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
