"""What a finished run leaves next to its weights: report.json for programs, a model card for people."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from specdec.errors import CheckpointError
from specdec.training.recipe import Recipe, ShapeRecipe

REPORT, LOG, CURVES, TENSORBOARD = "report.json", "log.jsonl", "curves.png", "tensorboard"


@dataclass(frozen=True)
class TrainReport:
    """What came out. Losses are nats per token on held-out text; see ``objective.Agreement`` for the agreement.

    ``mean_acceptance_length``: tokens per target pass of a short greedy decode of held-out prompts; None if none was
    made. ``skipped`` batches had a loss that was not finite. ``sharded``: FSDP2 spread the weights over the processes.
    """

    recipe: str
    identity: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    target_parameters: int
    draft_parameters: int
    target_loss: float
    draft_loss: float
    acceptance: float
    top1: float
    device: str
    dtype: str
    versions: dict[str, str]
    acceptance_per_position: list[float] = field(default_factory=list)
    mean_acceptance_length: float | None = None
    skipped: int = 0
    processes: int = 1
    sharded: bool = False


def read_report(path: Path) -> TrainReport:
    """The report in a file. Raises CheckpointError."""
    try:
        return TrainReport(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; train with resume=False to start over") from error


def model_card(role: str, recipe: Recipe, report: TrainReport) -> str:
    """README.md of the "target" or "draft" of a run: what it is, what it learned from, how it did, how to use it."""
    other = {"target": "draft", "draft": "target"}[role]
    shape: ShapeRecipe = getattr(recipe, role)
    parameters, loss = getattr(report, f"{role}_parameters"), getattr(report, f"{role}_loss")
    reached = ", ".join(f"{share:.1%}" for share in report.acceptance_per_position)
    length = report.mean_acceptance_length
    decoded = f"- tokens per target pass, greedy, held-out prompts: {length:.2f}\n" if length is not None else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [specdec, speculative-decoding]
---

# {recipe.name}: {role}

A Llama-style language model of {parameters:,} parameters, the {role} of a pair for speculative decoding. It was
trained together with its {other} by [specdec](https://pypi.org/project/specdec/).

## Trained on

{_text(recipe)}: {report.tokens:,} tokens in {report.steps:,} steps of {recipe.train.rows} rows of
{recipe.train.sequence_length}, {report.seconds:,.0f} s on {report.device} in {report.dtype}. Documents that no training
saw are held out for the figures below. The model repeats what it has read, and nothing was done to make its text
true, safe or free of bias.

## Shape

{shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, {shape.num_attention_heads} query and
{shape.num_key_value_heads} key/value heads, feed-forward {shape.intermediate_size}, context
{shape.max_position_embeddings}, {"tied" if shape.tie_word_embeddings else "untied"} head, byte-level BPE of at most
{recipe.tokenizer.vocab_size:,} tokens.

## Held-out figures

- loss: {loss:.4f} nats per token ({other}: {getattr(report, f"{other}_loss"):.4f})
- probability that one drafted token is accepted at temperature 1, sum(min(p, q)): {report.acceptance:.1%}
- expected share of drafts accepted up to position 1, 2, ...: {reached or "not measured"}
- same most probable token: {report.top1:.1%}
{decoded}
## Use

```python
import specdec

specdec.generate("target", "import os", draft="draft", max_new_tokens=64).texts
```

with both folders of the pair in the working directory. Alone it is an ordinary checkpoint for
`AutoModelForCausalLM.from_pretrained`.
"""


def _text(recipe: Recipe) -> str:
    data = recipe.data
    if data.source == "stdlib":
        return "The source code of Python's standard library"
    if data.source == "datasets":
        return f"The dataset {' '.join(filter(None, (data.name, data.subset)))}, split {data.split}"
    return f"Text of `{Path(data.path).name}`"
