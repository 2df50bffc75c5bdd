"""The pair that the benchmarks run on, loaded once: the demo's, or a tiny one when benchmarks only have to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from specdec import bench
from specdec.demo import decoding_dtype_name, demo_pair
from specdec.draft import Drafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.load import load
from specdec.training.data import gather, held_out_prompts


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Path:
    """Directory of a trained pair."""
    if not request.config.getoption("benchmark_enable"):
        tiny: Path = request.getfixturevalue("tiny_pair")
        return tiny
    return demo_pair()


@pytest.fixture(scope="session")
def engine(pair: Path) -> Engine:
    """The pair, loaded in the precision that this processor is good at."""
    return load(pair / "target", draft=pair / "draft", dtype=decoding_dtype_name())


@pytest.fixture(scope="session")
def drafters(engine: Engine) -> dict[str, Drafter | None]:
    """Everything that may propose tokens here."""
    return {bench.PLAIN: None, "draft model": engine.drafter, "suffix": SuffixDrafter()}


@pytest.fixture(scope="session")
def prompts(engine: Engine) -> Callable[[int], list[list[int]]]:
    """Held-out prompts of 128 tokens, as many as asked for."""
    assert engine.tokenizer is not None
    found = held_out_prompts(engine.tokenizer, gather("stdlib"), count=16, tokens=128)
    return lambda count: found[:count]
