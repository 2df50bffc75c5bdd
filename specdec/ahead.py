"""How far decoding may run ahead: several rounds at once, where nobody has to look in between."""

from __future__ import annotations

from typing import Any

from specdec.draft import Chains, Drafter
from specdec.lm.base import CachedLM
from specdec.rounds import Played, Rounds
from specdec.sequences import Sequences

_MOST_ROUNDS = 64
_MOST_SECONDS = 0.02  # until somebody who reads along sees new text
_MOST_UNSEEN = 8  # in which a drafter that looks for repetitions may miss one


class Ahead:
    """Knows how long rounds of ``target`` take, and plays as many at once as that allows."""

    def __init__(self, target: CachedLM) -> None:
        self._target = target
        self._seconds: dict[bool, float] = {}  # of a round that drafts, and of one that does not

    def observe(self, drafts: bool, seconds: float) -> None:
        """What a round took."""
        self._seconds[drafts] = seconds

    def play(
        self, sequences: Sequences, drafter: Drafter | None, lengths: list[int], most: int, rule: str
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
        model: Chains | None = None
        unread = [1] * len(sequences)
        if drafts:
            able: Any = drafter if hasattr(drafter, "alone") else None  # as ``DraftsAlone`` says
            model = None if able is None else able.alone(sequences, lengths, rule)
            if model is None:
                return None
            most = most if model is able else min(most, _MOST_UNSEEN)
            longest, room = max(lengths) + 1, model.room(sequences)
            most = min(most, room // longest) if max(limits) + longest > room else most
            found = model.unread(sequences)
            if found is None or most < 2:
                return None
            unread = found
        seeds, text_lengths = sequences.keys_here
        asked = Rounds(
            [row.tokens[-count:] for row, count in zip(sequences.rows, unread, strict=True)], lengths, limits, most,
            sequences.vocab_size, sequences.end_ids, rule, temperatures, seeds, text_lengths,
        )  # fmt: skip
        played = self._target.play(asked, None if model is None else model.lm)
        return played if played is not None and played.tokens else None
