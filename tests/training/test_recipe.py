"""Recipes: what is read, and that every mistake is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_recipe import RECIPE

from specdec.errors import ConfigError
from specdec.nn.gpt import GPT
from specdec.training.recipe import load_recipe, parse_recipe

REPOSITORY = Path(__file__).parents[2]
DEMO = "25182f0f3499"  # changes with specdec/recipes/demo.toml, and only with it


def test_packaged_and_repository_recipes_are_valid() -> None:
    assert load_recipe("demo").name == "demo"
    for path in (REPOSITORY / "models").glob("*.toml"):
        assert load_recipe(path).name == path.stem


def test_values_reach_the_hugging_face_config() -> None:
    config = parse_recipe(RECIPE, "toy.toml").draft.config(300, 0)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.vocab_size) == (16, 8, 1, 300)
    assert config.tie_word_embeddings is False
    assert (config.bos_token_id, config.eos_token_id) == (None, 0)


def test_paths_start_at_the_recipe(tmp_path: Path) -> None:
    assert parse_recipe(RECIPE, "toy.toml", folder=tmp_path).data.path == str((tmp_path / "text").resolve())


def test_fingerprint_knows_every_setting() -> None:
    first, second = parse_recipe(RECIPE, "a.toml"), parse_recipe(RECIPE.replace("rows = 2", "rows = 3"), "a.toml")
    assert first.fingerprint() == parse_recipe(RECIPE, "b.toml").fingerprint()
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows = 2", "rows = ", "not valid TOML"),
        ("rows = 2", "row = 2", "unknown key train.row; allowed are .*rows"),
        ("[train]", "[trian]", "unknown key trian; allowed are .*train"),
        ("rows = 2", "rows = 0", "train.rows must be >= 1, got 0"),
        ("rows = 2", "rows = true", "train.rows must be an integer, got True"),
        ("rows = 2", "rows = 2.0", "train.rows must be an integer, got 2.0"),
        ("rows = 2", "distillation = 1.5", "train.distillation must be <= 1, got 1.5"),
        ("rows = 2", "clip = nan", "train.clip must be finite, got nan"),
        ("rows = 2", 'clip = "1"', "train.clip must be a number, got '1'"),
        ('"float32"', '"fp8"', "train.precision must be one of 'auto', 'float32', 'bfloat16', got 'fp8'"),
        ('source = "path"', 'source = "web"', "data.source must be one of 'stdlib', 'path', 'datasets', got 'web'"),
        ('source = "path", path = "text"', 'source = "path"', "data.path goes with data.source = 'path'"),
        ('source = "path"', 'source = "stdlib"', "data.path goes with data.source = 'path'"),
        ("vocab_size = 300", "vocab_size = 256", "tokenizer.vocab_size must be >= 257, got 256"),
        ("tokenizer = { vocab_size = 300 }", "tokenizer = 300", r"tokenizer must be a table, \[tokenizer\], got 300"),
        ("hidden_size = 32\n", "", "target.hidden_size is missing; it is an integer"),
        ("hidden_size = 32", "hidden_size = 36", "target.hidden_size must be a multiple of twice num_attention_heads"),
        ("num_key_value_heads = 2", "num_key_value_heads = 3", "target.num_key_value_heads must divide"),
        ("sequence_length = 16", "sequence_length = 65", "train.sequence_length must be <= target.max_position"),
        ("max_steps = 6", "max_steps = 0", "one of train.max_steps and train.max_seconds must be > 0"),
        ('name = "toy"', "name = 7", "name must be a text, got 7"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(ConfigError, match=f"toy.toml.*{message}"):
        parse_recipe(RECIPE.replace(old, new, 1), "toy.toml")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("rows = 2", "rows = 0", "rows = 0"),
        ("rows = 2", "row = 2", "row = 2"),
        ("vocab_size = 300", "vocab_size = 256", "tokenizer = {"),
        ("hidden_size = 32\n", "", "[target]"),
        ("[train]", "[trian]", "[trian]"),
        ("hidden_size = 16", "hidden_size = 17", "hidden_size = 17"),
        ('name = "toy"', "name = 7", "name = 7"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: str) -> None:
    text = RECIPE.replace(old, new, 1)
    number = next(i for i, written in enumerate(text.splitlines(), 1) if written.startswith(line))
    with pytest.raises(ConfigError, match=f"^toy.toml, line {number}: "):
        parse_recipe(text, "toy.toml")


def test_a_recipe_starts_from_its_base() -> None:
    demo, stdlib = load_recipe("demo"), load_recipe(REPOSITORY / "models/stdlib.toml")
    assert stdlib == replace(demo, name="stdlib")
    changed = parse_recipe('base = "demo"\n[train]\nrows = 3\n', "mine.toml")
    assert changed == replace(demo, name="mine", train=replace(demo.train, rows=3))
    with pytest.raises(ConfigError, match="mine.toml, line 1: base: there is no packaged recipe 'x'"):
        parse_recipe('base = "x"', "mine.toml")


def test_the_large_recipe_is_large() -> None:
    shape = load_recipe(REPOSITORY / "models/stdlib-large.toml").target
    with torch.device("meta"):
        model = GPT(shape.config(16384, 0))
    assert sum(weight.numel() for weight in model.parameters()) > 100e6


def test_keys_that_came_later_do_not_make_strangers_of_old_pairs() -> None:
    """The demo's own fingerprint, with which users' pairs are kept in the cache."""
    assert load_recipe("demo").fingerprint()[:12] == DEMO
    text = RECIPE.replace("rows = 2", "rows = 2\nmax_skipped_batches = 1")
    assert parse_recipe(text, "a.toml").fingerprint() != parse_recipe(RECIPE, "a.toml").fingerprint()


def test_an_unknown_recipe_lists_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="no recipe 'nonsense': .* demo"):
        load_recipe("nonsense")
