"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

from specdec.sequences import Sequences

DEFAULT_DRAFT_TOKENS = 4

_PRIOR_WEIGHT = 4.0  # how many tokens' worth of evidence a first guess is
_MEMORY = 0.97  # how much of what was known is left after each token, so that the last thirty count


class Acceptance:
    """The chance that a drafted token is accepted, given that all before it were; what came last counts most."""

    def __init__(self, prior: float, weight: float = _PRIOR_WEIGHT) -> None:
        self._accepted, self._tried = prior * weight, weight

    @property
    def rate(self) -> float:
        """The chance, 0 to 1."""
        return self._accepted / self._tried

    def count(self, drafted: int, accepted: int) -> None:
        """Learn from a draft of which the first ``accepted`` survived: at most one token of it was refused."""
        tried = min(accepted + 1, drafted)
        left = _MEMORY**tried
        self._accepted = self._accepted * left + accepted
        self._tried = self._tried * left + tried

    def expected(self, length: int) -> float:
        """How many tokens of a draft of ``length`` will be accepted, on average."""
        return sum(self.rate**i for i in range(1, length + 1))


class FixedLength:
    """The same number of draft tokens for every row and step, as far as a row has room for them."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def choose(self, sequences: Sequences) -> list[int]:
        """Draft lengths of the live rows."""
        return [min(self.num_draft_tokens, limit) for limit in sequences.draft_limits()]
