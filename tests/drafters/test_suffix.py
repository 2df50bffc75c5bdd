"""The suffix drafter finds what its definition finds, knows how good that is, and forgets rows that are gone."""

from __future__ import annotations

import math
import random
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specdec import ConfigError, Draft, Engine
from specdec.draft import Prices
from specdec.drafters import suffix
from specdec.drafters.suffix import SuffixDrafter
from specdec.sequences import Request, Row, Sequences, Step
from toys import TableLM, random_table

HALF_LIFE = 100


def what_followed(text: list[int], string: list[int]) -> dict[int, float]:
    """Every token that came after the string, and how much that counts; the latest first."""
    came: dict[int, float] = {}
    for end in range(len(text) - 1, len(string) - 1, -1):
        if text[end - len(string) : end] == string:
            came[text[end]] = came.get(text[end], 0.0) + 2 ** (end / HALF_LIFE)
    return came


def search(text: list[int], most: int, factor: float = math.inf) -> list[int]:
    """The definition: of the paths from every end of the text the one with the largest sum of chances."""
    best: list[int] = []
    best_score = 0.0
    for size in range(len(text) - 1, 0, -1):
        string, path, chance, score = text[-size:], list[int](), 1.0, 0.0
        if not what_followed(text, string):
            continue
        while len(path) < min(most, int(min(most, size * factor))):
            while string and not what_followed(text, string):
                string = string[1:]
            if not string:
                break
            came = what_followed(text, string)
            token = max(came, key=lambda one: round(came[one], 6))
            chance *= came[token] / sum(came.values())
            if chance < 0.1:
                break
            score += chance
            path.append(token)
            string = [*string, token]
        if score > best_score + 1e-9:
            best, best_score = path, score
    return best


def batch(texts: list[list[int]]) -> Sequences:
    """Rows with these texts, as an engine would hand them to a drafter."""
    device = torch.device("cpu")
    rows = [Row(Request(tuple(text), 10_000), i, None, device) for i, text in enumerate(texts)]
    return SimpleNamespace(rows=rows, device=device, __len__=lambda: len(rows))  # type: ignore[return-value]


