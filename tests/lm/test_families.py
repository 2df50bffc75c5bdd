"""The matrix: for every family the text is transformers', whatever the batch and the draft."""

from __future__ import annotations

from functools import cache

import families
import pytest
import torch
from families import BY_NAME, NEW

from specdec import Drafter, Engine
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.lm.base import CachedLM
from specdec.lm.hf import hf_lm
from toys import noisy

pytestmark = pytest.mark.filterwarnings("ignore::specdec.errors.FallbackWarning")


@cache
def target(name: str) -> CachedLM:
    return hf_lm(families.model(name))


@cache
def drafter(name: str, kind: str) -> Drafter:
    if kind == "lookup":
        return SuffixDrafter()
    return ModelDrafter(hf_lm(noisy(families.model(name), BY_NAME[name].noise)))


def check(name: str, kind: str, rows: int) -> float:
    engine = Engine(target(name), drafter(name, kind))
    output = engine.generate(families.prompts(name, rows), max_new_tokens=NEW, num_draft_tokens=3)
    expected = families.texts(name)[:rows]
    assert all(len(text) == NEW for text in expected)
    assert output.token_ids == expected, f"{name}, {kind}, batch {rows}"
    return output.stats.acceptance_rate


@pytest.mark.parametrize("name", BY_NAME)
def test_greedy_text_is_transformers(name: str) -> None:
    rate = check(name, "noisy", 3)
    assert 0.03 < rate < 0.98, f"{name}: {rate} of the noisy draft is accepted; adjust the noise"
    check(name, "lookup", 3)


@pytest.mark.parametrize("name", BY_NAME)
def test_samples_are_those_of_plain_sampling(name: str) -> None:
    settings = {"temperature": 1.0, "seed": 7, "max_new_tokens": 24, "rule": "coupled", "num_draft_tokens": 3}
    prompts = families.prompts(name, 3)
    plain = Engine(target(name)).generate(prompts, **settings)
    assert len(set(map(tuple, plain.token_ids))) == 3
    assert Engine(target(name), drafter(name, "noisy")).generate(prompts, **settings).token_ids == plain.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["noisy", "lookup"])
@pytest.mark.parametrize("name", BY_NAME)
def test_greedy_text_is_transformers_in_every_batch(name: str, kind: str, rows: int) -> None:
    check(name, kind, rows)


def test_texts_differ_and_windows_are_reached() -> None:
    for name in BY_NAME:
        texts = families.texts(name)
        assert len(set(map(tuple, texts))) > 1, name
    assert torch.tensor([len(prompt) for prompt in families.PROMPTS]).min() + NEW > families.WINDOW
