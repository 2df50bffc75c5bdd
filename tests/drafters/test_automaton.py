"""The suffix automaton counts what a search through all texts counts, in time and space that grow with the text alone."""

from __future__ import annotations

import contextlib
import math
import random
from collections import defaultdict
from typing import Any

import pytest

from specdec.drafters import automaton
from specdec.drafters.automaton import ROOT, START, CompiledAutomaton, SuffixAutomaton

Tokens = tuple[int, ...]
needs_compiler = pytest.mark.skipif(automaton._library() is None, reason="no compiler here")


class Search:
    """The definition: every string of up to ``depth`` tokens, and what followed it; later ones count more."""

    def __init__(self, texts: list[list[int]], depth: int, half_life: float) -> None:
        self.count: dict[Tokens, float] = defaultdict(float)
        self.followed: dict[Tokens, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.latest: dict[tuple[Tokens, int], int] = {}
        fed = 0
        for text in texts:
            for end, token in enumerate(text):
                fed += 1
                weight = 2 ** (fed / half_life)
                for size in range(min(depth, end + 1) + 1):
                    self.count[tuple(text[end + 1 - size : end + 1])] += weight
                    if size <= end:
                        self.followed[before := tuple(text[end - size : end])][token] += weight
                        self.latest[before, token] = fed

    def best(self, string: Tokens) -> int:
        came = self.followed[string]
        return max(came, key=lambda token: (round(came[token], 6), self.latest[string, token]))


def fed(texts: list[list[int]], depth: int, half_life: float = math.inf) -> SuffixAutomaton:
    automaton = SuffixAutomaton(depth, half_life)
    for text in texts:
        automaton.begin()
        automaton.feed(text)
    return automaton


def state_of(automaton: SuffixAutomaton, string: Tokens) -> int:
    state = ROOT
    for token in string:
        state = automaton._after[state][token]
    return state


def some_texts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    vocab = draw.choice([1, 2, 2, 3, 5])
    return [[draw.randrange(vocab) for _ in range(draw.randrange(1, 30))] for _ in range(draw.choice([1, 1, 3]))]


def check(automaton: SuffixAutomaton, known: Search, depth: int) -> int:
    """How many strings were compared."""
    strings = [string for string in known.count if string]
    for string in strings:
        state = state_of(automaton, string)
        assert automaton.count[state] == pytest.approx(known.count[string])
        assert automaton.followed[state] == pytest.approx(sum(known.followed[string].values()))
        if known.followed[string] and len(string) < depth:
            assert automaton.best[state] == known.best(string)
    return len(strings)


@pytest.mark.parametrize("half_life", [math.inf, 10])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 64])
def test_counts_are_those_of_a_search(depth: int, half_life: float) -> None:
    compared = 0
    for seed in range(60):
        texts = some_texts(seed)
        compared += check(fed(texts, depth, half_life), Search(texts, depth, half_life), depth)
    assert compared > 100


def test_counts_that_miss_one_occurrence_are_noticed() -> None:
    """Negative control: the automaton has not read the last token of one text."""
    for seed in range(20):
        texts = some_texts(seed)
        with pytest.raises((AssertionError, KeyError)):
            check(fed([*texts[:-1], texts[-1][:-1]], 5), Search(texts, 5, math.inf), 5)


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_the_longest_match_is_found(depth: int) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        texts, text = some_texts(seed), [draw.randrange(3) for _ in range(60)]
        automaton, known, place = fed(texts, depth), Search(texts, depth, math.inf).count, START
        for end, token in enumerate(text, 1):
            place = automaton.advance(place, token)
            sizes = [size for size in range(1, min(depth, end) + 1) if tuple(text[end - size : end]) in known]
            assert place[1] == max(sizes, default=0)
            assert place[0] == state_of(automaton, tuple(text[end - place[1] : end]))


class Watched(list[int]):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        self.reads += 1
        return super().__getitem__(place)


def reads_per_token(text: list[int]) -> float:
    automaton = SuffixAutomaton(64)
    watched = automaton._link = Watched(automaton._link)
    automaton.feed(text)
    return watched.reads / len(text)


def test_a_token_costs_the_same_in_a_long_text() -> None:
    draw = random.Random(0)
    texts = {
        "random": [draw.randrange(500) for _ in range(8000)],
        "few tokens": [draw.randrange(4) for _ in range(8000)],
        "one token": [7] * 8000,
        "a cycle": [1, 2, 3, 4, 5, 6, 7] * 1200,
        "a copy": [draw.randrange(500) for _ in range(1000)] * 8,
    }
    for name, text in texts.items():
        assert reads_per_token(text[:8000]) < 1.5 * reads_per_token(text[:2000]) + 1, name
        automaton = fed([text], 64)
        assert len(automaton._link) <= 2 * len(text) + 2
        assert sum(map(len, automaton._after)) <= 3 * len(text)


def compared(seed: int, *, forgets: bool = False) -> int:
    """How many guesses of the compiled automaton are those of the one in Python; it may have missed a token."""
    draw = random.Random(seed)
    vocab, depth, factor = draw.choice([1, 2, 3, 5, 50]), draw.choice([1, 2, 3, 8, 64]), draw.choice([math.inf, 2, 0.5])
    plain, compiled, count = SuffixAutomaton(depth), CompiledAutomaton(depth), 0
    for _ in range(draw.choice([1, 3])):
        plain.begin()
        compiled.begin()
        for _ in range(draw.randrange(1, 12)):
            new = [draw.randrange(vocab) for _ in range(draw.randrange(9))]
            plain.feed(new)
            compiled.feed(new[1:] if forgets else new)
            place = START
            for token in [draw.randrange(vocab + 1) for _ in range(10)]:
                assert compiled.advance(place, token) == plain.advance(place, token)
                place = plain.advance(place, token)
                assert compiled.guess(place, 15, factor) == plain.guess(place, 15, factor)
            assert compiled.guess(None, 15, factor) == plain.guess(None, 15, factor)
            count += 1
    assert compiled.size == plain.size or forgets
    return count


@needs_compiler
def test_the_compiled_automaton_guesses_the_same() -> None:
    assert sum(compared(seed) for seed in range(200)) > 1000


@needs_compiler
def test_a_compiled_automaton_that_missed_a_token_is_noticed() -> None:
    """Negative control."""
    found = 0
    for seed in range(20):
        with contextlib.suppress(AssertionError):
            compared(seed, forgets=True)
            found += 1
    assert found < 10  # a text of one token repeated guesses the same without one of them


def test_without_a_compiler_python_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automaton, "_library", lambda: None)
    found = automaton.new_automaton(64)
    found.feed([1, 2, 3, 1, 2])
    assert isinstance(found, SuffixAutomaton) and found.guess(None, 2, math.inf).tokens == [3, 1]
    with pytest.raises(LookupError, match="no compiled automaton"):
        CompiledAutomaton(64)
