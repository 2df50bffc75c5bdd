"""Prompt lookup finds what a search through the whole text finds, and forgets rows that are gone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from specdec import Draft, Engine
from specdec.drafters.ngram import NgramDrafter
from specdec.sequences import Request, Row, Sequences, Step
from toys import native, tiny_gpt


def search(tokens: list[int], count: int, longest: int = 4, shortest: int = 1) -> list[int]:
    """The definition: what followed the latest earlier occurrence of the longest n-gram that has one."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size < len(tokens) and tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])  # may be a token that was itself guessed
                return text[len(tokens) :]
    return []


def batch(texts: list[list[int]]) -> Sequences:
    """Rows with these texts, as an engine would hand them to a drafter."""
    device = torch.device("cpu")
    rows = [Row(Request(tuple(text), 10_000), i, None, device) for i, text in enumerate(texts)]
    return SimpleNamespace(rows=rows, device=device, __len__=lambda: len(rows))  # type: ignore[return-value]


def proposals(draft: Draft) -> list[list[int]]:
    assert draft.probs is None  # certain: one-hot laws
    return [row[:length] for row, length in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("longest", "shortest"), [(4, 1), (2, 2), (1, 1), (6, 3)])
def test_the_table_finds_what_a_search_finds(longest: int, shortest: int) -> None:
    generator = random.Random(longest)
    drafter = NgramDrafter(max_ngram=longest, min_ngram=shortest)
    texts = [[generator.randrange(vocab) for _ in range(generator.randrange(1, 12))] for vocab in (1, 2, 2, 3, 5, 9)]
    sequences = batch(texts)
    for _ in range(60):
        counts = [generator.randrange(7) for _ in texts]
        found = proposals(drafter.propose(sequences, counts))
        for row, count, proposed in zip(sequences.rows, counts, found, strict=True):
            assert proposed == (search(row.tokens, count, longest, shortest) if count else [])
        for row in sequences.rows:  # rows grow by different amounts, none included
            vocab = max(row.tokens) + 1
            row.tokens += [generator.randrange(vocab) for _ in range(generator.randrange(5))]


def test_a_text_that_repeats_itself_is_proposed() -> None:
    assert proposals(NgramDrafter().propose(batch([[1, 2, 3, 4, 1, 2]]), [3])) == [[3, 4, 1]]
    assert proposals(NgramDrafter().propose(batch([[7, 7, 7]]), [4])) == [[7, 7, 7, 7]]  # its own guess goes on
    assert proposals(NgramDrafter().propose(batch([[5, 1, 5, 2, 5]]), [2])) == [[2, 5]]  # the latest wins
    longest = [1, 2, 3, 9, 3, 8, 1, 2, 3]  # "1 2 3" was followed by 9, the latest "3" alone by 8
    assert proposals(NgramDrafter().propose(batch([longest]), [1])) == [[9]]


def test_nothing_repeated_is_no_proposal() -> None:
    for texts in ([[1]], [[1, 2, 3]], [[1], [2, 3]]):
        draft = NgramDrafter().propose(batch(texts), [4] * len(texts))
        assert proposals(draft) == [[]] * len(texts) and draft.tokens.shape == (len(texts), 0)


def test_rows_do_not_read_each_others_text() -> None:
    draft = NgramDrafter().propose(batch([[1, 2, 3, 4], [9, 1, 2], [5, 5, 6]]), [3, 3, 3])
    assert proposals(draft) == [[], [], []]


def test_tables_go_with_their_rows() -> None:
    # CASES 38, 82
    drafter = NgramDrafter()
    found = Engine(native(tiny_gpt(0)), drafter)
    prompts = [[i % 7, 1, i % 5, 1] for i in range(40)]
    lengths = [1 + i % 9 for i in range(40)]
    most = 0
    original = drafter.observe

    def observe(step: Step) -> None:
        nonlocal most
        most = max(most, len(drafter._tables))
        original(step)

    drafter.observe = observe  # type: ignore[method-assign]
    found.generate(prompts, max_new_tokens=lengths, max_batch_size=4)
    assert drafter._tables == {} and 0 < most <= 4
    stream = found.stream(prompts, max_new_tokens=9, max_batch_size=4)
    for _ in range(9):
        next(stream)
    assert drafter._tables
    stream.close()  # type: ignore[attr-defined]
    assert drafter._tables == {}  # also of rows that never finished


def test_a_greedy_loop_is_drafted_right() -> None:
    # A greedy text of a model that reads two tokens runs into a cycle; lookup then proposes whole blocks.
    from toys import TableLM, random_table

    found = Engine(TableLM(random_table(6, seed=3), context=512), NgramDrafter())
    output = found.generate([[1], [2, 3]], max_new_tokens=300, num_draft_tokens=6)
    plain = found.generate([[1], [2, 3]], max_new_tokens=300, num_draft_tokens=0)
    assert output.token_ids == plain.token_ids and output.stats.acceptance_rate > 0.8
