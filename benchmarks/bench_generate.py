"""How fast is generation: plain, with a draft model, with prompt lookup; batch 1 and 8; greedy and temperature 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from specdec import bench
from specdec.draft import Drafter
from specdec.engine import Engine, Output

NEW_TOKENS = 96


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", [bench.PLAIN, "draft model", "prompt lookup"])
def bench_generate(
    benchmark: BenchmarkFixture,
    engine: Engine,
    drafters: dict[str, Drafter | None],
    prompts: Callable[[int], list[list[int]]],
    plain_speed: dict[tuple[int, float], float],
    method: str,
    batch: int,
    temperature: float,
) -> None:
    """One cell; plain runs first and the ratio is to its median of the same session."""
    benchmark.group = f"batch {batch}, temperature {temperature:g}"
    own = Engine(engine.target, drafters[method], vocab_size=engine.limits.vocab_size)

    def run() -> Output:
        return own.generate(
            prompts(batch), max_new_tokens=NEW_TOKENS, temperature=temperature, seed=0, eos_token_id=None
        )

    output = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    stats = output.stats
    assert stats.num_generated_tokens == batch * NEW_TOKENS
    if benchmark.disabled:
        return
    speed = stats.num_generated_tokens / benchmark.stats.stats.median
    plain_speed.setdefault((batch, temperature), speed)
    benchmark.extra_info.update(
        method=method,
        batch=batch,
        temperature=temperature,
        tokens_per_second=speed,
        ratio_to_plain=speed / plain_speed[batch, temperature],
        acceptance_rate=stats.acceptance_rate,
        acceptance_rate_per_position=stats.acceptance_rate_per_position,
        mean_acceptance_length=stats.mean_acceptance_length,
        overhead_share=stats.overhead_seconds / stats.total_seconds,
    )
