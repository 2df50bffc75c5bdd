"""A block drafter: one pass of a small transformer over what the target made of the text guesses a whole block."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.drafters.features import FeatureDrafter, TreesOfHead
from specdec.drafters.grown import MOST_TREE_TOKENS, best, grow
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.lm.blocks import blocks_of
from specdec.nn.block import BlockHead
from specdec.sampling import is_law
from specdec.sequences import Sequences
from specdec.tree import MOST_NODES
from specdec.verify import leading

LEAST_SURVIVAL = 0.1  # a guess is drafted while the chance that it and all before it are accepted is no smaller


class BlockDrafter(FeatureDrafter):
    """Drafts with a ``BlockHead`` trained for ``target``, whose features it reads and whose embedding and head it uses.

    The pass depends on the text alone, not on how many tokens are asked for. A draft ends where the head's confidence,
    multiplied along it, falls below ``least_survival`` (0: never). That of a guess is known before the guess is drawn;
    whatever looks at a drawn token to decide whether to propose it would bias the text (DSpark, appendix A).
    Raises ``ConfigError`` for a head made for another target.
    """

    def __init__(self, head: BlockHead, target: CachedLM, *, least_survival: float = LEAST_SURVIVAL) -> None:
        config = head.config
        for name, found in (("feature_size", config.hidden_size), ("vocab_size", config.vocab_size)):
            if getattr(target, name) != found:
                raise ConfigError(
                    f"the block drafter was trained for a target with {name} {found}, this one has "
                    f"{getattr(target, name)}; train one for it (specdec train TARGET --drafter block)"
                )
        if not 0 <= least_survival < 1:
            raise ConfigError(f"least_survival must be in [0, 1), got {least_survival}")
        own = copy.deepcopy(head).eval().requires_grad_(False).to(target.device, target.dtype)
        self.head = own.share(target.embed, target.project)
        self.least_survival, self._doubts = least_survival, own.doubts().float()
        self.blocks, self.forward_seconds = blocks_of(own), 0.0
        super().__init__(target, head.layers, self.blocks)

    @torch.inference_mode()
    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        if max(lengths) <= 0:
            return Draft.empty(len(sequences), sequences.device)
        started = time.perf_counter()
        self._take(sequences)
        draft = self._draft(sequences, lengths)
        self.forward_seconds += time.perf_counter() - started
        return draft

    def _draft(self, sequences: Sequences, lengths: list[int]) -> Draft:
        """Guesses of all rows, whose new features have been read."""
        count = min(max(lengths), self.head.config.block_size)
        hidden = self._block(sequences)[:, :count]
        return self._draw(sequences, hidden, torch.tensor(lengths, device=sequences.device))

    def _read(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
        self.blocks.write(taken, begins, first)

    def _block(self, sequences: Sequences) -> Tensor:
        """Hidden states [B, K, H] of the blocks that begin with every row's last token."""
        anchors = sequences.last_tokens.to(self.target.device)
        return self.blocks.read(anchors, self.target.lengths[: len(sequences)])

    def _draw(self, sequences: Sequences, hidden: Tensor, most: Tensor) -> Draft:
        """Draw guesses of hidden states [B, K, H] one after another, at most ``most`` [B] of each row."""
        head, width = self.head, hidden.shape[1]
        base = sequences.fit(head.shared.lm_head(hidden))
        confidence = head.confidence(hidden).squeeze(-1).float()
        tokens = torch.cat([sequences.last_tokens, torch.zeros_like(sequences.last_tokens).expand(-1, width)], dim=1)
        survival = torch.ones_like(confidence[:, 0])
        goes_on = torch.arange(width, device=most.device) < most.unsqueeze(1)
        laws: list[Tensor] = []
        for i in range(width):
            before = tokens[:, i]
            if self.least_survival:
                survival = survival * (confidence[:, i] + self._doubts[before]).sigmoid()
                goes_on[:, i] &= survival >= self.least_survival  # of nothing that is not yet drawn
                if goes_on.is_cpu and not goes_on[:, i].any():
                    width = i
                    break
            logits = base[:, i] + head.correction(before)[:, : base.shape[-1]]
            if sequences.only_largest:
                tokens[:, i + 1] = logits.argmax(-1)
            else:
                laws.append(sequences.draft_laws(logits.unsqueeze(1), tokens[:, 1 : i + 1]))
                tokens[:, i + 1 : i + 2] = sequences.randomness.draft(i, laws[-1])
        tokens, lengths = tokens[:, 1 : width + 1], leading(goes_on)
        if not laws:
            return Draft(tokens, lengths)
        probs = torch.cat(laws, dim=1)
        lengths = lengths.minimum(leading(is_law(probs)))  # what was drawn of no law is not proposed
        return Draft(tokens, lengths, None if sequences.greedy else probs)


class BlockTreeDrafter(TreesOfHead, BlockDrafter):
    """The same, but where the head is unsure it proposes several tokens; ``lengths[b]`` counts the nodes of row b's tree.

    One pass says what comes at every level; what follows a node differs by the bigram term. Which nodes are proposed is
    decided by their probability, not by the head's confidence. Where trees cannot be verified, it drafts chains.
    """

    def _draft(self, sequences: Sequences, lengths: list[int]) -> Draft:
        if not sequences.takes_trees or max(lengths) <= 1:
            return super()._draft(sequences, lengths)
        most = min(max(lengths), MOST_TREE_TOKENS)
        base = sequences.fit(self.head.shared.lm_head(self._block(sequences)))
        level = 0

        def after(tokens: Tensor) -> Tensor:
            return base[:, level : level + 1] + self.head.correction(tokens)[..., : base.shape[-1]]

        def read(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal level
            level += 1
            return after(tokens)

        levels = min(base.shape[1], most)
        nodes = grow(sequences, after(sequences.last_tokens), read, levels=levels, most=most, room=MOST_NODES)
        return best(sequences, nodes, lengths, most)[0]
