"""An EAGLE-3 drafter: one layer goes on, token by token, from what the target made of the text."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.draft import Chains, Draft
from specdec.drafters.features import SLACK, FeatureDrafter, TreesOfHead
from specdec.drafters.grown import DEEPEST
from specdec.drafters.model import ModelDrafter
from specdec.drafters.tree import behind
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.lm.fused import fused_lm
from specdec.nn.eagle3 import Eagle3Head
from specdec.sequences import Sequences


class Places(NamedTuple):
    """Tokens [B, T], the hidden states [B, T, H] that they are read beside, and how many of each row are real."""

    tokens: Tensor
    hidden: Tensor
    counts: list[int]


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
        layers = head.layers or usual_layers(target.feature_layers + 1)
        own = copy.deepcopy(head).eval().requires_grad_(False).to(target.device, target.dtype)
        self.lm = fused_lm(own.share(target.embed, target.project), target)
        self._chains = ModelDrafter(self.lm)
        self._latest: Places | None = None  # of this step, not yet read
        super().__init__(target, layers, self.lm)

    @property
    def forward_seconds(self) -> float:
        """Time spent in the head."""
        return self.lm.forward_seconds

    @torch.inference_mode()
    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = Draft.empty(len(sequences), sequences.device)
        if max(lengths) > 0:
            rows = zip(lengths, self._take(sequences), self.target.lengths, strict=False)
            most = [max(0, min(length, self.lm.context - read)) if new else 0 for length, new, read in rows]
            latest, self._latest = self._latest, None
            if max(most) > 0:
                assert latest is not None
                self.lm.give(latest.hidden)
                draft = self._guess(sequences, most, latest.tokens, [max(1, count) for count in latest.counts])
                self.lm.keep(latest.counts)  # what was guessed was never there
            elif latest is not None:
                self._append(latest, 0)
        return draft

    def free(self, rows: int) -> None:
        super().free(rows)
        self._latest = None

    def alone(self, sequences: Sequences, lengths: list[int], rule: str) -> Chains | None:
        """This drafter, but not those derived from it: they do more."""
        return self if type(self) is Eagle3Drafter else None

    def room(self, sequences: Sequences) -> int:
        """How many tokens each row may get, drafts included."""
        ends = zip(sequences.rows, self.target.starts, strict=False)
        return min(start + self.lm.context - len(row.tokens) for row, start in ends)

    def unread(self, sequences: Sequences) -> list[int] | None:
        """How many tokens of each row's end the head reads next; None where it cannot read them by itself."""
        slots = range(len(sequences))
        counts = [self.target.features_held(slot) for slot in slots]
        missing = [self.target.lengths[slot] - self.lm.lengths[slot] for slot in slots]
        if (
            getattr(self.lm, "fuse", None) is None
            or counts != missing
            or not 0 < min(counts) <= max(counts) <= SLACK + 1
        ):
            return None
        self._rows = max(self._rows, len(slots))
        return counts

    def _guess(self, sequences: Sequences, most: list[int], tokens: Tensor, counts: list[int]) -> Draft:
        """At most ``most[b]`` guesses of every row behind tokens [B, T], whose hidden states are given."""
        return self._chains.behind(sequences, most, max(most), tokens, counts)

    def _read(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
        self._append(self._places(sequences, taken, begins, first), first)

    def _read_last(self, sequences: Sequences, taken: list[Tensor], begins: list[int]) -> None:
        self._latest = self._places(sequences, taken, begins, 0)

    def _append(self, places: Places, first: int) -> None:
        self.lm.give(places.hidden)
        self.lm.append(places.tokens, [max(1, count) for count in places.counts], first=first, last_only=True)
        self.lm.keep(places.counts, first=first)

    def _places(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> Places:
        """What these features are read as; what the slots hold beyond ``begins`` is forgotten."""
        counts = [len(features) for features in taken]
        padded = pad_sequence(taken, batch_first=True)
        tokens = torch.zeros(padded.shape[:2], dtype=torch.long)
        for slot, (begin, count) in enumerate(zip(begins, counts, strict=True), first):
            if begin < self.lm.lengths[slot]:
                self.lm.copy(slot, slot, begin)
            place = self.target.starts[slot] + begin + 1
            tokens[slot - first, :count] = torch.tensor(sequences.rows[slot].tokens[place : place + count])
        with self.lm.clock.timed():
            hidden = self.lm.head.fuse(padded)
        return Places(tokens, hidden, counts)


class Eagle3TreeDrafter(TreesOfHead, Eagle3Drafter):
    """The same, but where the head is unsure it proposes several tokens; ``lengths[b]`` counts the nodes of row b's tree.

    Where trees cannot be verified, it drafts chains.
    """

    def _guess(self, sequences: Sequences, most: list[int], tokens: Tensor, counts: list[int]) -> Draft:
        if not sequences.takes_trees or max(most) <= 1:
            return super()._guess(sequences, most, tokens, counts)
        levels = min(DEEPEST, max(most))
        return behind(self.lm, lambda tokens: tokens, sequences, most, levels, tokens, counts)[0]


def usual_layers(count: int) -> tuple[int, ...]:
    """Those that a head reads whose checkpoint does not say which, of a target with ``count`` layers: vLLM's choice."""
    return (1, count // 2 - 1, count - 4)
