"""Is a chosen draft length ever slower than plain decoding, and how close is it to the best fixed one?

python benchmarks/never_slower.py [--models pair wide] [--batch 1 4 8 16 32] [--sweep]

Every cell: plain decoding, twice (so that one sees what chance does), and chosen lengths with a good draft, a useless one
(random weights), a lookup in text that does not repeat itself (sampled at a high temperature), and, with ``--sweep``,
fixed lengths 1 to 8 with the good draft.
Interleaved rounds after one to warm up, as many as fit into ``--seconds`` per table: on a machine that others use as well,
runs of a tenth of a second differ by far more than what is promised here. Writes ``--out`` after every table; what is
there of other models and batches stays.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from rich.console import Console

from specdec import bench, load
from specdec.bench import Method
from specdec.checkpoints import load_model
from specdec.controller import AUTO
from specdec.demo import decoding_dtype_name, demo_pair
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.lm.native import native_lm
from specdec.nn.gpt import GPT
from specdec.report import write_figures
from specdec.training.data import gather, held_out_prompts
from specdec.widen import wide_pair

RESULTS = Path(__file__).parent / "results/never_slower.json"
PROMPT_TOKENS = 128
NEVER_REPEATS = 3.0  # temperature of text that does not repeat itself
LENGTHS = range(1, 9)
AGAIN = "plain, again"
LEAST, NEAR = 0.97, 0.95  # what we promise: of plain decoding, of the best fixed length


def random_draft(path: Path) -> ModelDrafter:
    """A draft of that checkpoint's shape that has learned nothing."""
    model, _ = load_model(path, dtype=decoding_dtype_name())
    assert isinstance(model, GPT)
    torch.manual_seed(0)
    return ModelDrafter(native_lm(GPT(copy.deepcopy(model.config)).to(model.embed_tokens.weight.dtype)))


def ways(engine: Engine, useless: ModelDrafter, temperature: float, new_tokens: int, sweep: bool) -> dict[str, Method]:
    """What a cell compares; the first is the baseline of the others but the last, which has one of its own."""
    assert isinstance(engine.drafter, ModelDrafter)
    given = {"max_new_tokens": new_tokens, "temperature": temperature}
    drafters = {
        "good draft": engine.drafter,
        "useless draft": useless,
        "draft + lookup": HybridDrafter(engine.drafter, SuffixDrafter()),
    }
    methods = {bench.PLAIN: bench.engine_method(engine, num_draft_tokens=0, **given)}
    methods[AGAIN] = methods[bench.PLAIN]  # what is 1.00 but for chance
    for name, drafter in drafters.items():
        other = Engine(engine.target, drafter, vocab_size=engine.limits.vocab_size)
        methods[name] = bench.engine_method(other, num_draft_tokens=AUTO, **given)
    if sweep:
        methods |= {f"good draft k={k}": bench.engine_method(engine, num_draft_tokens=k, **given) for k in LENGTHS}
    return methods


def unrepeated(engine: Engine, new_tokens: int) -> dict[str, Method]:
    """Plain decoding and the lookup where it finds nothing."""
    given = {"max_new_tokens": new_tokens, "temperature": NEVER_REPEATS}
    lookup = Engine(engine.target, SuffixDrafter(), vocab_size=engine.limits.vocab_size)
    return {
        bench.PLAIN: bench.engine_method(engine, num_draft_tokens=0, **given),
        "lookup, no repetition": bench.engine_method(lookup, num_draft_tokens=AUTO, **given),
    }


def rounds_within(seconds: float, least: int, methods: dict[str, Method], prompts: list[list[int]]) -> int:
    """How many rounds of all methods take so long; ``least`` at least."""
    return max(least, int(seconds / sum(method(prompts).seconds for method in methods.values())))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["pair", "wide"], default=["pair", "wide"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--seconds", type=float, default=60.0, help="of every table")
    parser.add_argument("--new-tokens", type=int, help="default: 256 with the pair, 64 with the large target")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: results/never_slower.json beside this file")
    given = parser.parse_args()
    console = Console(width=100)
    here = {(models, batch) for models in given.models for batch in given.batch}
    before = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    before = [row for row in before if (row["models"], row["batch"]) not in here]
    rows: list[dict[str, object]] = []
    for models in given.models:
        pair = demo_pair()
        new_tokens = given.new_tokens or (256 if models == "pair" else 64)
        target, draft = (pair / "target", pair / "draft") if models == "pair" else wide_pair(demo_pair())
        engine, useless = load(target, draft=draft, dtype=decoding_dtype_name()), random_draft(draft)
        assert engine.tokenizer is not None
        prompts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=max(given.batch), tokens=PROMPT_TOKENS)
        for batch in given.batch:
            for temperature in (0.0, 1.0):
                methods = ways(engine, useless, temperature, new_tokens, given.sweep)
                rounds = rounds_within(given.seconds, given.rounds, methods, prompts[:batch])
                found = bench.compare(methods, prompts[:batch], rounds=rounds, temperature=temperature)
                if temperature:
                    found += bench.compare(
                        unrepeated(engine, new_tokens), prompts[:batch], rounds=rounds, temperature=NEVER_REPEATS
                    )[1:]
                console.print(bench.table(found, models))
                rows += [{"models": models, **m.as_dict()} for m in found]
                write_figures(given.out, {"rows": before + rows})
    chosen = [row for row in rows if row["method"] not in (bench.PLAIN, AGAIN) and "k=" not in str(row["method"])]
    slower = [row for row in chosen if float(str(row["speedup"])) < LEAST]
    console.print(f"{len(slower)} of {len(chosen)} cells below {LEAST} of plain decoding")
    for row in slower:
        console.print(
            f"  {row['models']} batch {row['batch']} T={row['temperature']:g}: {row['method']} {row['speedup']:.2f}x"
        )


if __name__ == "__main__":
    main()