def proposals(draft: Draft) -> list[list[int]]:
    assert draft.probs is None  # certain: one-hot laws
    return [row[:length] for row, length in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


def proposed(text: list[int], most: int, **given: Any) -> list[int]:
    return proposals(SuffixDrafter(**given).propose(batch([text]), [most]))[0]


def commit(drafter: SuffixDrafter, sequences: Sequences, tokens: list[list[int]]) -> None:
    """The engine's part of a step, for rows that go on with these tokens."""
    counts = [row.commit(new, 0) for row, new in zip(sequences.rows, tokens, strict=True)]
    drafter.observe(Step(list(sequences.rows), [0] * len(counts), [0] * len(counts), counts))


@pytest.mark.parametrize("factor", [math.inf, 2.0, 1.0, 0.5])
def test_the_automaton_guesses_what_a_search_does(factor: float) -> None:
    draw = random.Random(1)
    drafter = SuffixDrafter(factor=factor)
    vocabs = (1, 2, 2, 3, 3, 5, 9)
    sequences = batch([[draw.randrange(vocab) for _ in range(draw.randrange(1, 12))] for vocab in vocabs])
    guessed = 0
    for _ in range(14):
        counts = [draw.randrange(7) for _ in vocabs]
        found = proposals(drafter.propose(sequences, counts))
        for row, count, proposal in zip(sequences.rows, counts, found, strict=True):
            assert proposal == (search(row.tokens, count, factor) if count else [])
            guessed += len(proposal)
        commit(drafter, sequences, [[draw.randrange(v) for _ in range(draw.randrange(5))] for v in vocabs])
    assert guessed > 50


def test_examples() -> None:
    assert proposed([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert proposed([7, 7, 7], 4) == [7, 7, 7, 7]  # its own guess goes on
    assert proposed([5, 1, 5, 2, 5], 2) == [2, 5]  # the latest of equals
    assert proposed([5, 1, 5, 1, 5, 2, 5], 1) == [1]  # the most frequent
    assert proposed([1, 2, 3, 9, 3, 8, 1, 2, 3], 1) == [9]  # "1 2 3" was followed by 9, the latest "3" alone by 8
    assert proposed([1, 2, 3, 4, 1, 2], 3, factor=1) == [3, 4]  # as many tokens as matched


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_longer_strings_than_are_counted_are_guessed_by_their_ends(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "DEPTH", depth)
    assert proposed([1, 2, 3] * 5, 8) == ([1, 2, 3, 1, 2, 3, 1, 2] if depth > 1 else [])
    assert proposed([7] * 9, 4) == ([7] * 4 if depth > 1 else [])


def test_nothing_repeated_is_no_proposal() -> None:
    for texts in ([[1]], [[1, 2, 3]], [[1], [2, 3]]):
        draft = SuffixDrafter().propose(batch(texts), [4] * len(texts))
        assert proposals(draft) == [[]] * len(texts) and draft.tokens.shape == (len(texts), 0)


@pytest.mark.parametrize("share", [False, True])
def test_rows_read_each_others_outputs_only_if_they_share(share: bool) -> None:
    drafter = SuffixDrafter(share=share)
    first = batch([[1, 2]])
    drafter.propose(first, [3])
    commit(drafter, first, [[5, 6, 7, 8, 9]])
    live = batch([[3, 5, 6], [1, 2]])
    assert proposals(drafter.propose(live, [3, 3])) == [[], []]  # of rows that live nobody reads
    drafter.observe(Step(live.rows, [0, 0], [0, 0], [0, 0]))
    drafter.observe(Step(first.rows, [0], [0], [0], finished=[0]))
    drafter.free(0)
    for _ in range(2):  # also where its own text is known already
        found = proposals(drafter.propose(live, [3, 3]))
        assert found == ([[7, 8, 9], []] if share else [[], []])  # 1 2 was a prompt, and is nobody's output
        drafter.observe(Step(live.rows, [0, 0], [0, 0], [0, 0]))
    own = batch([[5, 6, 1, 2, 5, 6]])
    assert proposals(drafter.propose(own, [2])) == [[1, 2]]  # of equals the row's own text


def test_the_oldest_outputs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "MOST_TOKENS", 40)
    drafter = SuffixDrafter(share=True)
    live = batch([[100], [110], [190]])
    for number in range(10, 20):
        sequences = batch([[0]])
        sequences.rows[0].commit([10 * number + i for i in range(5)], 0)
        drafter.observe(Step(sequences.rows, [0], [0], [5], finished=[0]))
        drafter.propose(live, [2, 2, 2])  # goes on in a store that is made anew
        drafter.observe(Step(live.rows, [0] * 3, [0] * 3, [0] * 3))
        assert drafter._store is not None and drafter._store.automaton.size <= 40
    assert proposals(drafter.propose(live, [2, 2, 2])) == [[], [], [191, 192]]


def test_of_a_very_long_text_the_latest_part_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "MOST_TOKENS", 100)
    draw = random.Random(0)
    drafter, sequences = SuffixDrafter(), batch([[5, 6, 7, *range(10, 40)]])
    (row,) = sequences.rows
    for _ in range(60):
        commit(drafter, sequences, [[draw.randrange(1000, 9000) for _ in range(7)]])
        remembered = row.tokens[-20:-16]
        commit(drafter, sequences, [remembered[:2]])
        assert proposals(drafter.propose(sequences, [2])) == [remembered[2:]]
        drafter.observe(Step([row], [0], [0], [0]))
        assert drafter._texts[row.id].automaton.size <= 100
    commit(drafter, sequences, [[5, 6]])
    assert proposals(drafter.propose(sequences, [1])) == [[]]


def test_survival_is_how_often_guesses_are_right() -> None:
    """On texts of which a share is copied, and on texts that only look alike: shares alone promise far too much."""
    draw = random.Random(3)
    for copied in (0.0, 0.5, 0.9):
        drafter, table = SuffixDrafter(), [draw.randrange(30) for _ in range(30)]
        sequences = batch([[draw.randrange(30) for _ in range(40)]])
        (row,) = sequences.rows
        expected = promised = right = 0.0
        for step in range(1500):
            survival = drafter.outlook(sequences, [1], Prices()).survival[0, 0]
            guess = (drafter.guesses or [])[0]
            new = table[row.tokens[-1]] if draw.random() < copied else draw.randrange(30)
            if step > 100 and guess.tokens:
                expected, promised = expected + survival, promised + guess.shares[0]
                right += guess.tokens[0] == new
            commit(drafter, sequences, [[new]])
        assert abs(expected - right) < 0.15 * right + 15
        assert copied == 0.9 or promised > 1.3 * right  # negative control


def test_survival_ends_with_the_guess_and_never_rises() -> None:
    drafter, sequences = SuffixDrafter(), batch([[1, 2, 3, 1, 2], [4], [7, 7, 8, 7, 9, 7]])
    outlook = drafter.outlook(sequences, [6, 6, 3], Prices())
    assert outlook.survival.shape == (3, 6) and not outlook.runs_model.any()
    lengths = [len(guess.tokens) for guess in drafter.guesses or []]
    assert (outlook.survival > 0).sum(1).tolist() == lengths == [6, 0, lengths[2]]
    assert (np.diff(outlook.survival, axis=1) <= 0).all() and outlook.survival.max() <= 1
    assert [len(tokens) for tokens in proposals(drafter.propose(sequences, [2, 0, 6]))] == [2, 0, lengths[2]]


def test_a_guess_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    guess = SuffixDrafter._guess
    monkeypatch.setattr(SuffixDrafter, "_guess", lambda self, row, most: made.append(row.id) or guess(self, row, most))
    drafter, sequences = SuffixDrafter(), batch([[1, 2, 1]])
    for _ in range(3):
        drafter.outlook(sequences, [4], Prices())
        drafter.propose(sequences, [4])
        commit(drafter, sequences, [[2]])
    assert len(made) == 3


def test_a_guess_that_was_not_proposed_is_judged_up_to_its_first_error() -> None:
    drafter, sequences = SuffixDrafter(), batch([[1, 2, 3, 4, 1, 2]])
    before = drafter.experience.rates([0], pooled=False)[0]
    assert drafter.look(sequences.rows, [4])[0].tokens == [3, 4, 1, 2]
    commit(drafter, sequences, [[3, 9, 1, 2]])
    after = drafter.experience.rates([sequences.rows[0].id], pooled=False)[0]
    assert np.sign(after - before).tolist() == [0, 0, 1, -1, *[0] * 13]  # by two and three matched tokens


def test_texts_go_with_their_rows() -> None:
    # CASES 38, 82
    drafter = SuffixDrafter()
    found = Engine(TableLM(random_table(7, seed=3)), drafter)
    prompts = [[i % 7, 1, i % 5, 1] for i in range(40)]
    lengths = [1 + i % 9 for i in range(40)]
    most = 0
    original = drafter.observe

    def observe(step: Step) -> None:
        nonlocal most
        most = max(most, len(drafter._texts))
        original(step)

    drafter.observe = observe  # type: ignore[method-assign]
    found.generate(prompts, max_new_tokens=lengths, max_batch_size=4)
    assert drafter._texts == {} and 0 < most <= 4
    stream = found.stream(prompts, max_new_tokens=9, max_batch_size=4)
    for _ in range(9):
        next(stream)
    assert drafter._texts
    stream.close()  # type: ignore[attr-defined]
    assert drafter._texts == {} and list(drafter.experience) == []  # also of rows that never finished


@pytest.mark.parametrize("share", [False, True])
def test_memory_stays_flat_over_a_thousand_requests(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "MOST_TOKENS", 1000)
    drafter = SuffixDrafter(share=share)
    draw = random.Random(0)

    def serve(requests: int) -> int:
        for _ in range(requests):
            sequences = batch([[draw.randrange(50) for _ in range(10)]])
            drafter.propose(sequences, [4])
            commit(drafter, sequences, [[draw.randrange(50) for _ in range(9)]])
            drafter.observe(Step(sequences.rows, [0], [0], [0], finished=[0]))
            drafter.free(0)
        return tracemalloc.get_traced_memory()[0]

    serve(200)
    tracemalloc.start()
    try:
        early = serve(200)
        assert serve(600) < early + 1_500_000
        assert serve(200) < early + (
            1_500_000 if share else 20_000
        )  # the store is somewhere between half full and full
    finally:
        tracemalloc.stop()


def test_a_greedy_loop_is_drafted_right() -> None:
    # A greedy text of a model that reads two tokens runs into a cycle, which is then proposed whole.
    found = Engine(TableLM(random_table(6, seed=3), context=512), SuffixDrafter())
    output = found.generate([[1], [2, 3]], max_new_tokens=300, num_draft_tokens=6)
    plain = found.generate([[1], [2, 3]], max_new_tokens=300, num_draft_tokens=0)
    assert output.token_ids == plain.token_ids and output.stats.acceptance_rate > 0.8


def test_shared_outputs_are_drafted_and_change_nothing() -> None:
    found = Engine(TableLM(random_table(6, seed=3), context=512), SuffixDrafter(share=True))
    plain = found.generate([[1], [2, 3]], max_new_tokens=30, num_draft_tokens=0)
    for _ in range(2):
        assert found.generate([[1], [2, 3]], max_new_tokens=30, num_draft_tokens=6).token_ids == plain.token_ids
    given = {"max_new_tokens": 60, "temperature": 1.0, "seed": 5, "rule": "coupled"}
    plain = Engine(found.target).generate([[1], [2, 3]], **given)
    first, second = (found.generate([[1], [2, 3]], num_draft_tokens=6, **given) for _ in range(2))
    assert first.token_ids == second.token_ids == plain.token_ids
    assert second.stats.num_target_passes < 0.5 * first.stats.num_target_passes


@pytest.mark.parametrize("factor", [0, -1.0, math.nan, "2", None])
def test_a_factor_that_is_no_positive_number_is_refused(factor: Any) -> None:
    with pytest.raises(ConfigError, match="factor must be > 0, got"):
        SuffixDrafter(factor=factor)
