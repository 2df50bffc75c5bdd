"""The study of long contexts: what it measures on a tiny setting, and that it tells a wrong text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from specdec.engine import Engine
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.nn.attention import Full
from toys import tiny_gpt

sys.path.append(str(Path(__file__).parents[1] / "evals"))
import long_context as study


def test_patterns_make_fewer_scores_and_full_ones_need_the_memory() -> None:
    sizes = study.Sizes(lengths=(256, 2048), rounds=1)
    found = {(one.pattern, one.length): one for one in study.costs(sizes)}
    assert {name for name, _ in found} == set(study.MAKERS)
    assert all(one.avoided >= 0 for (name, n), one in found.items() if n == 2048)
    assert found["full", 2048].avoided == 0 and found["window 256 + 4 sinks", 2048].avoided > 0


def test_a_peak_is_what_was_used() -> None:
    held: list[torch.Tensor] = []
    _, small = study.peak_of(lambda: held.append(torch.ones(1000)))
    _, large = study.peak_of(lambda: torch.ones(50_000_000).sum())
    assert 150e6 < large < 400e6 and small < 50e6


def test_losses_are_of_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that repeats itself is learnt by a model that looks back; all models get the same batches."""
    monkeypatch.setattr(study, "MAKERS", {"full": Full})
    tokens = torch.arange(4000) % 7
    found = study.losses(study.Sizes(train_steps=12, train_length=64), tokens, tokens[None, :65], 11)
    assert found["full"] < 1.5


def test_drafting_tells_whether_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_gpt(0, context=600), [(7 * i) % 61 for i in range(400)]
    sizes = study.Sizes(prompts=(40, 300), prompts_each=1, new_tokens=20)
    found = study.drafting(model, text, sizes, window=64)
    assert [one.is_same_text for one in found] == [True, True] and found[0].acceptance_rate == 1
    other = Engine(CpuLM(tiny_gpt(1, context=600)))

    def make(target: CachedLM, drafter: object = None) -> Engine:
        return other if drafter else Engine(target)

    monkeypatch.setattr(study, "Engine", make)
    assert not study.drafting(model, text, sizes, window=64)[0].is_same_text  # the negative control: another model
