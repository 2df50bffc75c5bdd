"""Prompts that begin alike share what was read of their beginning, within an engine, and no text depends on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec import Engine
from specdec.drafters.model import ModelDrafter
from specdec.heads import HEADS
from specdec.lm.cpu import CpuLM
from specdec.lm.paged import BLOCK
from toys import noisy, tiny_gpt


class CountingLM(CpuLM):
    """Counts the prompt tokens that it reads."""

    filled = 0

    def fill(self, texts: list[list[int]], *, first: int = 0) -> None:
        self.filled += sum(map(len, texts))
        super().fill(texts, first=first)


def text(length: int, seed: int) -> list[int]:
    found: Tensor = torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed))
    return found.tolist()


def engine(*, draft: bool = False) -> Engine:
    gpt = tiny_gpt(0, context=512)
    return Engine(CountingLM(gpt), ModelDrafter(CountingLM(noisy(gpt))) if draft else None)


SYSTEM = text(2 * BLOCK + 10, seed=0)
PROMPTS = [SYSTEM + text(n, seed=n) for n in (5, 30, 31, 90)]
SETTINGS = {"max_new_tokens": 20, "eos_token_id": None}


@pytest.mark.parametrize("draft", [False, True])
def test_a_second_call_reads_only_what_is_new(draft: bool) -> None:
    found = engine(draft=draft)
    alone = [engine().generate([prompt], num_draft_tokens=0, **SETTINGS).token_ids[0] for prompt in PROMPTS]
    lms = [found.target, *([found.drafter.lm] if isinstance(found.drafter, ModelDrafter) else [])]
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        before = [lm.filled for lm in lms]
        assert found.generate([prompt], **SETTINGS).token_ids == [expected]
        for lm, count in zip(lms, before, strict=True):
            new = len(prompt) - 1 - (0 if prompt is PROMPTS[0] else 2 * BLOCK)
            assert lm.filled - count == new
    # A whole conversation so far, the answer included.
    filled = found.target.filled
    found.generate([PROMPTS[0] + alone[0] + text(40, seed=7)], **SETTINGS)
    assert found.target.filled - filled == len(PROMPTS[0]) + 20 + 39 - 2 * BLOCK


def test_prompts_of_one_call_read_their_common_beginning_once() -> None:
    found = engine(draft=True)
    output = found.generate(PROMPTS, num_draft_tokens=4, **SETTINGS)
    assert found.target.filled == sum(len(prompt) - 1 - 2 * BLOCK for prompt in PROMPTS) + 2 * BLOCK
    for prompt, tokens in zip(PROMPTS, output.token_ids, strict=True):
        assert engine().generate([prompt], num_draft_tokens=0, **SETTINGS).token_ids == [tokens]


@pytest.mark.parametrize("kind", ["eagle3", "block"])
def test_a_head_finds_what_was_put_out_for_a_beginning_that_is_not_read_again(kind: str) -> None:
    """It drafts as if all had been read; what it has taken of a row is known nowhere else, and read again."""

    def headed() -> tuple[Engine, CountingLM]:
        gpt = tiny_gpt(0, context=512, layers=4)
        torch.manual_seed(0)
        target = CountingLM(gpt)
        return Engine(target, HEADS[kind].drafter(HEADS[kind].new(gpt, None), target)), target

    found, lm = headed()
    for count in (0, 3):
        for prompt in PROMPTS:
            alone, fresh = headed()
            expected = alone.generate([prompt], num_draft_tokens=count, **SETTINGS)
            before, first = lm.filled, prompt is PROMPTS[0] and count == 0
            output = found.generate([prompt], num_draft_tokens=count, **SETTINGS)
            assert output.token_ids == expected.token_ids
            assert output.stats.num_accepted_tokens == expected.stats.num_accepted_tokens
            known = 0 if first else 2 * BLOCK if count == 0 else (len(prompt) - 1) // BLOCK * BLOCK
            assert lm.filled - before == fresh.filled - known
    prompt = SYSTEM + text(50, seed=9)
    for count, blocks in ((3, 2), (0, 3)):  # a plain row leaves all that it read
        found, lm = headed()
        answer = found.generate([prompt], num_draft_tokens=count, **SETTINGS).token_ids[0]
        before, longer = lm.filled, prompt + answer + text(40, seed=8)
        found.generate([longer], num_draft_tokens=count, **SETTINGS)
        assert lm.filled - before == len(longer) - 1 - blocks * BLOCK
    lm.tap([0])  # what is remembered was put out by other layers
    assert not lm.knows(SYSTEM[:BLOCK]) and lm.reused_tokens == BLOCK


def test_what_was_put_out_is_recalled_token_for_token() -> None:
    lm = CpuLM(tiny_gpt(0, context=512, layers=4))
    lm.tap([0, 2])
    lm.reserve(1, 512)
    tokens = text(3 * BLOCK + 5, seed=2)
    lm.fill([tokens])
    lm.remember(0, tokens)
    whole = lm.take_features(0)
    lm.restart(0, 0)
    lm.recall(0, tokens)
    assert lm.lengths[0] == lm.features_held(0) == 3 * BLOCK
    assert torch.equal(lm.take_features(0), whole[: 3 * BLOCK])


def test_another_engine_knows_nothing_of_it() -> None:
    first, second = engine(), engine()
    first.generate([PROMPTS[0]], **SETTINGS)
    second.generate([PROMPTS[0]], **SETTINGS)
    assert second.target.filled == len(PROMPTS[0]) - 1


def test_a_row_past_its_context_is_read_as_if_nothing_were_known() -> None:
    gpt = tiny_gpt(0, context=160)
    prompt = text(150, seed=3)
    settings = {"max_new_tokens": 60, "eos_token_id": None, "context": "slide"}
    found = Engine(CpuLM(gpt))
    first = found.generate([prompt], **settings).token_ids
    assert found.generate([prompt, prompt[:140]], **settings).token_ids[0] == first[0]
    assert Engine(CpuLM(gpt)).generate([prompt], **settings).token_ids == first


def test_many_calls_keep_memory_bounded() -> None:
    found = engine()
    limit = 5
    found.target.cache._most_remembered = limit
    for seed in range(8):
        found.generate([text(200, seed=seed)], **SETTINGS)
        assert len(found.target.cache._remembered) <= limit
    assert not any(found.target.cache.rows)
