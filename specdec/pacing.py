"""How often it is decided: seldom where deciding takes long beside a step, and where drafts do not pay."""

from __future__ import annotations

_CARED, _ALONE = 0.02, 0.1  # weight of the latest step in what deciding takes per step, and in what one alone takes
LONGEST_STAY, _LONG = 128, 32  # steps that a choice is kept at most, and that say what deciding takes in the long run
_DEAR = 0.05  # share of a plain step that a decision takes, from which it is dear

# Plain passes that follow the first one after it was found best; twice as many each time again, all together powers of two.
_REST, _LONGEST_REST = 3, 63
_LONGEST_DOZE = 31  # the longest where a look at the text may change the verdict at any token
_MOST_REST, _CARE = 1023, 0.005  # the longest where deciding takes more than that share of the rest
# The first one where deciding is dear: that share of it goes into deciding, less where drafts promised less than _FAR.
_FIRST_CARE, _CLEAR_CARE, _FAR = 0.2, 0.02, 0.8


class Thought:
    """What it takes to decide and to learn, and to begin rounds as chosen.

    share: plain steps whose time a decision takes; care: seconds per drafted step where a choice is kept for long.
    """

    def __init__(self) -> None:
        self.share = self.care = self._alone = 0.0
        self._seconds = 0.0  # since anything was learned

    @property
    def is_dear(self) -> bool:
        """Whether deciding takes a good share of a plain step."""
        return self.share > _DEAR

    def add(self, seconds: float) -> None:
        """It took as long as that."""
        self._seconds += seconds

    @property
    def alone(self) -> float:
        """By how many seconds longer a step takes that does not run with others."""
        return max(0.0, self._alone)

    def count_alone(self, seconds: float) -> None:
        """A step that ran alone took so much longer."""
        self._alone += _ALONE * (seconds - self._alone)

    def spread(self, drafted_steps: int) -> float:
        """Something was learned from so many steps that drafted as chosen, or from others (0): what was taken since."""
        if drafted_steps >= _LONG:  # while lengths are tried it takes more
            fades = (1 - _CARED) ** drafted_steps
            self.care = fades * self.care + (1 - fades) * self._seconds / max(drafted_steps, LONGEST_STAY)
        taken, self._seconds = self._seconds, 0.0
        return taken


class Rest:
    """Plain passes in which nothing is thought about, ``left`` of them: more each time again that drafts do not pay."""

    def __init__(self) -> None:
        self.left = 0
        self._next = _REST

    def begin(self, thought: Thought, promise: float, most: int | None, *, may_change: bool) -> None:
        """Drafts promise so much of what plain decoding brings. ``may_change``: with any token that comes.

        ``most``: until rows end that have too little before them to say anything of others.
        """
        longest = _LONGEST_DOZE if may_change and not thought.is_dear else _LONGEST_REST
        longest = max(longest, min(int(thought.share / _CARE), _MOST_REST))
        first = int(thought.share / (_CLEAR_CARE if promise < _FAR else _FIRST_CARE))
        self.left = max(self._next, min(first, longest))
        if most is not None:
            self.left = min(self.left, most)
            return
        self._next = min(2 * self.left + 1, longest)

    def add(self, passes: int) -> None:
        """So many of them were done."""
        self.left = max(0, self.left - passes)

    def end(self) -> None:
        """Drafts are made again; the next one is short."""
        self.left, self._next = 0, _REST
