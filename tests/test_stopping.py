"""Where a row ends: end of text, stop strings and length, at every place of a block that was accepted whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specdec import Engine, Output
from specdec.drafters.model import ModelDrafter
from toys import TableLM

# The target's greedy text is the next word, 0 -> 1 -> 2 ...; every word is a token, and spaces are part of them.
WORDS = [f"w{i} " for i in range(30)] + ["x", "yz", "a", "bc", "de", "f", "<eos>", "\n\n", ".", "!"]
SIZE = len(WORDS)


def make_engine(draft: bool = True, eos_ids: Sequence[int] = ()) -> Engine:
    table = torch.zeros(SIZE, SIZE, SIZE)
    table[:, torch.arange(SIZE), (torch.arange(SIZE) + 1) % SIZE] = 12.0
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    drafter = ModelDrafter(TableLM(table)) if draft else None
    return Engine(TableLM(table), drafter, tokenizer=wrapped, eos_ids=frozenset(eos_ids))


def check(output: Output, index: int, ids: Sequence[int], reason: str, text: str | None = None) -> None:
    """Ids, text, log-probabilities, marks and counters all end at the same token."""
    assert output.token_ids[index] == list(ids)
    assert output.finish_reasons[index] == reason
    assert output.logprobs is not None and output.texts is not None
    assert len(output.logprobs[index]) == len(output.from_draft[index]) == len(ids)  # CASES 26
    assert all(-0.1 < logprob < 0 for logprob in output.logprobs[index])
    if text is not None:
        assert output.texts[index] == text
    assert output.stats.num_generated_tokens == sum(map(len, output.token_ids))  # CASES 27


def run(found: Engine, prompts: list[list[int]], **settings: Any) -> Output:
    output = found.generate(prompts, logprobs=True, **settings)
    streamed: dict[int, list[int]] = {i: [] for i in range(len(output.token_ids))}
    texts = dict.fromkeys(streamed, "")
    for piece in found.stream(prompts, **settings):
        streamed[piece.index] += piece.token_ids
        texts[piece.index] += piece.text
    assert list(streamed.values()) == output.token_ids and list(texts.values()) == output.texts
    return output


def words(first: int, last: int) -> str:
    return "".join(WORDS[first : last + 1]).replace("<eos>", "")


def test_the_drafts_of_these_tests_are_accepted_whole() -> None:
    stats = make_engine().generate([[0]], max_new_tokens=27, num_draft_tokens=8).stats
    assert stats.acceptance_rate == 1 and stats.num_target_passes == 3


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_end_of_text_ends_a_row_at_every_place_of_a_block(k: int) -> None:
    # CASES 20, 21
    found = make_engine()
    for eos in range(1, 2 * k + 4):
        output = run(found, [[0], [20]], eos_token_id=eos, max_new_tokens=25, num_draft_tokens=k)
        check(output, 0, range(1, eos + 1), "eos", words(1, eos))
        ids = [i % SIZE for i in range(21, 46)]  # from 20 past the last id to 0 and on
        check(output, 1, ids[: 20 + eos], "length" if eos > 5 else "eos")


def test_the_first_of_several_ends_of_text_counts() -> None:
    found = make_engine(eos_ids=[9, 5])
    for k in (0, 3, 8):
        for prompt, given, end in ((0, "model", 5), (5, "model", 9), (0, [7, 3, 30], 3), (3, [7, 3, 30], 7)):
            output = run(found, [[prompt]], eos_token_id=given, max_new_tokens=25, num_draft_tokens=k)
            check(output, 0, range(prompt + 1, end + 1), "eos")
        output = run(found, [[0]], eos_token_id=None, max_new_tokens=25, num_draft_tokens=k)  # CASES 23
        check(output, 0, range(1, 26), "length", words(1, 25))


def test_rows_have_exactly_the_length_asked_for() -> None:
    # CASES 22
    found = make_engine()
    for k, length in itertools.product((0, 1, 2, 4, 8), (1, 2, 3, 9, 10)):
        output = run(found, [[0], [5, 6]], max_new_tokens=[length, length + 1], num_draft_tokens=k)
        check(output, 0, range(1, length + 1), "length", words(1, length))
        check(output, 1, range(7, length + 8), "length")
        assert output.stats.num_draft_tokens <= k * output.stats.num_row_steps


def test_end_of_text_at_the_last_token_allowed_is_end_of_text() -> None:
    found = make_engine(eos_ids=[6])
    for k in (0, 2, 5, 8):
        check(run(found, [[0]], max_new_tokens=6, num_draft_tokens=k), 0, range(1, 7), "eos")
        check(run(found, [[0]], max_new_tokens=5, num_draft_tokens=k), 0, range(1, 6), "length")


# The words from 29 on: "w29 " "x" "yz" "a" "bc" "de" "f" "<eos>" "\n\n" "." "!"
STOPS = [
    ("w3", 3, "w1 w2 "),  # the beginning of a token
    ("3 ", 3, "w1 w2 w"),  # its end
    ("w1 ", 1, ""),  # CASES 25: at the start of the block
    ("2 w", 3, "w1 w"),  # across two tokens
    (" w3 w4 w5 ", 5, "w1 w2"),  # across four
    ("w10 ", 10, words(1, 9)),
]


@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_a_stop_string_ends_a_row_wherever_it_lies(k: int) -> None:
    # CASES 24, 25, 26
    found = make_engine()
    for stop, last, text in STOPS:
        output = run(found, [[0]], stop=stop, max_new_tokens=20, num_draft_tokens=k)
        check(output, 0, range(1, last + 1), "stop", text)
        for cap in (last, last + 1):  # in the same block as the length cap, exactly at it and before it
            output = run(found, [[0]], stop=[stop], max_new_tokens=cap, num_draft_tokens=k)
            check(output, 0, range(1, last + 1), "stop", text)
        if last > 1:
            output = run(found, [[0]], stop=stop, max_new_tokens=last - 1, num_draft_tokens=k)
            check(output, 0, range(1, last), "length", words(1, last - 1))


def test_of_two_stop_strings_the_earlier_in_the_text_counts() -> None:
    found = make_engine()
    for k, stops in itertools.product((0, 2, 8), itertools.permutations(["xyz", "zabcd", "yzab"])):
        check(run(found, [[28]], stop=stops, max_new_tokens=10, num_draft_tokens=k), 0, [29, 30, 31], "stop", "w29 ")
    for k, stops in itertools.product((0, 2, 8), itertools.permutations(["de", "bcd"])):  # completed by the same token
        ids = [29, 30, 31, 32, 33, 34]
        check(run(found, [[28]], stop=stops, max_new_tokens=10, num_draft_tokens=k), 0, ids, "stop", "w29 xyza")


def test_end_of_text_and_stop_string_in_one_block_end_at_the_first_of_them() -> None:
    found = make_engine(eos_ids=[36])
    for k in (0, 3, 8):
        check(run(found, [[30]], stop=".", num_draft_tokens=k), 0, range(31, 37), "eos", "yzabcdef")
        check(run(found, [[30]], stop="ef", num_draft_tokens=k), 0, range(31, 36), "stop", "yzabcd")
        settings = {"eos_token_id": None, "num_draft_tokens": k}
        check(run(found, [[30]], stop="f\n\n.", **settings), 0, range(31, 39), "stop", "yzabcde")  # skips "<eos>"


def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_count() -> None:
    output = run(make_engine(), [[0, 1, 2, 3]], stop=["w2 ", "3 w4"], max_new_tokens=5)
    check(output, 0, range(4, 9), "length", words(4, 8))


def test_no_end_of_text_before_min_new_tokens() -> None:
    # Without the end of text the law is flat; coupled sampling shows that drafts do not change what comes instead.
    plain, drafted = make_engine(draft=False), make_engine()
    for least, eos in itertools.product((0, 1, 2, 3, 5, 9), ([2], [2, 3, 4])):
        settings = {
            "eos_token_id": eos, "min_new_tokens": [least, least + 2], "seed": 3, "temperature": 1.0,
            "max_new_tokens": 25, "rule": "coupled",
        }  # fmt: skip
        expected = plain.generate([[0], [0]], **settings)
        for k in (1, 4, 8):
            output = drafted.generate([[0], [0]], num_draft_tokens=k, **settings)
            assert output.token_ids == expected.token_ids and output.finish_reasons == expected.finish_reasons
            for ids, low in zip(output.token_ids, (least, least + 2), strict=True):
                assert not set(ids[:low]) & set(eos)


def test_rows_of_a_batch_end_each_for_its_own_reason() -> None:
    prompts = [[0], [8], [15], [26], [3]]
    for k, size in itertools.product((0, 4, 8), (1, 2, 5)):
        output = run(
            make_engine(eos_ids=[12]), prompts, stop="xy", max_new_tokens=[3, 20, 20, 20, 9], num_draft_tokens=k,
            max_batch_size=size,
        )  # fmt: skip
        check(output, 0, range(1, 4), "length", words(1, 3))
        check(output, 1, range(9, 13), "eos", words(9, 12))
        check(output, 2, range(16, 32), "stop", words(16, 29))
        check(output, 3, range(27, 32), "stop", words(27, 29))
        check(output, 4, range(4, 13), "eos", words(4, 12))


def test_marks_say_which_tokens_were_drafted() -> None:
    for k in (0, 1, 3):
        output = make_engine().generate([[0]], max_new_tokens=12, num_draft_tokens=k)
        assert output.from_draft == [[(i + 1) % (k + 1) != 0 for i in range(12)]]
    cut = make_engine().generate([[0]], max_new_tokens=12, num_draft_tokens=8, eos_token_id=3)
    assert cut.from_draft == [[True] * 3]
