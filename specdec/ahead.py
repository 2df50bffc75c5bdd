"""How far decoding may run ahead: several rounds at once, where nobody has to look in between."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.draft import Drafter
from specdec.drafters.model import ModelDrafter
from specdec.lm.base import CachedLM
from specdec.rounds import Played, Rounds
from specdec.sequences import Sequences

_MOST_ROUNDS = 64
_MOST_SECONDS = 0.02  # that who reads along waits for all of them


class Ahead:
    """Knows how long rounds of ``target`` take, and plays as many at once as that allows."""

    def __init__(self, target: CachedLM) -> None:
        self._target = target
        self._seconds: dict[bool, float] = {}  # of a round that drafts, and of one that does not

    def observe(self, drafts: bool, seconds: float) -> None:
        """What a round took."""
        self._seconds[drafts] = seconds

    def play(
        self, sequences: Sequences, drafter: Drafter | None, lengths: Sequence[int], most: int, rule: str
    ) -> Played | None:
        """Up to ``most`` rounds with drafts of these lengths; None, and nothing done, where single steps are as good."""
        drafts = any(lengths)
        limits = sequences.draft_limits()
        most = min(most, _MOST_ROUNDS, int(_MOST_SECONDS / self._seconds.get(drafts, _MOST_SECONDS)))
        most = min(most, min(limits) + 1)  # every round brings one token at least
        if most < 2 or not sequences.runs_alone:
            return None
        temperatures = None if sequences.greedy else sequences.temperatures
        if temperatures is None and not sequences.greedy:
            return None
        unread: list[int] | None = [1] * len(sequences)
        if drafts:
            model = drafter if type(drafter) is ModelDrafter else None  # others find their guesses in other ways
            longest = max(lengths) + 1
            more = min(most * longest, max(limits) + longest)
            unread = None if model is None else model.unread(sequences, more)
        if unread is None:
            return None
        seeds, starts = sequences.keys_here
        asked = Rounds(
            [row.tokens[-count:] for row, count in zip(sequences.rows, unread, strict=True)], lengths, limits, most,
            sequences.vocab_size, sequences.end_ids, rule, temperatures, seeds, starts,
        )  # fmt: skip
        played = self._target.play(asked, drafter.lm if isinstance(drafter, ModelDrafter) else None)
        return played if played is not None and played.tokens else None
