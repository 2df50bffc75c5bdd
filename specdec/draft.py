"""What a drafter proposes, and the protocol every drafter follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.lm.base import CachedLM
    from specdec.sequences import Sequences, Step


@dataclass(frozen=True)
class Draft:
    """Proposed tokens of B rows, and the exact laws they were drawn from.

    tokens [B, K] int64; lengths [B] int64, how many of them each row really proposes (the rest is padding);
    probs [B, K, V] float32, where ``probs[b, i]`` is the very tensor ``tokens[b, i]`` was drawn from, or None when
    every proposal is certain (one-hot laws: lookups, greedy drafts).

    A row's tokens are one text, unless ``parents`` makes them a tree: ``parents[b][i]`` is the place of the token that
    token i follows, -1 for the row's last committed one. Parents come before children; children of one parent are
    different tokens, and the law of each leaves out those drawn before it.
    """

    tokens: Tensor
    lengths: Tensor
    probs: Tensor | None = None
    parents: list[list[int]] | None = None

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Draft:
        """No proposal for any row: the step becomes plain decoding."""
        return cls(*_nothing(rows, device))

    @classmethod
    def certain(cls, tokens: list[list[int]], device: torch.device) -> Draft:
        """These tokens of each row, with one-hot laws; any row may have fewer than others, or none."""
        width = max(map(len, tokens))
        cells = [[len(row), *row, *[0] * (width - len(row))] for row in tokens]
        table = torch.tensor(cells).to(device, non_blocking=True)
        return cls(table[:, 1:], table[:, 0])

    def checked(self, most: Sequence[int], vocab_size: int, drafter: object) -> Draft:
        """Without what is beyond ``most[b]`` tokens of a row. Raises ``ConfigError`` for ids that are no tokens."""
        width = max(most)
        lengths = torch.tensor(most, device=self.lengths.device).minimum(self.lengths)
        tokens, probs = self.tokens[:, :width], None if self.probs is None else self.probs[:, :width]
        parents = self.parents and [own[:count] for own, count in zip(self.parents, most, strict=True)]
        draft = Draft(tokens, lengths, probs, parents)
        wrong = tokens[draft.is_drafted & ((tokens < 0) | (tokens >= vocab_size))]
        if len(wrong):
            raise ConfigError(
                f"{type(drafter).__name__} proposed token id {int(wrong[0])}; the target knows 0 to {vocab_size - 1}"
            )
        return replace(draft, tokens=tokens.where(draft.is_drafted, 0))

    @cached_property
    def is_drafted(self) -> Tensor:
        """Which cells of ``tokens`` are proposals and not padding, [B, K] bool."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths.unsqueeze(1)


class Drafter(Protocol):
    """Anything that proposes tokens. It returns only the draft and never touches the user's models or configs.

    A drafter that runs a model counts the seconds it spends there in an attribute ``forward_seconds``.
    """

    def reserve(self, rows: int, length: int) -> None:
        """Make room for ``rows`` rows of at most ``length`` tokens; called before a run."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        """Propose up to ``lengths[b]`` tokens for each live row; fewer (or none) is always allowed."""

    def observe(self, step: Step) -> None:
        """Learn what was committed; called once after every step."""

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Slot ``target`` now holds the first ``length`` (default: all) tokens of slot ``source``'s row."""

    def free(self, rows: int) -> None:
        """Only the first ``rows`` slots are still in use."""


class Outlook(NamedTuple):
    """What a drafter expects of its next draft, before making it.

    survival [B, K]: the chance that a row's first 1 .. K tokens are all accepted, 0 past what it can propose;
    runs_model [B]: whether a row's tokens cost passes of a model, one each, or nothing.
    """

    survival: NDArray[np.float64]
    runs_model: NDArray[np.bool_]


class Prices(NamedTuple):
    """Costs in accepted tokens per row.

    token: of a model's time for each token that it drafts; alone: of the time that a step takes longer whose guesses come
    from elsewhere, as it cannot run with others in one call.
    """

    token: float = 0.0
    alone: float = 0.0


class Foresight(Protocol):
    """A drafter that knows more of its next draft than how the last ones fared; others need not have this."""

    def outlook(self, sequences: Sequences, most: list[int], prices: Prices) -> Outlook:
        """What to expect of up to ``most[b]`` tokens of each row; a ``propose`` that follows proposes just them."""


class Chains(Protocol):
    """What drafts by itself for several rounds, with a model that goes on from token to token."""

    @property
    def lm(self) -> CachedLM:
        """The model."""

    def room(self, sequences: Sequences) -> int:
        """How many tokens each row may get, drafts included, before the model must begin a new window of one."""

    def unread(self, sequences: Sequences) -> list[int] | None:
        """How many tokens at each row's end the model reads next; None where it cannot read them by itself."""


class DraftsAlone(Protocol):
    """A drafter whose drafts may all come from one model; others need not have this."""

    def alone(self, sequences: Sequences, lengths: list[int], rule: str) -> Chains | None:
        """Who makes all of these drafts, as chains; None where some come from elsewhere, or otherwise."""


class SeesRounds(Protocol):
    """A drafter that learns from several steps at once, in less time; others need not have this."""

    def observe_rounds(self, steps: Sequence[Step]) -> None:
        """As ``observe`` for one after the other, but rows have gone on to the last of them; its model alone drafted."""


def propose(drafter: Drafter, sequences: Sequences, lengths: list[int]) -> Draft:
    """Ask for a draft. What a drafter that is not part of this library proposes is checked."""
    draft = drafter.propose(sequences, lengths)
    if type(drafter).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return draft
    return draft.checked(lengths, sequences.vocab_size, drafter)


@torch.inference_mode()
def tell(drafter: Drafter | None, steps: Sequence[Step]) -> None:
    """Tell ``drafter`` what was committed in these steps."""
    if drafter is None:
        return
    if len(steps) > 1 and hasattr(drafter, "observe_rounds"):
        drafter.observe_rounds(steps)
        return
    for step in steps:
        drafter.observe(step)


@lru_cache(maxsize=256)
def _nothing(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, 0] and lengths [B] of no proposal; kept, because a GPU has to be asked for either."""
    return torch.zeros(rows, 0, dtype=torch.long, device=device), torch.zeros(rows, dtype=torch.long, device=device)
