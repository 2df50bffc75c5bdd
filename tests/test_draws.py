"""What is compiled draws the tokens and gives the verdicts that torch gives, or leaves them to torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import Engine, draws
from specdec.draft import Draft
from specdec.drafters.model import ModelDrafter
from specdec.lm.cpu import CpuLM
from specdec.sampling import Randomness, SamplingParams, filters
from specdec.verify import RULES, greedy
from toys import TableLM, noisy, random_table, tiny_gpt

pytestmark = pytest.mark.skipif(draws.library() is None, reason="no C compiler")
SIZES = [(1, 1, 5), (300, 4, 7), (100, 3, 64), (5, 0, 65), (8, 5, 1000), (2, 7, 4100)]  # rows, draft tokens, vocabulary
every_rule = pytest.mark.parametrize("rule", list(RULES))


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function as on a machine without a compiler."""

    def call(function: Callable[..., Any], *given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(draws, "library", lambda: None)
            return function(*given)

    return call


def steps() -> Iterator[tuple[Tensor, Draft, Tensor, Tensor]]:
    """Target laws, drafts of all kinds (near, equal and certain laws), seeds and starts."""
    generator = torch.Generator().manual_seed(0)
    for turn in range(60):
        rows, count, vocab_size = SIZES[turn % len(SIZES)]
        target = torch.randn(rows, count + 1, vocab_size, generator=generator) * 3
        target[..., 1:][
            torch.rand(rows, count + 1, vocab_size - 1, generator=generator) < 0.3
        ] = -torch.inf  # as top-k leaves it
        near = target[:, :count] + torch.randn(rows, count, vocab_size, generator=generator) * (turn % 4) / 3
        laws = near.softmax(-1)
        tokens = (
            torch.multinomial(laws.flatten(0, 1), 1, generator=generator).view(rows, count)
            if count
            else near[..., 0].long()
        )
        lengths = torch.randint(count + 1, (rows,), generator=generator)
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        starts = torch.randint(5000, (rows,), generator=generator)
        yield target.softmax(-1), Draft(tokens, lengths, None if turn % 3 == 2 else laws), seeds, starts


@every_rule
def test_verdicts_are_those_of_torch(rule: str, by_torch: Callable[..., Any]) -> None:
    sure = 0
    for target, draft, seeds, starts in steps():
        found = draws.verdict(rule, target, draft.tokens, draft.lengths, draft.probs, seeds, starts)
        expected = by_torch(RULES[rule], target, draft, Randomness(seeds, starts))
        if found is not None:
            sure += 1
            assert torch.equal(found[0], expected.accepted) and torch.equal(found[1], expected.next_token)
    assert sure >= 55  # what is too close to call is rare


def test_numbers_and_drafts_are_those_of_torch(by_torch: Callable[..., Any]) -> None:
    sure = 0
    for target, _, seeds, starts in steps():
        uniforms = by_torch(lambda: Randomness(seeds, starts)._accept_and_draft)  # noqa: B023 (called at once)
        assert torch.equal(uniforms, draws.uniforms(seeds, starts, uniforms.shape[2]))
        for coupled in (False, True):
            found = draws.draw(target[:, -1:], seeds, starts, 2, coupled=coupled)
            expected = by_torch(Randomness(seeds, starts, coupled=coupled).draft, 2, target[:, -1:])
            sure += found is not None
            assert found is None or torch.equal(found, expected)
    assert sure >= 110


def test_greedy_verdicts_are_those_of_torch(by_torch: Callable[..., Any]) -> None:
    for target, draft, _, _ in steps():
        logits = target.log().round(decimals=1)  # with ties
        logits[0, 0, 0], logits[-1, -1, -1] = torch.nan, torch.inf
        largest, tokens = draws.largest(logits), logits.argmax(-1)
        assert largest is not None
        tokens[0, 0] = tokens[-1, -1] = -1
        assert torch.equal(largest, tokens)
        certain = Draft(largest[:, :-1].clone(), draft.lengths)
        certain.tokens[:, 2:] += 1
        assert all(map(torch.equal, greedy(largest, certain), by_torch(greedy, largest, certain)))
    assert (draws.largest(torch.full((1, 1, 20), -torch.inf)) == -1).all()


def test_what_is_too_close_to_call_is_left_to_torch() -> None:
    law = torch.full((1, 1, 4), 0.25)
    seeds, starts = torch.tensor([7]), torch.tensor([0])
    assert draws.draw(law, seeds, starts, 0, coupled=False) is not None
    noise = Randomness(seeds, starts).target(torch.zeros(1, 1, dtype=torch.long), 4)
    tie = noise / noise.sum()  # everybody arrives at once
    assert draws.draw(tie, seeds, starts, 0, coupled=True) is None
    certain, none = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert draws.verdict("block", tie, certain, none, None, seeds, starts) is None
    assert draws.verdict("block", tie * torch.nan, certain, none, None, seeds, starts) is None


def test_what_does_not_fit_is_left_to_torch() -> None:
    law, seeds = torch.full((1, 2, 4), 0.25), torch.tensor([7])
    token, one = torch.tensor([[2]]), torch.tensor([1])

    def verdict(
        law: Tensor = law, tokens: Tensor = token, lengths: Tensor = one, probs: Tensor | None = None
    ) -> object:
        return draws.verdict("block", law, tokens, lengths, probs, seeds, seeds)

    assert verdict() is not None
    assert verdict(law.double()) is None and verdict(probs=law[:, :1].double()) is None
    assert verdict(tokens=torch.tensor([[4]])) is None and verdict(tokens=torch.tensor([[-1]])) is None
    assert verdict(lengths=torch.tensor([2])) is None and verdict(probs=law) is None
    assert draws.draw(law[:, :1].double(), seeds, seeds, 0, coupled=False) is None


@every_rule
def test_texts_are_the_same_without_a_compiler(rule: str, by_torch: Callable[..., Any]) -> None:
    def texts() -> list[list[int]]:
        engine = Engine(TableLM(random_table(6, seed=1)), ModelDrafter(TableLM(random_table(6, seed=2))))
        settings = {"seed": [3, 4, 5], "temperature": [1.0, 0.7, 0.0], "top_p": 0.95, "max_new_tokens": 30}
        return engine.generate([[1], [2, 3], [4]], rule=rule, num_draft_tokens=3, **settings).token_ids

    assert texts() == by_torch(texts)


def drafting(lm: CpuLM) -> Engine:
    return Engine(CpuLM(tiny_gpt(0)), ModelDrafter(lm))


@every_rule
def test_a_compiled_draft_model_draws_by_itself_what_it_would_be_asked_for(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    draw = CpuLM.draw
    monkeypatch.setattr(CpuLM, "draw", lambda self, *given: made.append(draw(self, *given)) or made[-1])

    def texts(*, itself: bool) -> list[list[int]]:
        monkeypatch.setattr(ModelDrafter, "draws_itself", itself)
        settings = {"seed": [3, 4, 5], "temperature": [1.0, 0.7, 1.3], "max_new_tokens": 40}
        engine = drafting(CpuLM(noisy(tiny_gpt(0), 0.02)))
        return engine.generate([[1], [2, 3], [4]], rule=rule, num_draft_tokens=5, **settings).token_ids

    expected = texts(itself=False)
    assert not made
    assert texts(itself=True) == expected
    assert made and all(found is not None for found in made)


@pytest.mark.parametrize("drawn", [0, 2])
def test_what_is_too_close_to_call_is_drawn_by_torch_and_the_chain_goes_on(
    drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that gives up in the middle of every chain, as draws.c does where rounding could decide."""
    choose = ctypes.CFUNCTYPE(
        ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
    )
    compiled = choose(ctypes.cast(draws.library().choose_drawn, ctypes.c_void_p).value)
    given_up = choose(lambda asked, place, *given: 0 if place == drawn else compiled(asked, place, *given))

    def text() -> list[list[int]]:
        engine = drafting(CpuLM(noisy(tiny_gpt(0), 0.02)))
        return engine.generate([[1], [2, 3]], temperature=0.8, seed=7, num_draft_tokens=5, max_new_tokens=40).token_ids

    expected, made = text(), draws.Drawing

    def giving_up(function: int, *given: Any, **named: Any) -> draws.Drawing:
        return made(ctypes.cast(given_up, ctypes.c_void_p).value, *given, **named)

    monkeypatch.setattr(draws, "Drawing", giving_up)
    assert text() == expected


def test_a_draft_model_without_laws_proposes_nothing() -> None:
    broken = tiny_gpt(1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    engine = drafting(CpuLM(broken))
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12, "rule": "coupled"}
    output = engine.generate([[1, 2]], num_draft_tokens=3, **settings)
    assert output.token_ids == Engine(CpuLM(tiny_gpt(0))).generate([[1, 2]], num_draft_tokens=0, **settings).token_ids
    assert output.stats.num_draft_tokens == 0


def test_filters_other_than_the_temperature_are_left_to_torch() -> None:
    def temperature(**given: Any) -> float | None:
        return filters(SamplingParams(**given)).temperature

    assert temperature(temperature=1.0) == 1 and temperature(temperature=0.5) == 0.5
    assert temperature() is None and temperature(temperature=0.5, top_p=0.9) is None
    assert temperature(temperature=1.0, top_k=4) is None
