"""Calls that break, are abandoned, refused or share a model with another: nothing of them shows in any other call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import ConfigError, Drafter, Engine
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.own import SelfDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.lm.base import CachedLM
from specdec.lm.native import NativeLM
from specdec.sequences import Step
from toys import native, noisy, tiny_gpt

PROMPTS = [[5, 9, 2], [17, 4], [3, 3, 44, 20, 8]]
NEW = 24


def draft_model() -> CachedLM:
    return native(noisy(tiny_gpt(0), 0.015))


DRAFTERS: dict[str, Callable[[CachedLM], Drafter]] = {
    "model": lambda target: ModelDrafter(draft_model()),
    "tree": lambda target: TreeDrafter(draft_model()),
    "hybrid": lambda target: HybridDrafter(ModelDrafter(draft_model()), SuffixDrafter()),
    "self": lambda target: SelfDrafter(target),
}


def plain(prompts: Sequence[Sequence[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    return Engine(native(tiny_gpt(0))).generate(prompts, max_new_tokens=NEW, **settings).token_ids


@pytest.mark.chosen
@pytest.mark.parametrize("name", DRAFTERS)
def test_an_interrupted_step_leaves_nothing_in_the_drafter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = native(tiny_gpt(0))
    engine = Engine(target, DRAFTERS[name](target))
    monkeypatch.setattr(engine.ahead, "play", lambda *given: None)  # single steps: there a draft waits for its verdict
    append, calls = target.append, []

    def breaks(tokens: Tensor, *given: Any, **settings: Any) -> Tensor:
        calls.append(tokens.shape[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return append(tokens, *given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(target, "append", breaks)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=4)
    assert calls[-1] > 1, "the step that broke had a draft"
    expected = plain()
    for drafted in (0, "auto", 4):  # of one row as well: what is left of three fits no other number
        assert engine.generate(PROMPTS[:1], max_new_tokens=NEW, num_draft_tokens=drafted).token_ids == expected[:1]
        assert engine.generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=drafted).token_ids == expected


class BreaksTwice(ModelDrafter):
    """As if Ctrl-C was pressed a second time, while the first one is being dealt with."""

    breaks = True

    def observe(self, step: Step) -> None:
        if self.breaks:
            raise KeyboardInterrupt
        super().observe(step)

    def free(self, rows: int) -> None:
        super().free(rows)
        if self.breaks:
            self.breaks = False
            raise KeyboardInterrupt


def test_who_interrupts_twice_can_go_on() -> None:
    engine = Engine(native(tiny_gpt(0)), BreaksTwice(draft_model()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=4)
    assert engine.generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=4).token_ids == plain()


def test_a_model_is_kept_while_rows_wait_and_none_lives() -> None:
    target = native(tiny_gpt(0))
    first, second = Engine(target), Engine(target)
    stream = first.stream(PROMPTS, max_new_tokens=NEW, max_batch_size=1)
    pieces = []
    while not pieces or pieces[-1].finish_reason is None:
        pieces.append(next(stream))
    assert not any(target.lengths), "between the first row and the second"
    with pytest.raises(ConfigError, match="middle of a stream"):
        second.generate(PROMPTS, max_new_tokens=NEW)
    pieces += stream
    texts = [[token for piece in pieces if piece.index == i for token in piece.token_ids] for i in range(len(PROMPTS))]
    assert texts == plain() == second.generate(PROMPTS, max_new_tokens=NEW).token_ids


@pytest.mark.parametrize("shared", ["drafter", "model", "model of a hybrid"])
def test_a_draft_model_is_kept_too(shared: str) -> None:
    drafter = ModelDrafter(draft_model())
    first = Engine(native(tiny_gpt(0)), drafter)
    others = {
        "drafter": drafter,
        "model": ModelDrafter(drafter.lm),
        "model of a hybrid": HybridDrafter(ModelDrafter(drafter.lm), SuffixDrafter()),
    }
    second = Engine(native(tiny_gpt(0)), others[shared])
    stream = first.stream(PROMPTS, max_new_tokens=NEW)
    next(stream)
    with pytest.raises(ConfigError, match="middle of a stream"):
        second.generate(PROMPTS, max_new_tokens=NEW)
    stream.close()
    assert second.generate(PROMPTS, max_new_tokens=NEW).token_ids == plain()


@pytest.mark.chosen
def test_a_call_that_is_never_begun_takes_no_statistics() -> None:
    engine = Engine(native(tiny_gpt(0)), ModelDrafter(draft_model()))
    stream = engine.stream(PROMPTS, max_new_tokens=NEW)
    next(stream)
    decisions = engine.controller("auto", greedy=True).decisions
    engine.stream(PROMPTS, max_new_tokens=NEW)
    assert engine.controller("auto", greedy=True).decisions is decisions
    stream.close()


def test_the_last_piece_of_a_bad_request_says_why() -> None:
    pieces = list(Engine(native(tiny_gpt(0))).stream([[5, 9], []], max_new_tokens=4, on_error="return"))
    (bad,) = [piece for piece in pieces if piece.index == 1]
    assert bad.finish_reason == "error" and "prompt 1 is empty" in str(bad.error)
    assert all(piece.error is None for piece in pieces if piece.index == 0)


@pytest.mark.parametrize("kind", [native, NativeLM])
def test_mixed_precision_around_a_call_changes_nothing(kind: Callable[..., CachedLM]) -> None:
    engine = Engine(kind(tiny_gpt(0)), ModelDrafter(kind(noisy(tiny_gpt(0), 0.015))))
    expected = engine.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
        stream = engine.stream(PROMPTS, max_new_tokens=NEW)
        next(stream)
        assert torch.is_autocast_enabled("cpu"), "for whoever takes the pieces"
        stream.close()
    assert found.token_ids == expected.token_ids and found.logprobs == expected.logprobs
