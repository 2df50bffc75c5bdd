"""The comparison with Hugging Face compares like with like: every method writes the same text, as long as asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from specdec import bench

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compare_hf
from compare_hf import Contenders, race, verdict

pytestmark = pytest.mark.chosen
NEW_TOKENS = 8


@pytest.fixture
def contenders(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Contenders:
    monkeypatch.setattr(compare_hf, "DTYPE", "float32")  # where no rounding may change a greedy text
    monkeypatch.setattr(compare_hf, "DRAFT_LENGTHS", (1, 3, 8))
    return Contenders.of(tiny_pair / "target", tiny_pair / "draft", NEW_TOKENS)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_method_writes_the_same_text(contenders: Contenders, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setitem(compare_hf.TARGETS, batch, 1.0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 500, (3, 20), generator=generator).tolist()
    families = contenders.families() | (contenders.hf_speculation() if batch == 1 else {})
    stages: list[str] = []
    runs, tried = race(families, prompts, batch, 1, lambda stage, steps: stages.append(stage))
    found, lines = verdict(runs, batch)
    for m in found:
        assert (m.same_text, m.batch) == (3, batch), m.method
    assert all(len(row) == NEW_TOKENS for rounds in runs.values() for run in rounds for row in run.token_ids)
    finalists = [min(len(methods), compare_hf.FINALISTS.get(name, 1)) for name, methods in families.items()]
    assert len(found) == sum(finalists)
    assert set(tried) == ({"HF assisted", "HF lookup"} if batch == 1 else set())
    rival = compare_hf.HF_ASSISTED if batch == 1 else compare_hf.HF_PLAIN
    assert len(lines) == 6 and all(str(line["rival"]).startswith(rival) for line in lines)
    assert contenders.hf_draft.generation_config.num_assistant_tokens != 8  # each assistant is a copy


def test_the_assistant_proposes_as_many_tokens_as_it_is_told(contenders: Contenders) -> None:
    """Counted in the draft model's passes, of which a confidence threshold or a schedule leaves some out."""
    k = 3
    least = -k * (k + 1) // 2  # the last rounds have room for fewer
    unsure = contenders._assistant(k)
    unsure.generation_config.assistant_confidence_threshold = 0.99
    assert least <= missing_passes(contenders, contenders._assistant(k), k) <= 0
    assert missing_passes(contenders, unsure, k) < least


def missing_passes(contenders: Contenders, assistant: PreTrainedModel, k: int) -> int:
    """Draft passes of one call, less ``k`` for each target pass."""
    passes = {"draft": 0, "target": 0}

    def counter(name: str) -> Callable[..., None]:
        def count(*given: object) -> None:
            passes[name] += 1

        return count

    hooks = [
        model.register_forward_hook(counter(name))
        for name, model in (("draft", assistant), ("target", contenders.hf_target))
    ]
    method = bench.hf_method(contenders.hf_target, **bench.hf_settings(40), assistant_model=assistant)
    assert len(method([[5, 6, 7, 8]]).token_ids[0]) == 40
    for hook in hooks:
        hook.remove()
    return passes["draft"] - k * passes["target"]
