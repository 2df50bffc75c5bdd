"""The model drafter proposes its model's own text, from exactly the laws it reports, however far it was behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec import Draft, Engine
from specdec.drafters.model import ModelDrafter
from specdec.lm.base import window_start
from specdec.sampling import SamplingParams, filters, law
from specdec.sequences import Sequences, Step
from toys import TableLM, native, noisy, random_table, tiny_gpt

PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1], [2, 2]]


class Counting(TableLM):
    """Notes how many tokens each pass reads."""

    def __init__(self, table: Tensor, context: int) -> None:
        super().__init__(table, context)
        self.reads: list[int] = []

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        self.reads.append(tokens.numel())
        return super()._forward(tokens, lengths, first, needs_logits=needs_logits)


class Recording(ModelDrafter):
    """Notes every draft with the texts it was made for, and checks the cache after every step."""

    def __init__(self, lm: TableLM, skip: int = 0) -> None:
        super().__init__(lm)
        self.skip, self.turn = skip, 0
        self.records: list[tuple[list[list[int]], Draft]] = []

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self.turn += 1
        if self.skip and self.turn % (self.skip + 1):
            return Draft.empty(len(sequences), sequences.device)
        draft = super().propose(sequences, lengths)
        self.records.append(([list(row.tokens) for row in sequences.rows], draft))
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        for slot, row in enumerate(step.rows):
            if slot not in step.finished:
                read, start = self.lm.lengths[slot], self.lm.starts[slot]
                assert isinstance(self.lm, TableLM) and start + read < len(row.tokens)
                assert self.lm.memory[slot, :read].tolist() == row.tokens[start : start + read]
                if step.drafted[slot]:  # unread: the last token, and the last drafted one if it was accepted
                    width = self.records[-1][1].tokens.shape[1]
                    assert len(row.tokens) - start - read == 1 + (step.accepted[slot] == width)


def table_law(table: Tensor, text: list[int], params: SamplingParams) -> Tensor:
    logits = table[text[-2] if len(text) > 1 else 0, text[-1]].clone()
    for token in set(text):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    return law(logits, filters(params))


@pytest.mark.parametrize("skip", [0, 1, 3, 12])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_reported_laws_are_those_of_the_prefix_with_the_targets_filters(skip: int, temperature: float) -> None:
    # CASES 3, 42: after pauses of any length the cache catches up, and every law is that of exactly its prefix
    tables = [random_table(7, seed) for seed in (1, 2)]
    drafter = Recording(TableLM(tables[1], context=256), skip)
    found = Engine(TableLM(tables[0], context=256), drafter)
    filters = {"temperature": temperature, "top_k": 4, "top_p": 0.9} if temperature else {}
    filters["repetition_penalty"] = 1.5
    for rule in ("block", "coupled"):
        output = found.generate(
            PROMPTS * 3, max_new_tokens=[5, 40, 25, 60] * 3, num_draft_tokens=4, max_batch_size=5, seed=1, rule=rule,
            **filters,
        )  # fmt: skip
        assert output.stats.num_generated_tokens == 3 * 130
    assert len(drafter.records) > 5
    params = SamplingParams(**filters)
    for texts, draft in drafter.records:
        assert (draft.probs is None) == (temperature == 0)
        for b, text in enumerate(texts):
            for i in range(int(draft.lengths[b])):
                token = int(draft.tokens[b, i])
                expected = table_law(tables[1], text + draft.tokens[b, :i].tolist(), params)
                assert expected[token] > 0
                if draft.probs is not None:
                    torch.testing.assert_close(draft.probs[b, i], expected, rtol=1e-6, atol=1e-7)


def test_a_draft_is_never_longer_than_asked_for() -> None:
    drafter = Recording(TableLM(random_table(7, 1), context=256))
    Engine(TableLM(random_table(7, 2), context=30), drafter).generate(
        PROMPTS, max_new_tokens=[1, 2, 100, 8], num_draft_tokens=5
    )
    for texts, draft in drafter.records:
        for b, text in enumerate(texts):
            prompt = next(p for p in PROMPTS if text[: len(p)] == p)
            budget = {3: 1, 1: 2, 11: 100, 2: 8}[len(prompt)]
            last = min(len(prompt) + budget, 30)
            assert int(draft.lengths[b]) <= min(5, last - len(text) - 1)


def test_one_pass_per_drafted_token_and_no_token_read_twice() -> None:
    lm = Counting(random_table(7, 1), context=256)
    found = Engine(TableLM(lm.table, context=256), ModelDrafter(lm))
    stats = found.generate([list(range(5)) * 8], max_new_tokens=41, num_draft_tokens=4).stats
    assert stats.acceptance_rate == 1 and stats.num_target_passes == 9
    # the prompt but its last token; then two unread tokens (the bonus and the last drafted one) with the first pass
    assert lm.reads == [39, 1, 1, 1, 1] + [2, 1, 1, 1] * 7


def test_a_draft_with_a_shorter_context_reads_the_rows_latest_tokens() -> None:
    # CASES 50
    for context in (2, 3, 8, 17):
        table = random_table(7, 1)
        drafter = Recording(TableLM(table, context=context))
        found = Engine(TableLM(table, context=100), drafter)
        output = found.generate([list(range(7)) * 3, [1]], max_new_tokens=60, num_draft_tokens=4, rule="coupled")
        plain = found.generate([list(range(7)) * 3, [1]], max_new_tokens=60, num_draft_tokens=0)
        assert output.token_ids == plain.token_ids
        assert drafter.records and all(draft.tokens.shape[1] <= max(1, context // 2) for _, draft in drafter.records)
        assert max(drafter.lm.lengths, default=0) == 0
        if context == 17:  # the window always holds the two tokens that the table reads
            assert output.stats.acceptance_rate == 1
    tiny = ModelDrafter(TableLM(random_table(7, 1), context=1))
    output = Engine(TableLM(random_table(7, 1)), tiny).generate([[1, 2]], max_new_tokens=5)
    assert len(output.token_ids[0]) == 5 and output.stats.num_draft_tokens == 0


def test_windows_of_the_draft_always_leave_a_token_to_read() -> None:
    for context in range(2, 20):
        for length in range(1, 100):
            for count in range(1, context // 2 + 1):
                start = window_start(length + count, context)
                assert 0 <= start < length and length + count - start <= context


def test_a_prompts_samples_share_the_drafts_prefill_too() -> None:
    lm = Counting(random_table(7, 1), context=256)
    found = Engine(TableLM(random_table(7, 2), context=256), ModelDrafter(lm))
    given = {"seed": 0, "num_draft_tokens": 4}
    found.generate([list(range(7)) * 10], n=8, max_new_tokens=30, temperature=1.0, max_batch_size=1, **given)
    alone = sum(lm.reads)
    lm.reads.clear()
    found.generate([list(range(7)) * 10], n=8, max_new_tokens=30, temperature=1.0, max_batch_size=4, **given)
    assert sum(lm.reads) < alone  # rows that join a live sample find its prompt read


def test_caches_are_empty_after_every_call() -> None:
    found = Engine(native(tiny_gpt(0)), ModelDrafter(native(noisy(tiny_gpt(0)))))
    assert isinstance(found.drafter, ModelDrafter)
    for size in (1, 2, 4):
        found.generate(PROMPTS, max_new_tokens=[3, 9, 1, 30], max_batch_size=size)
        lm = found.drafter.lm
        assert not any(lm.lengths) and not any(lm._pending) and not any(lm.starts)
