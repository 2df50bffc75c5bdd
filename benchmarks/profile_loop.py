"""Where does a step's time go? Model forwards against everything else, at batch 1 and 8, with four draft tokens.

python benchmarks/profile_loop.py        prints a table and writes benchmarks/results/profile_loop.json
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specdec.controller import DEFAULT_DRAFT_TOKENS
from specdec.demo import decoding_dtype_name, demo_pair
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.load import load
from specdec.machine import machine
from specdec.training.data import gather, held_out_prompts

RESULTS = Path(__file__).parent / "results"
ROUNDS, NEW_TOKENS = 5, 96


def main() -> None:
    """Measure, print, write."""
    pair = demo_pair()
    engine = load(pair / "target", draft=pair / "draft", dtype=decoding_dtype_name())
    assert engine.tokenizer is not None
    prompts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=8, tokens=128)
    table = Table("drafter", "batch", "T", "ms per step", "target", "draft", "everything else")
    rows = []
    for name, drafter in {"draft model": engine.drafter, "suffix": SuffixDrafter(), "plain": None}.items():
        for batch in (1, 8):
            for temperature in (0.0, 1.0):
                row = measure(Engine(engine.target, drafter), prompts[:batch], temperature)
                rows.append({"drafter": name, "batch": batch, "temperature": temperature, **row})
                shares = [f"{row[part]:.1%}" for part in ("verify_share", "draft_share", "overhead_share")]
                table.add_row(name, str(batch), f"{temperature:g}", f"{row['step_ms']:.2f}", *shares)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    figures = {"machine": machine(), "rows": rows}
    (RESULTS / "profile_loop.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure(engine: Engine, prompts: list[list[int]], temperature: float) -> dict[str, float]:
    """Medians over rounds of the time per step and the shares of it, prefill left out."""
    found: list[dict[str, float]] = []
    for turn in range(ROUNDS + 1):
        settings = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "eos_token_id": None, "seed": 0}
        length = DEFAULT_DRAFT_TOKENS if engine.drafter is not None else 0
        stats = engine.generate(prompts, max_batch_size=16, num_draft_tokens=length, **settings).stats
        if turn == 0:
            continue  # the first round warms caches up
        decoding = stats.total_seconds - stats.prefill_seconds
        found.append(
            {
                "step_ms": 1e3 * decoding / stats.num_target_passes,
                "verify_share": stats.verify_seconds / decoding,
                "draft_share": stats.draft_seconds / decoding,
                "overhead_share": stats.overhead_seconds / decoding,
            }
        )
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


if __name__ == "__main__":
    main()
