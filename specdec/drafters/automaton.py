"""What followed what, and how often: a suffix automaton (Blumer et al. 1985) with counts, grown token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Place = tuple[int, int]  # of a string: the state of its class, and how many tokens it has; until more is fed

_NOTHING, ROOT = 0, 1  # the state above the root, and the root: the class of the empty string
START: Place = (ROOT, 0)
_HALF_LIFE = 100  # tokens after which an occurrence counts half: text is like what came shortly before


class SuffixAutomaton:
    """Every string of the texts it was fed, as states: classes of strings that end at the same places.

    Of a class that holds a string of at most ``depth`` tokens, ``count`` says how often its strings occurred,
    ``followed`` how often a token came next, and ``best`` which one did so most often, the latest of equals; the later,
    the more it counts. A token costs amortised constant time plus a visit of each such class that ends with it, which
    are few. Numbers grow with the text, so that it must stay below some hundred thousand tokens.
    """

    def __init__(self, depth: int, half_life: float = _HALF_LIFE) -> None:
        self.depth, self.size = depth, 0  # tokens that were fed
        self.count: list[float] = []
        self.followed: list[float] = []
        self.best: list[int] = []
        self._weight, self._growth = 1.0, 2 ** (1 / half_life)
        self._after: list[dict[int, int]] = []  # the class of the string with one more token
        self._link: list[int] = []  # the class of the longest string that ends at more places
        self._longest: list[int] = []
        for longest in (-1, 0):
            self._add(longest, {}, _NOTHING, (0.0, 0.0, -1))
        self.begin()

    def begin(self) -> None:
        """What is fed from now on is a new text."""
        self._whole, self._end = ROOT, START

    def feed(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._feed(token)

    def ends(self, place: Place | None = None) -> Iterator[Place]:
        """The strings that something followed: those at the end of the text, or of the string at ``place``.

        Of each class the longest one, from long to short.
        """
        state, length = self._end if place is None else place
        while state > ROOT:
            if self.followed[state]:
                yield state, length
            state = self._link[state]
            length = self._longest[state]

    def follow(self, place: Place) -> Iterator[tuple[int, float, int]]:
        """The tokens that came most often, one after the other: each one's share of all that came, and after how many.

        Where nothing followed, or more than ``depth`` tokens would count, a shorter end of the string speaks for it.
        """
        count, followed, best, after, link = self.count, self.followed, self.best, self._after, self._link
        longest, depth = self._longest, self.depth
        state, length = place
        while state > ROOT:
            if followed[state]:
                token = best[state]
                child = after[state][token]
                if longest[link[child]] < depth:
                    yield token, count[child] / followed[state], length
                    state, length = child, length + 1
                    continue
            state = link[state]
            length = longest[state]

    def advance(self, place: Place, token: int) -> Place:
        """The longest string that ends the one at ``place`` and ``token``, and occurs here; at most ``depth`` tokens."""
        state, length = place
        while state and token not in self._after[state]:
            state = self._link[state]
            length = self._longest[state]
        return self._cut(self._after[state][token], min(length + 1, self.depth)) if state else START

    def _feed(self, token: int) -> None:
        """Enter the token, and count the classes of strings that end with it and of those that it followed."""
        self.size += 1
        self._weight *= self._growth
        self._whole = self._step(self._whole, token)
        count, followed, best, link, weight = self.count, self.followed, self.best, self._link, self._weight
        before, length = self._end
        self._end = self._cut(self._after[before][token], min(length + 1, self.depth))
        state = self._end[0]
        while state > ROOT:
            count[state] += weight
            state = link[state]
        while before:
            followed[before] += weight
            known = best[before]
            if known != token:
                after = self._after[before]
                if known < 0 or count[after[token]] >= count[after[known]]:
                    best[before] = token
            before = link[before]

    def _step(self, whole: int, token: int) -> int:
        """The class of the text, of class ``whole``, and one more token; made where it did not occur before."""
        known = self._after[whole].get(token)
        if known is not None:  # in an earlier text
            return known if self._longest[known] == self._longest[whole] + 1 else self._split(whole, token, known)
        made = self._add(self._longest[whole] + 1, {}, ROOT, (0.0, 0.0, -1))
        while whole and token not in self._after[whole]:
            self._after[whole][token] = made
            whole = self._link[whole]
        if whole:
            known = self._after[whole][token]
            exact = self._longest[known] == self._longest[whole] + 1
            self._link[made] = known if exact else self._split(whole, token, known)
        return made

    def _split(self, state: int, token: int, known: int) -> int:
        """A class of its own for those strings of ``known`` that are no longer than one of ``state`` and ``token``."""
        counted = self.count[known], self.followed[known], self.best[known]
        made = self._add(self._longest[state] + 1, dict(self._after[known]), self._link[known], counted)
        self._link[known] = made
        while state and self._after[state].get(token) == known:
            self._after[state][token] = made
            state = self._link[state]
        return made

    def _add(self, longest: int, after: dict[int, int], link: int, counted: tuple[float, float, int]) -> int:
        self._longest.append(longest)
        self._after.append(after)
        self._link.append(link)
        self.count.append(counted[0])
        self.followed.append(counted[1])
        self.best.append(counted[2])
        return len(self._link) - 1

    def _cut(self, state: int, length: int) -> Place:
        """The end of ``length`` tokens of a string of the class."""
        while length <= self._longest[self._link[state]]:
            state = self._link[state]
        return state, length
