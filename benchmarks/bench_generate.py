"""How fast is generation: plain, with a draft model, with suffix decoding; batch 1 and 8; greedy and temperature 1."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from specdec import bench
from specdec.draft import Drafter
from specdec.engine import Engine

NEW_TOKENS, ROUNDS = 96, 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", [bench.PLAIN, "draft model", "suffix"])
def bench_generate(
    benchmark: BenchmarkFixture,
    engine: Engine,
    drafters: dict[str, Drafter | None],
    prompts: Callable[[int], list[list[int]]],
    method: str,
    batch: int,
    temperature: float,
) -> None:
    """One cell. A plain run comes before each timed one, so that a machine that slows down slows both sides."""
    benchmark.group = f"batch {batch}, temperature {temperature:g}"
    settings = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": 0, "eos_token_id": None}
    own, plain = (
        Engine(engine.target, drafter, vocab_size=engine.limits.vocab_size) for drafter in (drafters[method], None)
    )
    plain_seconds: list[float] = []

    def plain_run() -> None:
        plain_seconds.append(plain.generate(prompts(batch), **settings).stats.total_seconds)

    output = benchmark.pedantic(
        own.generate, (prompts(batch),), settings, setup=plain_run, rounds=ROUNDS, warmup_rounds=1
    )
    stats = output.stats
    assert stats.num_generated_tokens == batch * NEW_TOKENS
    if benchmark.disabled:
        return
    pairs = zip(plain_seconds[-ROUNDS:], benchmark.stats.stats.data, strict=True)
    benchmark.extra_info.update(
        method=method,
        batch=batch,
        temperature=temperature,
        tokens_per_second=stats.num_generated_tokens / benchmark.stats.stats.median,
        ratio_to_plain=statistics.median(base / seconds for base, seconds in pairs),
        acceptance_rate=stats.acceptance_rate,
        acceptance_rate_per_position=stats.acceptance_rate_per_position,
        mean_acceptance_length=stats.mean_acceptance_length,
        overhead_share=stats.overhead_seconds / stats.total_seconds,
    )
