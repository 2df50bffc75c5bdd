"""A recurrent drafter changes no text: greedy equality, sampled laws, rows that come, go and fork; and it stays small."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ragged import Checked
from torch.utils._python_dispatch import TorchDispatchMode

from specdec import Draft, Engine
from specdec.drafters.model import ModelDrafter
from specdec.lm.base import CachedLM
from specdec.lm.recurrent import RecurrentLM
from specdec.sequences import Sequences
from specdec.verify import RULES
from test_law import ALPHA, ONE, WRONG_DRAFTS, alarm, sample
from toys import native, noisy, tiny_gpt, tiny_lstm

NEW, SAMPLES = 24, 2_500
PROMPTS = [
    torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 1, 19, 3, 11, 2, 5, 30)
]
MODELS = {"gpt": tiny_gpt(0), "lstm": tiny_lstm(0)}
DRAFTS = {"self": tiny_lstm(0), "noisy": noisy(tiny_lstm(0), 0.03), "unrelated": tiny_lstm(9, layers=1)}


@cache
def greedy_texts(target: str) -> list[list[int]]:
    """What the model itself says to each prompt alone, reading all of the text for every token."""
    model, found = MODELS[target], []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            text.append(int(model.lm_head(model(torch.tensor([text]))[0, -1]).argmax()))
        found.append(text[len(prompt) :])
    return found


@cache
def engine(target: str, draft: str) -> Engine:
    return Engine(native(MODELS[target]), ModelDrafter(RecurrentLM(DRAFTS[draft])))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("target", "draft"), [("gpt", "unrelated"), *(("lstm", draft) for draft in DRAFTS)])
def test_greedy_text_is_the_models_own(target: str, draft: str, rule: str) -> None:
    for batch in (1, 3, 8):
        for k in (1, 4):
            output = engine(target, draft).generate(PROMPTS[:batch], max_new_tokens=NEW, num_draft_tokens=k, rule=rule)
            assert output.token_ids == greedy_texts(target)[:batch], (batch, k)


def test_the_drafts_are_right_always_sometimes_and_never() -> None:
    rates = {
        draft: engine("lstm", draft).generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=3).stats.acceptance_rate
        for draft in DRAFTS
    }
    assert rates["self"] == 1 and 0.1 < rates["noisy"] < 0.95 and rates["unrelated"] < 0.1


def test_rows_come_go_and_move() -> None:
    """Eight prompts in three places, of unequal lengths: rows end at different steps and others take their slots."""
    lengths = [NEW - 2 * i for i in range(len(PROMPTS))]
    output = engine("lstm", "noisy").generate(PROMPTS, max_new_tokens=lengths, max_batch_size=3)
    assert output.token_ids == [text[:n] for text, n in zip(greedy_texts("lstm"), lengths, strict=True)]


def test_samples_of_a_prompt_fork_its_state() -> None:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 3, "rule": "coupled", "n": 4}
    plain = Engine(native(MODELS["lstm"])).generate(PROMPTS[:2], num_draft_tokens=0, **settings)
    for places in (8, 3):  # all samples at once, and some that join when their siblings are on their way
        forked = engine("lstm", "noisy").generate(PROMPTS[:2], max_batch_size=places, **settings)
        assert forked.token_ids == plain.token_ids
        assert 0.1 < forked.stats.acceptance_rate < 1


def drafter() -> ModelDrafter:
    return ModelDrafter(RecurrentLM(tiny_lstm(1, vocab_size=4)))


@pytest.mark.parametrize("rule", RULES)
def test_samples_follow_the_targets_law(rule: str) -> None:
    """2,500 texts of 5 tokens; one false alarm in 200,000 runs each if seeds were random."""
    output = sample(drafter(), ONE, SAMPLES, rule=rule, num_draft_tokens=4)
    assert 0.05 < output.stats.acceptance_rate < 0.95
    assert alarm(output, ONE, SAMPLES) > ALPHA


def test_the_alarm_notices_a_law_that_was_not_sampled() -> None:
    class Wrong(ModelDrafter):
        def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
            return WRONG_DRAFTS["argmax drawn, softmax reported"](super().propose(sequences, lengths))

    output = sample(Wrong(drafter().lm), ONE, SAMPLES, rule="rejection", num_draft_tokens=4)
    assert alarm(output, ONE, SAMPLES) < ALPHA


def test_what_was_refused_is_not_read_again() -> None:
    """A copy of some of a row's tokens reads them anew, those of refused drafts left out."""
    lstm = tiny_lstm(layers=2)
    checked = Checked(RecurrentLM(lstm), lambda text: lstm.lm_head(lstm(torch.tensor([text])))[0])
    checked.reserve(2, 20)
    checked.fill([[1, 2, 3], [4]])
    checked.append(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    checked.keep([1, 2])
    checked.append(torch.tensor([[11, 12], [13, 14]]))
    checked.keep([2, 1])
    for length in (6, 5, 4, 2, 0):
        checked.copy(0, 1, length)
        checked.append(torch.tensor([[15, 16]]), first=1)
        checked.keep([0], first=1)


def state_numbers(lm: RecurrentLM) -> list[int]:
    return [sum(state.numel() for state in row.states.values()) for row in lm._rows]


def test_a_row_takes_the_same_memory_however_long_it_is() -> None:
    lm = RecurrentLM(tiny_lstm(layers=2))
    lm.reserve(2, 8)
    lm.fill([[1] * 3000, [2]])
    for _ in range(20):
        lm.append(torch.tensor([[3, 4, 5], [6, 7, 8]]))
        assert state_numbers(lm) == [4 * 2 * 2 * 24] * 2  # one that stands, and three that may be refused
        lm.keep([2, 1])
        assert state_numbers(lm) == [2 * 2 * 24] * 2


class Products(TorchDispatchMode):
    """Counts operations that compute: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(returned.alias_info for returned in func._schema.returns)
        return func(*args, **(kwargs or {}))


def operations(lm: CachedLM, rows: int) -> int:
    lm.reserve(rows, 8)
    lm.fill([[1, 2, 3]] * rows)
    with Products() as products:
        lm.append(torch.ones(rows, 1, dtype=torch.long))
    lm.free(0)
    return products.count


def test_a_token_is_a_handful_of_operations_for_all_rows() -> None:
    lm = RecurrentLM(tiny_lstm(layers=1))
    assert operations(lm, 1) == operations(lm, 16) <= 16
    assert operations(RecurrentLM(tiny_lstm(layers=2)), 1) > operations(lm, 1)  # the counter counts
