"""What a user's drafter proposes: too much costs time, and what is no draft is said with the drafter's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specdec import ConfigError, Draft, Drafter, Engine
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.lm.base import CachedLM
from specdec.lm.native import NativeLM
from specdec.sequences import Sequences, Step
from toys import native, tiny_gpt

PROMPTS = [[5, 9, 2], [17, 4], [3, 3, 44, 20, 8]]
NEW, VOCAB, ROWS = 24, 61, 3


class Careless:
    """A user's drafter that proposes the same token, and as many as it likes."""

    def __init__(self, token: int, count: int) -> None:
        self.token, self.count = token, count

    def reserve(self, rows: int, length: int) -> None: ...
    def observe(self, step: Step) -> None: ...
    def copy(self, source: int, target: int, length: int | None = None) -> None: ...
    def free(self, rows: int) -> None: ...

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        rows = len(sequences)
        return Draft(torch.full((rows, self.count), self.token), torch.full((rows,), self.count))


@pytest.mark.parametrize(
    "wrap", [lambda own: own, lambda own: HybridDrafter(own, SuffixDrafter())], ids=["alone", "hybrid"]
)
def test_a_users_drafter_that_proposes_too_much_costs_time_only(wrap: Callable[[Any], Drafter]) -> None:
    engine = Engine(native(tiny_gpt(0, context=32)), wrap(Careless(9, 12)))
    expected = Engine(native(tiny_gpt(0, context=32))).generate(PROMPTS, max_new_tokens=60, context="slide")
    output = engine.generate(PROMPTS, max_new_tokens=60, context="slide", num_draft_tokens=2)
    assert output.token_ids == expected.token_ids
    assert output.stats.num_draft_tokens <= 2 * output.stats.num_target_passes * len(PROMPTS)


@pytest.mark.parametrize("token", [61, -1])
@pytest.mark.parametrize("kind", [native, NativeLM])
def test_a_users_drafter_that_proposes_no_token_is_named(token: int, kind: Callable[..., CachedLM]) -> None:
    with pytest.raises(ConfigError, match=rf"Careless proposed token id {token}; the target knows 0 to 60"):
        Engine(kind(tiny_gpt(0)), Careless(token, 3)).generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=3)


def test_a_tree_is_cut_behind_what_was_asked_for() -> None:
    tokens, parents = torch.tensor([[1, 2, 3], [4, 5, 99]]), [[-1, -1, 0], [-1, 0]]
    draft = Draft(tokens, torch.tensor([3, 2]), parents=parents).checked([2, 1], 61, object())
    assert draft.tokens.tolist() == [[1, 2], [4, 0]] and draft.lengths.tolist() == [2, 1]
    assert draft.parents == [[-1, -1], [-1]]


class Says(Careless):
    """Proposes what it was given."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        return self.found


TOKENS, LENGTHS = torch.full((ROWS, 2), 7), torch.full((ROWS,), 2)
EVEN = torch.full((ROWS, 2, VOCAB), 1 / VOCAB)


def without(token: int) -> torch.Tensor:
    found = torch.full((ROWS, 2, VOCAB), 1 / (VOCAB - 1))
    found[..., token] = 0
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "NoneType, expected specdec.Draft"),
        (Draft([[1]] * ROWS, LENGTHS), "tokens list, expected a tensor of integer numbers \\[3, K\\]"),  # type: ignore[arg-type]
        (Draft(TOKENS[:1], LENGTHS), "tokens torch.int64 \\[1, 2\\], expected a tensor of integer numbers \\[3, K\\]"),
        (Draft(TOKENS.float(), LENGTHS), "tokens torch.float32"),
        (Draft(TOKENS, [2] * ROWS), "lengths list"),  # type: ignore[arg-type]
        (Draft(TOKENS, LENGTHS.float()), "lengths torch.float32"),
        (Draft(TOKENS, LENGTHS[:2]), "lengths torch.int64 \\[2\\]"),
        (Draft(TOKENS, -LENGTHS), "lengths of -2 of 2 tokens"),
        (Draft(TOKENS[:, :1], LENGTHS), "lengths of 2 of 1 tokens"),
        (Draft(TOKENS, LENGTHS, EVEN[..., 1:]), "probs torch.float32 \\[3, 2, 60\\]"),
        (Draft(TOKENS, LENGTHS, EVEN * 0), "sum to 1"),
        (Draft(TOKENS, LENGTHS, EVEN.log()), "sum to 1"),
        (Draft(TOKENS, LENGTHS, 10 * EVEN), "sum to 1"),
        (Draft(TOKENS, LENGTHS, EVEN * float("nan")), "sum to 1"),
        (Draft(TOKENS, LENGTHS, without(7)), "more than 0 for the token proposed"),
        (Draft(TOKENS, LENGTHS, parents=[[-1, 0]] * 2), "parents of \\[2, 2\\] tokens, expected one for every token"),
        (Draft(TOKENS, LENGTHS, parents=[[-1, 0], [-1], [-1, 0]]), "parents of \\[2, 1, 2\\] tokens"),
        (Draft(TOKENS, LENGTHS, parents=[]), "parents of \\[\\] tokens"),
        (Draft(TOKENS, LENGTHS, parents=[[-1, 1]] * 3), "places of earlier tokens"),
    ],
)
def test_what_is_no_draft_is_said(found: Any, said: str) -> None:
    engine = Engine(native(tiny_gpt(0)), Says(found))
    with pytest.raises(ConfigError, match=f"Says proposed .*{said}"):
        engine.generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=2, temperature=1.0)
    assert Engine(engine.target).generate(PROMPTS, max_new_tokens=2).token_ids


def test_what_is_a_draft_is_taken() -> None:
    tokens, lengths, even, other = TOKENS[:1], LENGTHS[:1], EVEN[:1], without(8)[:1]
    for draft in (Draft(tokens.int(), lengths.int(), even), Draft(tokens, lengths, other.bfloat16())):
        engine = Engine(native(tiny_gpt(0)), Says(draft))
        output = engine.generate(PROMPTS[:1], max_new_tokens=4, num_draft_tokens=2, temperature=1.0)
        assert output.stats.num_draft_tokens > 0
