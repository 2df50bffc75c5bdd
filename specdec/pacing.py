"""How often draft lengths are chosen anew: seldom where choosing takes long beside a step, or where drafts do not pay."""

from __future__ import annotations

LONGEST_STAY = 128  # steps for which a choice is kept at most
_COSTLY = 0.05  # plain steps that one decision takes, from which deciding is costly

# Weights of the latest measurement in running means.
_NEW_UPKEEP, _NEW_ALONE = 0.02, 0.1
_MANY = 32  # drafted steps together, from which they say what deciding takes in the long run

# Plain passes before drafts are considered again: about twice as many each time, 2 ** n - 1, so that with the pass that
# follows calls of compiled rounds are powers of two. Where the drafter looks at the text, any token may change the verdict:
# no more passes then than keep deciding to _SHARE of their time.
_FIRST_WAIT, _LONGEST_WAIT = 3, 63
_LONGEST_COSTLY = 1023  # where a decision takes more than _SHARE of the wait
_SHARE = 0.005
# Where deciding is costly the first wait is as long as keeps it to that share; longer where drafts promised less than _FAR
# of plain decoding.
_FIRST_SHARE, _FIRST_SHARE_FAR, _FAR = 0.2, 0.02, 0.8


class DecisionCost:
    """What choosing draft lengths takes, and learning from steps.

    share: one decision, in plain steps; upkeep: seconds per drafted step, where a choice is kept for long.
    """

    def __init__(self) -> None:
        self.share = self.upkeep = self._alone = 0.0
        self._seconds = 0.0  # since anything was learned

    @property
    def is_costly(self) -> bool:
        """Whether a decision takes a good share of a plain step."""
        return self.share > _COSTLY

    @property
    def alone(self) -> float:
        """Seconds that a step takes longer which does not run with others in one call of compiled rounds."""
        return max(0.0, self._alone)

    def add(self, seconds: float) -> None:
        """Deciding, or learning, took so long."""
        self._seconds += seconds

    def count_alone(self, seconds: float) -> None:
        """A step that ran alone took so much longer."""
        self._alone += _NEW_ALONE * (seconds - self._alone)

    def spread(self, drafted_steps: int) -> float:
        """The seconds added since the last time, over so many steps that drafted as chosen; 0 for steps of other kinds."""
        if drafted_steps >= _MANY:  # fewer are those in which lengths are tried, which takes more
            fades = (1 - _NEW_UPKEEP) ** drafted_steps
            self.upkeep = fades * self.upkeep + (1 - fades) * self._seconds / max(drafted_steps, LONGEST_STAY)
        taken, self._seconds = self._seconds, 0.0
        return taken


class PlainBackoff:
    """Plain passes before drafts are considered again, ``left`` of them; more each time that they do not pay."""

    def __init__(self) -> None:
        self.left = 0
        self._next = _FIRST_WAIT

    def begin(self, deciding: DecisionCost, promise: float, most: int | None, *, may_change: bool) -> None:
        """Drafts promise the share ``promise`` of what plain decoding brings, so wait.

        may_change: any token of the text may change that; most: passes until rows end that have so few before them that
        the wait says nothing of others, else None.
        """
        longest = min(int(deciding.share / _SHARE), _LONGEST_COSTLY)
        if deciding.is_costly or not may_change:
            longest = max(longest, _LONGEST_WAIT)
        first = int(deciding.share / (_FIRST_SHARE_FAR if promise < _FAR else _FIRST_SHARE))
        self.left = min(max(self._next, first), longest)
        if most is not None:
            self.left = min(self.left, most)
            return
        self._next = min(2 * self.left + 1, longest)

    def add(self, passes: int) -> None:
        """So many of them were done."""
        self.left = max(0, self.left - passes)

    def end(self) -> None:
        """Drafts are made again; the next wait is short."""
        self.left, self._next = 0, _FIRST_WAIT
