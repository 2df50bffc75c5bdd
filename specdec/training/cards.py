"""Model cards, for people: what a checkpoint is, what it learned from, how it did, how to use it."""

from __future__ import annotations

from pathlib import Path

from specdec.training.recipe import Recipe, ShapeRecipe
from specdec.training.report import TrainReport

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [specdec, speculative-decoding]
---

"""
DISTILLED = "It was distilled by [specdec]"
_CAUTION = "The model repeats what it has read, and nothing was done to make its text true, safe or free of bias."


def pair_card(role: str, recipe: Recipe, report: TrainReport) -> str:
    """README.md of the "target" or "draft" of a run that trained both."""
    other = {"target": "draft", "draft": "target"}[role]
    parameters = getattr(report, f"{role}_parameters")
    shape: ShapeRecipe = getattr(recipe, role)
    kind, loader = ("A Llama-style", "AutoModelForCausalLM.from_pretrained")
    if shape.kind == "lstm":
        kind, loader = "An LSTM", "specdec.load"
    return f"""{_HEAD}# {recipe.name}: {role}

{kind} language model of {parameters:,} parameters, the {role} of a pair for speculative decoding. It was
trained together with its {other} by [specdec](https://pypi.org/project/specdec/).

## Trained on

{_text(recipe)}: {report.tokens:,} tokens in {report.steps:,} steps of {recipe.train.rows} rows of
{recipe.train.sequence_length}, {report.seconds:,.0f} s on {report.device} in {report.dtype}. Documents that no training
saw are held out for the figures below. {_CAUTION}

{_shape(role, recipe)}
{_figures(role, other, report)}
{_use("target", "draft")}
with both folders of the pair in the working directory. Alone it is an ordinary checkpoint for
`{loader}`.
"""


def draft_card(target: str, kind: str, parameters: int, trained: str, figures: list[tuple[str, str]]) -> str:
    """README.md of a draft made for the model ``target``; ``figures`` are lines of name and value, in order."""
    lines = "\n".join(f"- {name}: {value}" for name, value in figures)
    return f"""{_HEAD}# A draft for {target}

{kind} language model of {parameters:,} parameters that guesses what `{target}` will say, for speculative
decoding. {DISTILLED}(https://pypi.org/project/specdec/) and is of little use alone.

## Trained on

{trained} {_CAUTION}

## Held-out figures

{lines}

{_use(target, "DRAFT")}
where `DRAFT` is this folder.
"""


def _shape(role: str, recipe: Recipe) -> str:
    shape: ShapeRecipe = getattr(recipe, role)
    if shape.kind == "lstm":
        return f"""## Shape

{shape.num_hidden_layers} LSTM layers, hidden size {shape.hidden_size}, {"tied" if shape.tie_word_embeddings else "untied"}
head, byte-level BPE of at most {recipe.tokenizer.vocab_size:,} tokens.
"""
    return f"""## Shape

{shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, {shape.num_attention_heads} query and
{shape.num_key_value_heads} key/value heads, feed-forward {shape.intermediate_size}, context
{shape.max_position_embeddings}, {"tied" if shape.tie_word_embeddings else "untied"} head, byte-level BPE of at most
{recipe.tokenizer.vocab_size:,} tokens.
"""


def _figures(role: str, other: str, report: TrainReport) -> str:
    reached = ", ".join(f"{share:.1%}" for share in report.acceptance_per_position)
    length = report.mean_acceptance_length
    decoded = f"- tokens per target pass, greedy, held-out prompts: {length:.2f}\n" if length is not None else ""
    return f"""## Held-out figures

- loss: {getattr(report, f"{role}_loss"):.4f} nats per token ({other}: {getattr(report, f"{other}_loss"):.4f})
- probability that one drafted token is accepted at temperature 1, sum(min(p, q)): {report.acceptance:.1%}
- expected share of drafts accepted up to position 1, 2, ...: {reached or "not measured"}
- same most probable token: {report.top1:.1%}
{decoded}"""


def _use(target: str, draft: str) -> str:
    return f"""## Use

```python
import specdec

specdec.generate("{target}", "import os", draft="{draft}", max_new_tokens=64).texts
```
"""


def _text(recipe: Recipe) -> str:
    data = recipe.data
    if data.source == "stdlib":
        return "The source code of Python's standard library"
    if data.source == "datasets":
        return f"The dataset {' '.join(filter(None, (data.name, data.subset)))}, split {data.split}"
    return f"Text of `{Path(data.path).name}`"
