"""Plain decoding, several passes at once where nobody has to look in between: the host's part of a step is paid once."""

from __future__ import annotations

import torch

from specdec.lm.base import CachedLM
from specdec.sequences import Sequences, Step

_MOST_PASSES = 8
_MOST_SECONDS = 0.02  # that who reads along waits for all of them


class Ahead:
    """Knows how long plain passes of ``target`` take, and runs as many at once as that allows."""

    def __init__(self, target: CachedLM) -> None:
        self._target = target
        self._seconds = _MOST_SECONDS  # of one pass, lately

    def observe(self, step: Step, seconds: float) -> None:
        """A step that drafted nothing."""
        self._seconds = seconds / step.passes

    def run(self, sequences: Sequences, most: int) -> Step | None:
        """Up to ``most`` plain passes, their tokens entered; None, and nothing done, where single ones are no slower."""
        most = min(most, _MOST_PASSES, 1 + min(sequences.draft_limits()), int(_MOST_SECONDS / self._seconds))
        if most < 2 or not sequences.runs_alone:
            return None
        count, rows, drawing = 1 << most.bit_length() - 1, len(sequences), None  # a GPU records every number of its own
        if not sequences.greedy:
            laws = torch.empty(rows, count, sequences.vocab_size)
            drawing = sequences.drawing(laws, coupled=True)
            if drawing is None:
                return None
        found = self._target.go_on(sequences.last_tokens_here, count, sequences.vocab_size, drawing)
        if found is None:
            return None
        tokens = found.tolist()
        sound = min(own.index(-1) if -1 in own else len(own) for own in tokens)
        if not sound:  # the pass is repeated, and its logits say why
            self._target.keep([0] * rows)
            return None
        step = sequences.commit_passes([own[:sound] for own in tokens])
        self._target.keep(step.committed)
        return step
