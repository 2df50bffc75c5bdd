"""docs/models.md says what is so, and no class of transformers' causal-LM mapping is silently wrong."""

from __future__ import annotations

import pytest
import sweep

pytestmark = pytest.mark.filterwarnings("ignore::specdec.errors.FallbackWarning")


def test_the_table_of_families_is_current() -> None:
    assert sweep.family_table() in sweep.DOCUMENT.read_text(encoding="utf-8"), (
        "docs/models.md is out of date; run python tests/lm/sweep.py --families"
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoForCausalLM", "MambaForCausalLM", "XLNetLMHeadModel"])
def test_the_sweep_finds_what_it_says(name: str) -> None:
    result = sweep._examine(name)
    assert result.outcome in ("equal", "refused")
    assert sweep.sweep_table([result]).splitlines()[-1] in sweep.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_class_is_equal_or_refused() -> None:
    results = sweep.sweep(sorted(model.__name__ for _, model in sweep.pairs()), jobs=2)
    assert [result for result in results if result.outcome == "wrong"] == []
    assert sum(result.outcome == "equal" for result in results) >= 130
