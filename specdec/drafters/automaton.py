"""What followed what, and how often: a suffix automaton (Blumer et al. 1985) with counts, grown token by token.

There are two that give the same guesses: automaton.c, and the one of this file where there is no compiler.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from specdec.compiled import compiled

Place = tuple[int, int]  # of a string: the state of its class, and how many tokens it has; until more is fed

_NOTHING, ROOT = 0, 1  # the state above the root, and the root: the class of the empty string
START: Place = (ROOT, 0)
LEAST_CHANCE = 0.1  # of all of a guess's tokens, by the counts; a guess ends where it would be less likely
_HALF_LIFE = 100  # tokens after which an occurrence counts half: text is like what came shortly before
_SOURCE = Path(__file__).with_suffix(".c")


class Guess(NamedTuple):
    """Tokens that may follow a text; none where nothing is known.

    shares[i]: of all that followed the text before ``tokens[i]``, the share that was this token. matched[i]: how many
    tokens before it had been seen together.
    """

    tokens: list[int]
    shares: list[float]
    matched: list[int]
    score: float  # how many tokens are right if the shares are chances


NOTHING = Guess([], [], [], 0.0)


class Automaton(Protocol):
    """What both can do."""

    size: int  # tokens that were fed

    def begin(self) -> None:
        """What is fed from now on is a new text."""

    def feed(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""

    def guess(self, place: Place | None, most: int, factor: float) -> Guess:
        """What follows the text, or the string at ``place``: of up to ``most`` tokens, or ``factor`` times its match.

        The guess that promises most tokens; of equals that of the longest match.
        """

    def advance(self, place: Place, token: int) -> Place:
        """The longest string that ends the one at ``place`` and ``token``, and occurs here; at most ``depth`` tokens."""


def new_automaton(depth: int, half_life: float = _HALF_LIFE) -> Automaton:
    """An empty one, the compiled one where that is possible."""
    return SuffixAutomaton(depth, half_life) if _library() is None else CompiledAutomaton(depth, half_life)


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
        self._whole, self._end = ROOT, START

    def feed(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._feed(token)

    def guess(self, place: Place | None, most: int, factor: float) -> Guess:
        best = NOTHING
        for match in self.ends(place):
            limit = int(min(most, match[1] * factor))
            if limit <= best.score:  # as it will be for all shorter ones
                break
            best = self._followed(match, limit, best.score) or best
        return best

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
        state, length = place
        while state and token not in self._after[state]:
            state = self._link[state]
            length = self._longest[state]
        return self._cut(self._after[state][token], min(length + 1, self.depth)) if state else START

    def _followed(self, place: Place, most: int, least: float) -> Guess | None:
        """Up to ``most`` tokens, each what most often came after all before it; None for a score up to ``least``."""
        guess = Guess([], [], [], 0.0)
        chance, score = 1.0, 0.0
        for token, share, matched in self.follow(place):
            chance *= share
            if chance < LEAST_CHANCE or score + chance * (most - len(guess.tokens)) <= least:
                break
            score += chance
            guess.tokens.append(token)
            guess.shares.append(share)
            guess.matched.append(matched)
            if len(guess.tokens) == most:
                break
        return guess._replace(score=score) if score > least else None

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


class CompiledAutomaton:
    """The same by automaton.c. Raises ``MemoryError`` where it can grow no more."""

    def __init__(self, depth: int, half_life: float = _HALF_LIFE) -> None:
        library = _library()
        if library is None:
            raise LookupError("no compiled automaton on this machine")
        self._library, self.size = library, 0
        self._address = library.automaton_new(depth, 2 ** (1 / half_life))
        if not self._address:
            raise MemoryError("a suffix automaton")
        self._place, self._score = array("q", START), array("d", [0.0])
        self._most, self._room = 0, (array("q"), array("d"), array("q"))

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._library.automaton_free(self._address)

    def begin(self) -> None:
        self._library.automaton_begin(self._address)

    def feed(self, tokens: Sequence[int]) -> None:
        given = array("q", tokens)
        if not self._library.automaton_feed(self._address, len(given), given.buffer_info()[0]):
            raise MemoryError(f"a suffix automaton of {self.size} tokens")
        self.size += len(given)

    def guess(self, place: Place | None, most: int, factor: float) -> Guess:
        if most > self._most:
            self._most = most
            self._room = array("q", bytes(16 * most)), array("d", bytes(16 * most)), array("q", bytes(16 * most))
        where, score = self._place.buffer_info()[0], self._score
        if place is None:
            self._library.automaton_end(self._address, where)
        else:
            self._place[0], self._place[1] = place
        tokens, shares, matched = self._room
        count = self._library.automaton_guess(
            self._address, where, most, factor, LEAST_CHANCE, tokens.buffer_info()[0], shares.buffer_info()[0],
            matched.buffer_info()[0], score.buffer_info()[0],
        )  # fmt: skip
        if not count:
            return NOTHING
        return Guess(tokens[:count].tolist(), shares[:count].tolist(), matched[:count].tolist(), score[0])

    def advance(self, place: Place, token: int) -> Place:
        self._place[0], self._place[1] = place
        self._library.automaton_advance(self._address, self._place.buffer_info()[0], token)
        return self._place[0], self._place[1]


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions; sums and products must be rounded as Python rounds them."""
    found = compiled(_SOURCE, flags=("-ffp-contract=off",), purpose="the suffix drafter")
    if found is not None:
        found.automaton_new.argtypes, found.automaton_new.restype = [c_int64, c_double], c_void_p
        found.automaton_free.argtypes = found.automaton_begin.argtypes = [c_void_p]
        found.automaton_feed.argtypes = [c_void_p, c_int64, c_void_p]
        found.automaton_feed.restype = found.automaton_guess.restype = c_int64
        found.automaton_end.argtypes = [c_void_p, c_void_p]
        found.automaton_advance.argtypes = [c_void_p, c_void_p, c_int64]
        found.automaton_guess.argtypes = [c_void_p, c_void_p, c_int64, c_double, c_double, *[c_void_p] * 4]
    return found
