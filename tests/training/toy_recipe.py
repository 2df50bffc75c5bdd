"""A recipe small enough to train in a second."""

from __future__ import annotations

from dataclasses import replace

from specdec.training.recipe import Recipe

RECIPE = """
name = "toy"
data = { source = "path", path = "text" }
tokenizer = { vocab_size = 300 }
[target]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 48
max_position_embeddings = 64
dropout = 0.1
[draft]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
intermediate_size = 24
max_position_embeddings = 64
tie_word_embeddings = false
[train]
max_steps = 6
rows = 2
sequence_length = 16
precision = "float32"
checkpoint_seconds = 0
"""


def with_training(recipe: Recipe, **changes: object) -> Recipe:
    """``recipe`` with other values in its [train] table."""
    return replace(recipe, train=replace(recipe.train, **changes))  # type: ignore[arg-type]
