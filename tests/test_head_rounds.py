"""Rounds with an EAGLE-3 head, and plain ones of a target that some head reads: what single steps would do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from eagle3_toys import trained_head
from specdec import Engine, Output
from specdec import ahead as ahead_module
from specdec.controller import FixedLength
from specdec.draft import Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.native import NativeLM
from specdec.nn.block import BlockHead
from specdec.nn.cpu import kernels
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.rounds import Played, Rounds
from specdec.sequences import Sequences
from test_rounds import PROMPTS, SETTINGS, Counted, counted, single, take  # noqa: F401 (fixtures)
from toys import tiny_gpt

pytestmark = pytest.mark.skipif(kernels(torch.float32) is None, reason="nothing is compiled here")


@cache
def gpt(context: int = 256) -> GPT:
    return tiny_gpt(0, layers=4, context=context)


@cache
def trained(**changes: Any) -> Eagle3Head:
    """A head that is right some of the time."""
    prompts = [[token] for token in range(30)]
    text = Engine(NativeLM(gpt())).generate(prompts, max_new_tokens=60, temperature=0.7, seed=1).token_ids
    return trained_head(gpt(), torch.tensor(text), 120, steps=3, **changes)


def engine(dtype: torch.dtype = torch.float32, **changes: Any) -> Engine:
    target = CpuLM(gpt().to(dtype) if dtype == torch.float32 else tiny_gpt(0, layers=4).to(dtype))
    return Engine(target, Eagle3Drafter(trained(**changes), target))


class InTurns(FixedLength):
    """Drafts of 0 to 4 tokens for some steps each, so that a head may be behind by some tokens, or by many."""

    def __init__(self) -> None:
        super().__init__(0)
        self.turn = 0

    @property
    def holds(self) -> int:
        return (2, 9, 3, 30)[self.turn % 4]

    def choose(self, sequences: Sequences, drafter: Drafter) -> list[int]:
        self.turn += 1
        self.num_draft_tokens = self.turn * 3 % 5
        return super().choose(sequences, drafter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_are_those_of_single_steps(
    settings: dict[str, Any],
    rows: int,
    count: int,
    dtype: torch.dtype,
    counted: Counted,  # noqa: F811
    single: Callable[..., Output],  # noqa: F811
) -> None:
    own = engine(dtype)
    asked = {**take(settings, rows), "max_new_tokens": 40, "seed": 3, "num_draft_tokens": count}
    expected = single(own, PROMPTS[:rows], **asked)
    assert not counted.calls
    for _ in range(2):
        found = own.generate(PROMPTS[:rows], **asked)
        assert (found.token_ids, found.finish_reasons) == (expected.token_ids, expected.finish_reasons)
        assert found.from_draft == expected.from_draft
    for name in ("num_target_passes", "num_draft_tokens", "num_accepted_tokens", "num_row_steps"):
        assert getattr(found.stats, name) == getattr(expected.stats, name), name
    assert counted.rounds > 1 and bool(counted.drafted) == bool(count)
    assert not count or found.stats.num_accepted_tokens > rows


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_narrow_head_drafts_the_same_in_rounds(
    settings: dict[str, Any],
    counted: Counted,  # noqa: F811
    single: Callable[..., Output],  # noqa: F811
) -> None:
    own = engine(width=16)
    asked = {**take(settings, 3), "max_new_tokens": 40, "seed": 3, "num_draft_tokens": 3}
    expected, found = single(own, PROMPTS[:3], **asked), own.generate(PROMPTS[:3], **asked)
    assert (found.token_ids, found.from_draft) == (expected.token_ids, expected.from_draft)
    assert counted.drafted and found.stats.num_accepted_tokens > 3


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_head_reads_what_plain_rounds_have_put_out(
    settings: dict[str, Any],
    rows: int,
    counted: Counted,  # noqa: F811
    single: Callable[..., Output],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lengths change from call to call, as where every step is made alone."""
    monkeypatch.setattr(Engine, "controller", lambda *given, **named: InTurns())
    asked = {**take(settings, rows), "max_new_tokens": 100, "seed": 4}
    expected = single(engine(), PROMPTS[:rows], **{**asked, "num_draft_tokens": 0})
    own = engine()
    for _ in range(2):
        found = own.generate(PROMPTS[:rows], **asked)
        if settings.get("rule") is None:
            assert found.token_ids == expected.token_ids
        assert found.stats.num_accepted_tokens > 4 * rows
    assert counted.rounds > 20 and counted.drafted


