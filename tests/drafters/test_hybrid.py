"""The hybrid lets the lookup speak where it promises more, and keeps the model's cache right whoever spoke."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec import Draft, Engine
from specdec.draft import Prices
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.sequences import Request, Row, Sequences, Step
from toys import TableLM, random_table

TABLE = random_table(6, seed=3)
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 0, 1, 2, 3, 4, 5, 0, 1], [2, 2]]


class Watched(ModelDrafter):
    """Counts its proposals and checks after every step that its cache holds the text of every row it still knows."""

    def __init__(self, lm: TableLM) -> None:
        super().__init__(lm)
        self.proposals = 0

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self.proposals += 1
        return super().propose(sequences, lengths)

    def observe(self, step: Step) -> None:
        super().observe(step)
        assert isinstance(self.lm, TableLM)
        for slot, row in enumerate(step.rows):
            read, start = self.lm.lengths[slot], self.lm.starts[slot]
            if slot not in step.finished:
                assert self.lm.memory[slot, :read].tolist() == row.tokens[start : start + read]


def run(hybrid: HybridDrafter, **settings: Any) -> Any:
    given = {"max_new_tokens": 60, "num_draft_tokens": 4, "seed": 0, **settings}
    return Engine(TableLM(TABLE, context=256), hybrid).generate(PROMPTS, **given)


@pytest.mark.parametrize("temperature", [0.0, 1.0, [0.0, 0.7, 1.5, 0.0]])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_models_cache_is_right_whoever_spoke(temperature: Any, size: int) -> None:
    model = Watched(TableLM(0.7 * TABLE + random_table(6, seed=4), context=256))
    output = run(HybridDrafter(model, SuffixDrafter()), temperature=temperature, max_batch_size=size)
    assert 0 < model.proposals <= output.stats.num_target_passes
    plain = Engine(TableLM(TABLE, context=256)).generate(PROMPTS, max_new_tokens=60)
    greedy = [i for i in range(4) if (temperature if isinstance(temperature, float) else temperature[i]) == 0]
    assert [output.token_ids[i] for i in greedy] == [plain.token_ids[i] for i in greedy]


def test_a_cache_that_counts_the_lookups_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the model is told that its own draft was accepted when the lookup's was."""
    monkeypatch.setattr("specdec.drafters.hybrid.replace", lambda step, accepted: step)
    model = Watched(TableLM(0.7 * TABLE + random_table(6, seed=4), context=256))
    with pytest.raises(AssertionError):
        run(HybridDrafter(model, SuffixDrafter()))


def test_the_model_rests_while_the_lookup_is_right() -> None:
    model = Watched(TableLM(0.7 * TABLE + random_table(6, seed=4), context=512))
    output = run(HybridDrafter(model, SuffixDrafter()), max_new_tokens=200)  # a greedy text ends in a cycle
    assert model.proposals < 0.4 * output.stats.num_target_passes


def test_a_lookup_that_is_always_wrong_is_left_to_rest() -> None:
    class Wrong(SuffixDrafter):
        def _guess(self, row: Any, count: int) -> Any:
            found = super()._guess(row, count)
            return found._replace(tokens=[(token + 1) % 6 for token in found.tokens])

    model = Watched(TableLM(TABLE, context=256))
    output = run(HybridDrafter(model, Wrong()))
    assert model.proposals > 0.6 * output.stats.num_target_passes


def test_records_go_with_their_rows() -> None:
    hybrid = HybridDrafter(ModelDrafter(TableLM(TABLE, context=256)), SuffixDrafter())
    engine = Engine(TableLM(TABLE, context=256), hybrid)
    engine.generate(PROMPTS * 5, max_new_tokens=9, max_batch_size=3)
    assert list(hybrid.experience) == [] and hybrid.lookup._texts == {}
    stream = engine.stream(PROMPTS, max_new_tokens=9)
    next(stream)
    assert list(hybrid.lookup._texts)
    stream.close()  # type: ignore[attr-defined]
    assert list(hybrid.experience) == []


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_long_drafts_are_weighed_too(length: int) -> None:
    output = run(HybridDrafter(ModelDrafter(TableLM(TABLE, context=256)), SuffixDrafter()), num_draft_tokens=length)
    plain = Engine(TableLM(TABLE, context=256)).generate(PROMPTS, max_new_tokens=60)
    assert output.token_ids == plain.token_ids and max(output.stats.control.lengths) == length


def test_a_lookup_speaks_only_where_it_is_worth_a_step_alone() -> None:
    row = Row(Request((1, 2, 3) * 8, 10_000), 0, None, torch.device("cpu"))
    sequences: Any = SimpleNamespace(rows=[row])
    for alone, by_model in ((0.0, False), (100.0, True)):
        hybrid = HybridDrafter(ModelDrafter(TableLM(TABLE, context=256)), SuffixDrafter())
        assert hybrid.outlook(sequences, [4], Prices(0.1, alone)).runs_model.tolist() == [by_model]
