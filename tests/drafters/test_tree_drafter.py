"""Trees of a draft model: more of them survives, the text stays the same, and the draft's cache follows the path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import Draft, Engine
from specdec.drafters.grown import DEEPEST, GREEDY, RACE
from specdec.drafters.model import ModelDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.lm.base import CachedLM
from specdec.sequences import Sequences, Step
from specdec.tree import Branches
from toys import TableLM, native, noisy, random_table, tiny_gpt

PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1], [2, 2], [9] * 20]
TARGET = tiny_gpt(0)
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}]


class Watched(TreeDrafter):
    """Checks after every step that the draft model has read the row's own text, and notes how trees looked."""

    def __init__(self, lm: CachedLM) -> None:
        super().__init__(lm)
        self.drafts: list[Draft] = []

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        self.drafts.append(draft)
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        assert isinstance(self.lm, TableLM)
        for slot, row in enumerate(step.rows):
            read, start = self.lm.lengths[slot], self.lm.starts[slot]
            assert start + read < len(row.tokens)
            assert self.lm.memory[slot, :read].tolist() == row.tokens[start : start + read]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_text_is_that_of_plain_decoding_and_more_survives(batch: int, settings: dict[str, Any]) -> None:
    prompts, settings = PROMPTS[:batch], {"max_new_tokens": 60, **settings}
    plain = Engine(native(TARGET)).generate(prompts, **settings)
    draft = native(noisy(TARGET, 0.02))
    chain = Engine(native(TARGET), ModelDrafter(draft)).generate(prompts, num_draft_tokens=4, **settings)
    tree = Engine(native(TARGET), TreeDrafter(draft)).generate(prompts, num_draft_tokens=16, **settings)
    assert tree.token_ids == plain.token_ids == chain.token_ids
    assert tree.stats.mean_acceptance_length > 1.1 * chain.stats.mean_acceptance_length


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 1.0, "rule": "rejection", "seed": 1}])
def test_the_cache_of_the_draft_follows_the_path(settings: dict[str, Any]) -> None:
    table = random_table(12, seed=3)
    drafter = Watched(TableLM(0.7 * table + random_table(12, seed=4, spread=1.0), context=48))
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    Engine(TableLM(table, context=64), drafter).generate(
        prompts, max_new_tokens=[30, 5, 60, 41, 17], num_draft_tokens=14, max_batch_size=3, **settings
    )
    assert any(draft.parents and max(map(len, draft.parents)) > 8 for draft in drafter.drafts)
    assert any(-1 in own[1:] for draft in drafter.drafts for own in draft.parents or [])  # branches at the root


def test_a_wrong_path_is_seen() -> None:
    """The negative control of the test above: the sibling is kept."""

    class Wrong(Watched):
        def observe(self, step: Step) -> None:
            paths = [[max(0, place - 1) for place in path] for path in step.paths or []]
            super().observe(Step(**{**vars(step), "paths": paths or None}))

    table = random_table(12, seed=3)
    drafter = Wrong(TableLM(0.7 * table + random_table(12, seed=4, spread=1.0)))
    with pytest.raises(AssertionError):
        Engine(TableLM(table), drafter).generate([[1, 2]], max_new_tokens=40, num_draft_tokens=14)


def test_rows_with_processors_draft_chains() -> None:
    settings = {"max_new_tokens": 30, "repetition_penalty": 1.2}
    drafter = TreeDrafter(native(noisy(TARGET, 0.02)))
    found = Engine(native(TARGET), drafter).generate(PROMPTS, num_draft_tokens=6, **settings)
    assert found.token_ids == Engine(native(TARGET)).generate(PROMPTS, **settings).token_ids


def test_logprobs_of_a_path_are_the_targets() -> None:
    plain = Engine(native(TARGET)).generate(PROMPTS, max_new_tokens=30, logprobs=True)
    drafter = TreeDrafter(native(noisy(TARGET, 0.02)))
    found = Engine(native(TARGET), drafter).generate(PROMPTS, max_new_tokens=30, logprobs=True, num_draft_tokens=12)
    assert found.logprobs is not None and plain.logprobs is not None
    for ours, theirs in zip(found.logprobs, plain.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_chosen_sizes() -> None:
    """With ``auto`` trees grow and shrink, and the text stays."""
    drafter = TreeDrafter(native(noisy(TARGET, 0.02)))
    found = Engine(native(TARGET), drafter).generate(PROMPTS, max_new_tokens=60)
    assert found.token_ids == Engine(native(TARGET)).generate(PROMPTS, max_new_tokens=60).token_ids


def test_a_tree_goes_deep_where_the_draft_is_sure_and_reads_no_node_in_vain() -> None:
    sure = torch.full((12, 12), -12.0).scatter_(1, (torch.arange(12) + 1)[:, None] % 12, 12.0)
    sure = sure.expand(12, 12, 12)
    table = TableLM(sure)
    read: list[int] = []
    append = table.append

    def counting(tokens: Tensor, *given: Any, **named: Any) -> Tensor:
        read.append(tokens.shape[1])
        return append(tokens, *given, **named)

    table.append = counting  # type: ignore[method-assign]
    output = Engine(TableLM(sure), TreeDrafter(table)).generate([[1]], max_new_tokens=34, num_draft_tokens=48)
    assert output.stats.num_target_passes == 2  # 16 levels and the token after them
    assert max(read[1:]) <= 8 and sum(read) < 34 + 2 * 32  # one node a level, but where the tree is not full yet


def test_the_chances_of_children_leave_room_for_none_of_them() -> None:
    chances = torch.tensor([[0.5, 0.3, 0.1], [0.9, 0.02, 0.01], [0.02, 0.019, 0.018]]).log()
    for surety in (GREEDY, RACE):
        found = surety.reached(chances).exp()
        assert bool((found.diff() < 0).all()) and bool((found.sum(1) < 1).all())
        none = 1 - found.sum(1)
        assert none[2] > none[0] > none[1]  # the less sure the draft, the likelier


def test_a_tree_with_many_branches_reaches_its_deepest_level() -> None:
    unsure = torch.full((12, 12), -2.0).scatter_(1, (torch.arange(12) + 1)[:, None] % 12, 2.0).expand(12, 12, 12)
    drafter = Watched(TableLM(unsure))
    Engine(TableLM(unsure), drafter).generate([[1]], max_new_tokens=40, num_draft_tokens=48)
    tree = Branches()
    assert drafter.drafts[0].parents is not None
    tree.grow(drafter.drafts[0].parents[0])
    assert max(tree.depths) + 1 == DEEPEST
