"""How many tokens to draft next; 0 is plain decoding."""

from __future__ import annotations

from specdec.errors import ConfigError
from specdec.sequences import Sequences

DEFAULT_DRAFT_TOKENS = 4


class FixedLength:
    """The same number of draft tokens for every row and step, as far as a row has room for them."""

    def __init__(self, num_draft_tokens: int = DEFAULT_DRAFT_TOKENS) -> None:
        if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int) or num_draft_tokens < 0:
            raise ConfigError(
                f"num_draft_tokens must be an integer >= 0 (0 is plain decoding), got {num_draft_tokens!r}"
            )
        self.num_draft_tokens = num_draft_tokens

    def choose(self, sequences: Sequences) -> list[int]:
        """Draft lengths of the live rows."""
        return [min(self.num_draft_tokens, limit) for limit in sequences.draft_limits()]
