"""An EAGLE-3 head as a language model: on torch, or compiled for the processor.

It reads every token beside a hidden state. Those of committed tokens are given (what the target made of the text, fused);
a token that is appended without one is read beside what came out for the token before it, in a tree for its parent.

Shapes: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache
from specdec.lm.cpu import CpuLM, Tokens
from specdec.nn.cpu import CompiledLinear
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.nn.packed import pack_linears


class FusedLM(CachedLM):
    """What both ways have in common. What is committed are tokens with given hidden states, never others."""

    reads_trees = True
    head: Eagle3Head
    _given: Tensor | None = None
    _parents: Sequence[Sequence[int]] | None = None

    def give(self, hidden: Tensor) -> None:
        """Hidden states [B, T, H] for the tokens of the next pass."""
        self._given = hidden

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        read = self.lengths[source]  # what the target has read beyond it has yet to be given
        super().copy(source, target, read if length is None else min(length, read))

    def wipe(self, first: int, last: int) -> None:
        """Nothing is left in slots ``first`` to ``last`` (exclusive)."""
        for slot in range(first, last):
            self.forget(slot)

    def _branch(self, parents: Sequence[Sequence[int]] | None, first: int, rows: int) -> None:
        super()._branch(parents, first, rows)
        self._parents = parents

    def _beside(self, rows: int, width: int) -> Tensor:
        """The hidden states [B, T, H] for the pass that begins."""
        given, self._given = self._given, None
        if given is not None:
            counts = [width] * rows if self._counts is None else self._counts
            self._ends = torch.tensor(counts, device=self.device) - 1  # places since ``keep`` of those put out first
            return given
        if self._parents is None:
            return self._known[:, -1:]
        places = torch.tensor(self._parents, device=self.device) - self._ends[:, None]
        return self._known.gather(1, places.unsqueeze(-1).expand(-1, -1, self._known.shape[-1]))

    def _put_out(self, states: Tensor, *, is_first: bool) -> None:
        """Remember what the pass has put out, [B, T, H]: if it ``is_first``, of every row's last real token."""
        if is_first:
            self._known = states[torch.arange(len(states), device=self.device), self._ends].unsqueeze(1)
        else:
            self._known = torch.cat([self._known, states], dim=1)


class TorchFused(FusedLM):
    """On torch, on any device; ``head`` is not kept as it is: its linear layers are packed."""

    def __init__(self, head: Eagle3Head) -> None:
        decoder, weight = head.config.decoder, head.norm.weight
        super().__init__(decoder.vocab_size, decoder.max_position_embeddings, weight.device, weight.dtype)
        self.head, self.cache = pack_linears(head), RaggedCache(weight.dtype, weight.device)

    def _reserve(self, rows: int, length: int) -> None:
        self.cache.reserve(rows, length)

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        is_first = self._given is not None
        hidden = self._beside(*tokens.shape)
        self.cache.begin(lengths, tokens.shape[1], first, self._trees(first, len(tokens)))
        states = self.head(self.head.embed(tokens), hidden, self.head.rope(self.cache.positions), self.cache)
        self._put_out(states, is_first=is_first)
        return states

    def _head(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _wipe(self, first: int, last: int) -> None:
        self.cache.wipe(first, last)


class CompiledFused(FusedLM, CpuLM):
    """By nn/cpu.c, whole chains of guesses at once, with the embedding of ``target`` or the head's own.

    Raises ``LookupError`` where nothing is compiled for this processor and dtype, or for this kind of head.
    """

    def __init__(self, head: Eagle3Head, target: CachedLM) -> None:
        if head.is_trimmed or head.config.norm_output:
            raise LookupError("heads that guess some tokens only, or feed back what is normed, are run by torch")
        embedding = target.embedding() if head.embed_tokens is None else head.embed_tokens.weight.detach()
        with torch.device("meta"):
            shell = GPT(head.config.decoder)
        for name, part in (("layers", nn.ModuleList([head.block])), ("norm", head.norm), ("lm_head", head.lm_head)):
            setattr(shell, name, part)
        shell.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
        CpuLM.__init__(self, shell)
        self._packed.read_beside(head.block.hidden_norm, keeps_norm=head.config.norm_before_residual)
        for name in ("block", "lm_head"):  # the packed ones are enough
            setattr(head, name, nn.Identity())
        fc = CompiledLinear(self._library, head.fc)
        setattr(head, "fc", fc)  # noqa: B010 (it is no nn.Linear)
        if head.input_norm is None and head.fc_norm is None and fc.by.k == fc.in_features:
            self.fuse = fc.by
        self.head = head
        self._tapped = np.zeros(1, dtype=np.int64)  # its only layer

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        is_first = self._given is not None
        self._hidden = self._beside(*tokens.shape)
        states = super()._forward(tokens, lengths, first, needs_logits=needs_logits)
        assert self._outputs is not None
        self._put_out(self._outputs, is_first=is_first)
        return states

    def _chain(
        self, tokens: Tensor, counts: Sequence[int], count: int, choices: int, function: int | None, asked: int | None
    ) -> tuple[Tensor, int, Tensor] | None:
        self._counts, self._parents, given = counts, None, self._given
        self._hidden = self._beside(*tokens.shape)
        found = super()._chain(tokens, counts, count, choices, function, asked)
        if found is None:
            self._given = given
        else:
            self._known = self._scratch[0][: len(tokens), None, : self._packed.hidden].to(self.dtype)
        return found

    def _enter(self, read: Tokens, first: int) -> None:
        begins = np.array(self.lengths[first:]) + np.array(self._pending[first:])
        offsets = read.places - begins[read.row_of]
        states = self._hidden[torch.from_numpy(read.row_of), torch.from_numpy(offsets)]
        self._scratch[0][: len(states), : states.shape[-1]] = states


def fused_lm(head: Eagle3Head, target: CachedLM) -> FusedLM:
    """``head`` for ``target``, compiled where that is possible; it is used up."""
    try:
        return CompiledFused(head, target)
    except LookupError:
        return TorchFused(head)
