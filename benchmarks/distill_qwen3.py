"""A draft for a Hugging Face target of another architecture: does distillation raise acceptance from the first step?

python benchmarks/distill_qwen3.py OUT [--seconds S]

Trains a small Qwen3 on the standard library's source into OUT/target, because a random one has nothing to teach, then
does what `specdec distill OUT/target --out OUT/draft` does. Writes benchmarks/results/distill_qwen3.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from specdec.distill import distill_checkpoint
from specdec.machine import machine
from specdec.training.data import batch, encode, gather, train_tokenizer
from specdec.training.distill_recipe import DistillReport, DistillSettings

RESULTS = Path(__file__).parent / "results/distill_qwen3.json"
ROWS, LENGTH, CONTEXT, VOCABULARY = 8, 256, 1024, 4096


def train_target(folder: Path, seconds: float) -> float:
    """A Qwen3 of about 5 M parameters with its tokenizer in ``folder``; the loss of its last steps."""
    corpus = gather("stdlib")
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(corpus.training, VOCABULARY, CONTEXT)
    tokens = encode(tokenizer, corpus.training)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    begun = time.monotonic()
    for step in track(range(100_000), "training a Qwen3", console=Console(stderr=True), transient=True):
        if time.monotonic() - begun > seconds:
            break
        rows = batch(tokens, rows=ROWS, length=LENGTH, seed=0, step=step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    """Train, distill, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the target's training, and of the draft's")
    given = parser.parse_args()
    loss = train_target(given.out / "target", given.seconds)
    settings = DistillSettings(max_seconds=given.seconds, evaluate_every=50_000)
    report: DistillReport = distill_checkpoint(str(given.out / "target"), given.out / "draft", "stdlib", settings)
    for one in report.evaluations:
        print(
            f"{one.tokens:9,} tokens, {one.seconds:5.0f} s: accepted length {one.greedy_length:.2f} greedy, "
            f"{one.sampled_length:.2f} at T=1, acceptance {one.alpha:.1%}"
        )
    figures = {"machine": machine(), "seconds": given.seconds, "target_loss": round(loss, 3), "report": asdict(report)}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
