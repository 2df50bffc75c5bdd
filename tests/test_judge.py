"""Verdicts that a GPU records are those that a processor finds: one function of tensors, for every rule and filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import Engine
from specdec.ahead import Ahead
from specdec.drafters.model import ModelDrafter
from specdec.graphs import Graphs, Results
from specdec.verify import RULES
from toys import native, tiny_gpt

PROMPTS = [[5, 9, 2], [17], [3, 3, 44, 20, 8]]


class Recording(Graphs):
    """Runs what it would record, and remembers what that was."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.records = True
        self.keys: list[Any] = []

    def run(self, key: object, function: Callable[..., Results], *inputs: Tensor, records: bool = True) -> Results:
        hash(key)
        self.keys.append(key)
        return function(*[given.clone() for given in inputs])  # as a recorded one, which has inputs of its own


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that run ahead are judged in other ways."""
    monkeypatch.setattr(Ahead, "play", lambda *given: None)


def texts(graphs: Graphs | None, **settings: Any) -> list[list[int]]:
    engine = Engine(native(tiny_gpt(0)), ModelDrafter(native(tiny_gpt(0, layers=1))))
    if graphs is not None:
        engine.graphs = graphs
    return engine.generate(PROMPTS, max_new_tokens=24, seed=3, num_draft_tokens=3, **settings).token_ids


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("filters", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {}])
def test_the_same_texts(rule: str, filters: dict[str, float]) -> None:
    recording = Recording()
    assert texts(recording, rule=rule, **filters) == texts(None, rule=rule, **filters)
    assert len(set(recording.keys)) < len(recording.keys)  # steps of one kind share a recording


def test_rows_with_filters_of_their_own() -> None:
    recording, settings = Recording(), {"temperature": [0.0, 1.0, 0.5]}
    assert texts(recording, **settings) == texts(None, **settings)
    # To tell rows apart, numbers are copied to a GPU, which cannot be recorded.
    shapes = [part for key in recording.keys for part in key if isinstance(part, torch.Size)]
    assert all(rows == 1 for rows, *_ in shapes)


def test_processors_of_the_text_run_before() -> None:
    recording = Recording()
    settings = {"temperature": 1.0, "repetition_penalty": 1.3}
    assert texts(recording, **settings) == texts(None, **settings) != texts(None, temperature=1.0)
    assert recording.keys