def test_what_is_held_is_what_the_head_has_not_read(
    counted: Counted,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After every call; and what is held are the outputs of these tokens."""
    own = engine()
    drafter = own.drafter
    assert isinstance(drafter, Eagle3Drafter)
    checked = 0
    play = CpuLM.play

    def checking(lm: CpuLM, asked: Rounds, draft: CachedLM | None) -> Played | None:
        nonlocal checked
        found = play(lm, asked, draft)
        if found is not None and draft is not None:
            for slot in range(len(asked.texts)):
                held = sum(map(len, lm._features.held(slot)))  # type: ignore[union-attr]
                assert held == lm.lengths[slot] - drafter.lm.lengths[slot]
                checked += held
        return found

    monkeypatch.setattr(ahead_module, "_MOST_ROUNDS", 4)
    monkeypatch.setattr(CpuLM, "play", checking)
    own.generate(PROMPTS[:3], max_new_tokens=50, num_draft_tokens=3)
    assert checked > 10


@pytest.mark.parametrize("count", [0, 3])
def test_a_target_that_a_head_has_read_runs_ahead_for_others_too(count: int, counted: Counted) -> None:  # noqa: F811
    """A block head drafts step by step; plain rounds, its own and those of an engine without drafter, are played."""
    target = CpuLM(gpt())
    expected = Engine(CpuLM(gpt())).generate(PROMPTS[:3], max_new_tokens=40, num_draft_tokens=0).token_ids
    torch.manual_seed(0)
    own = Engine(target, BlockDrafter(BlockHead.for_target(gpt()), target))
    before = counted.rounds
    assert own.generate(PROMPTS[:3], max_new_tokens=40, num_draft_tokens=count).token_ids == expected
    assert (counted.rounds > before) == (not count)
    assert Engine(target).generate(PROMPTS[:3], max_new_tokens=40).token_ids == expected
    assert counted.rounds > before + 20


@pytest.mark.parametrize("changes", [{"norm_before_fc": True}, {"fc_norm": True}, {"norm_output": True}])
def test_heads_that_are_not_compiled_whole_draft_step_by_step(changes: dict[str, Any], counted: Counted) -> None:  # noqa: F811
    own = engine(**changes)
    expected = Engine(CpuLM(gpt())).generate(PROMPTS[:2], max_new_tokens=30, num_draft_tokens=0).token_ids
    assert own.generate(PROMPTS[:2], max_new_tokens=30, num_draft_tokens=3).token_ids == expected
    assert not counted.drafted


@pytest.mark.parametrize("count", [0, 3])
def test_a_text_longer_than_the_context_goes_on(
    count: int,
    counted: Counted,  # noqa: F811
    single: Callable[..., Output],  # noqa: F811
) -> None:
    target = CpuLM(gpt(32))
    own = Engine(target, Eagle3Drafter(trained(), target))
    asked: dict[str, Any] = {"max_new_tokens": 90, "num_draft_tokens": count}
    assert own.generate(PROMPTS[:2], **asked).token_ids == single(own, PROMPTS[:2], **asked).token_ids
    assert counted.rounds > 20


def test_a_head_is_given_all_that_is_held_in_order() -> None:
    target = CpuLM(gpt())
    target.tap((0, 2))
    target.reserve(2, 32)
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(count, 64, generator=generator) for count in counts] for counts in ((3, 2, 1), (1, 4))]
    for slot, own in enumerate(parts):
        for part in own:
            target._features.hold(slot, part, anew=False)  # type: ignore[union-attr]
    reader = target._reader(2, 61, 8, 8, 8)
    assert reader is not None
    for takes in (True, False):
        held = target._hold(reader, 2, 8, takes=takes)
        assert held is not None and held[1].tolist() == ([6, 5] if takes else [0, 0])
        for outputs, own in zip(held[0] if takes else [], parts, strict=takes):
            assert torch.equal(outputs[: sum(map(len, own))], torch.cat(own))
