"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

from specdec.sequences import Sequences

DEFAULT_DRAFT_TOKENS = 4


class FixedLength:
    """The same number of draft tokens for every row and step, as far as a row has room for them."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def choose(self, sequences: Sequences) -> list[int]:
        """Draft lengths of the live rows."""
        return [min(self.num_draft_tokens, limit) for limit in sequences.draft_limits()]
