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

_OFF = 1e-2  # that sums of half precision may be from 1

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
        """Without what is beyond ``most[b]`` tokens of a row.

        Raises ``ConfigError``, which names the ``drafter``, for what is no draft of so many rows: other shapes and types, ids
        that are no tokens, laws that are none.
        """
        rows, width, name = len(most), max(most), type(drafter).__name__
        _expect(self.tokens, "tokens", (rows, None), name)
        _expect(self.lengths, "lengths", (rows,), name)
        if self.probs is not None:
            _expect(self.probs, "probs", (rows, self.tokens.shape[1], vocab_size), name, is_law=True)
        lengths = torch.tensor(most, device=self.lengths.device).minimum(self.lengths.long())
        if len(wrong := lengths[(lengths < 0) | (lengths > self.tokens.shape[1])]):
            raise ConfigError(f"{name} proposed lengths of {int(wrong[0])} of {self.tokens.shape[1]} tokens")
        tokens, probs = self.tokens[:, :width].long(), None if self.probs is None else self.probs[:, :width]
        parents = None if self.parents is None else _parents(self.parents, lengths.tolist(), name)
        draft = Draft(tokens, lengths, probs, parents)
        if len(wrong := tokens[draft.is_drafted & ((tokens < 0) | (tokens >= vocab_size))]):
            raise ConfigError(f"{name} proposed token id {int(wrong[0])}; the target knows 0 to {vocab_size - 1}")
        if probs is not None and not _are_laws(probs[draft.is_drafted], tokens[draft.is_drafted]):
            raise ConfigError(
                f"{name} proposed tokens with probs that they cannot be drawn from; expected numbers >= 0 that sum to 1 over "
                "the vocabulary, more than 0 for the token proposed (None: it is certain)"
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
    if not isinstance(draft, Draft):
        raise ConfigError(f"{type(drafter).__name__} proposed {type(draft).__name__}, expected specdec.Draft")
    return draft.checked(lengths, sequences.vocab_size, drafter)


def _expect(given: object, what: str, shape: tuple[int | None, ...], name: str, *, is_law: bool = False) -> None:
    """Raise ``ConfigError`` unless it is a tensor of that shape (None: any size), of numbers that fit."""
    is_right = isinstance(given, Tensor) and len(given.shape) == len(shape)
    if is_right and isinstance(given, Tensor):
        is_right = all(want in (None, found) for want, found in zip(shape, given.shape, strict=True))
        is_right &= given.is_floating_point() == is_law and given.dtype != torch.bool
    if not is_right:
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        wanted = ", ".join("K" if size is None else str(size) for size in shape)
        kind = "float" if is_law else "integer"
        raise ConfigError(f"{name} proposed {what} {found}, expected a tensor of {kind} numbers [{wanted}]")


def _parents(given: list[list[int]], lengths: list[int], name: str) -> list[list[int]]:
    """Those of the first ``lengths[b]`` tokens of each row. Raises ``ConfigError`` for what makes no trees of them."""
    if len(given) != len(lengths) or any(len(own) < count for own, count in zip(given, lengths, strict=True)):
        raise ConfigError(
            f"{name} proposed parents of {[len(own) for own in given]} tokens, expected one for every token: {lengths}"
        )
    parents = [own[:count] for own, count in zip(given, lengths, strict=True)]
    if any(not -1 <= parent < i for own in parents for i, parent in enumerate(own)):
        raise ConfigError(f"{name} proposed parents {parents}; expected places of earlier tokens, or -1")
    return parents


def _are_laws(probs: Tensor, tokens: Tensor) -> bool:
    """Whether each of tokens [N] may have been drawn from its law of probs [N, V]."""
    chosen = probs.gather(1, tokens.unsqueeze(1))
    return bool(((probs.sum(1) - 1).abs() < _OFF).all() and (probs >= 0).all() and (chosen > 0).all())


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
