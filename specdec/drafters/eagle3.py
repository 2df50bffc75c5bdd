"""An EAGLE-3 drafter: one layer goes on, token by token, from what the target made of the text."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.draft import Draft
from specdec.drafters.features import FeatureDrafter, TreesOfHead
from specdec.drafters.grown import DEEPEST, MOST_TREE_TOKENS, best, grow
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.packed import pack_linears
from specdec.sampling import is_law
from specdec.sequences import Sequences
from specdec.tree import MOST_NODES, Branches
from specdec.verify import leading


class Eagle3Drafter(FeatureDrafter):
    """Drafts with an ``Eagle3Head`` trained for ``target``, whose features it reads and whose embedding it uses.

    Its cache holds a place per committed token: the token's features beside the token after it. A draft begins with a pass
    over the places that are new, whose last one gives the first guess; each further guess is a pass over the one before.
    A row of which nothing is new (of one token, or a late sample of a prompt) drafts nothing.
    Raises ``ConfigError`` for a head made for another target.
    """

    def __init__(self, head: Eagle3Head, target: CachedLM) -> None:
        config = head.config
        for name, found in (("feature_size", config.target_hidden_size), ("vocab_size", config.decoder.vocab_size)):
            if getattr(target, name) != found:
                raise ConfigError(
                    f"the EAGLE-3 head was trained for a target with {name} {found}, this one has "
                    f"{getattr(target, name)}; train one for it (specdec train TARGET --drafter eagle3)"
                )
        super().__init__(target, head.layers or usual_layers(target.feature_layers + 1))
        own = copy.deepcopy(head).eval().requires_grad_(False).to(target.device, target.dtype)
        self.head = pack_linears(own).share(target.embed, target.project)
        self.context = config.decoder.max_position_embeddings
        # Of the last committed place of every slot.
        self._hidden = torch.zeros(0, config.decoder.hidden_size, dtype=target.dtype, device=target.device)

    @torch.inference_mode()
    def reserve(self, rows: int, length: int) -> None:
        super().reserve(rows, length)
        missing = rows - len(self._hidden)
        if missing > 0:
            self._hidden = torch.cat([self._hidden, self._hidden.new_zeros(missing, self._hidden.shape[1])])

    @torch.inference_mode()
    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        started = time.perf_counter()
        draft = Draft.empty(len(sequences), sequences.device)
        if max(lengths) > 0:
            rows = zip(lengths, self._take(sequences), self.target.lengths, strict=False)
            most = [max(0, min(length, self.context - read)) if new else 0 for length, new, read in rows]
            if max(most) > 0:
                draft = self._chain(sequences, most)
            self.forward_seconds += time.perf_counter() - started
        return draft

    def _read(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
        counts = [len(features) for features in taken]
        padded = pad_sequence(taken, batch_first=True)
        tokens = torch.zeros(padded.shape[:2], dtype=torch.long)
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            place = self.target.starts[first + b] + begin + 1
            tokens[b, :count] = torch.tensor(sequences.rows[first + b].tokens[place : place + count])
        self.cache.begin(begins, padded.shape[1], first)
        hidden = self._pass(tokens.to(self.target.device), self.head.fuse(padded))
        read = [b for b, count in enumerate(counts) if count]
        last = [counts[b] - 1 for b in read]
        self._hidden[[first + b for b in read]] = hidden[read, last]

    def _pass(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] of the places that the cache was opened for."""
        return self.head(self.head.embed(tokens), hidden, self.head.rope(self.cache.positions), self.cache)

    def _chain(self, sequences: Sequences, most: list[int]) -> Draft:
        """At most ``most[b]`` guesses of every row, each drawn before the next is made."""
        rows, places = len(sequences), self.target.lengths[: len(sequences)]
        hidden = self._hidden[:rows].unsqueeze(1)
        tokens = torch.zeros(rows, 0, dtype=torch.long, device=sequences.device)
        laws: list[Tensor] = []
        for i in range(max(most)):
            if i > 0:
                self.cache.begin([place + i - 1 for place in places], 1, 0)
                hidden = self._pass(tokens[:, -1:].to(self.target.device), hidden)
            logits = sequences.fit(self.head.logits(hidden))
            if sequences.only_largest:
                drawn = logits[:, 0].argmax(-1, keepdim=True)
            else:
                laws.append(sequences.draft_laws(logits, tokens))
                drawn = sequences.randomness.draft(i, laws[i])
            tokens = torch.cat([tokens, drawn], dim=1)
        allowed = torch.tensor(most, device=sequences.device)
        if not laws:
            return Draft(tokens, allowed)
        sound = leading(torch.cat([is_law(law) for law in laws], dim=1))  # what was drawn of no law is not proposed
        return Draft(tokens, allowed.minimum(sound), None if sequences.greedy else torch.cat(laws, dim=1))


class Eagle3TreeDrafter(TreesOfHead, Eagle3Drafter):
    """The same, but where the head is unsure it proposes several tokens; ``lengths[b]`` counts the nodes of row b's tree.

    Where trees cannot be verified, it drafts chains.
    """

    def _chain(self, sequences: Sequences, most: list[int]) -> Draft:
        if not sequences.takes_trees or max(most) <= 1:
            return super()._chain(sequences, most)
        places = self.target.lengths[: len(sequences)]
        room = min(self.context - place for place, count in zip(places, most, strict=True) if count)
        known = self._hidden[: len(sequences)].unsqueeze(1)  # [B, 1 + nodes read, H]
        branches = [Branches() for _ in places]

        def read(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal known
            begins = [place + known.shape[1] - 1 for place in places]
            for own, given in zip(branches, parents.tolist(), strict=True):
                own.grow(given)
            self.cache.begin(begins, tokens.shape[1], 0, list(zip(places, branches, strict=True)))
            hidden = known.gather(1, (parents + 1).unsqueeze(-1).expand(-1, -1, known.shape[-1]))
            hidden = self._pass(tokens.to(self.target.device), hidden)
            known = torch.cat([known, hidden], dim=1)
            return self.head.logits(hidden)

        count = min(max(most), MOST_TREE_TOKENS)
        nodes = grow(
            sequences, self.head.logits(known), read, levels=min(DEEPEST, count, room), most=count, room=MOST_NODES
        )
        return best(sequences, nodes, most, count)[0]


def usual_layers(count: int) -> tuple[int, ...]:
    """Those that a head reads whose checkpoint does not say which, of a target with ``count`` layers: vLLM's choice."""
    return (1, count // 2 - 1, count - 4)
