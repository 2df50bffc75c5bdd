"""Recipes and distillation train an LSTM as they train a GPT; what comes out loads as a draft and as a target."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import stop_after
from toy_recipe import RECIPE, with_training

import specdec
from specdec.checkpoints import load_lm, load_model
from specdec.distill import distill
from specdec.drafters.model import ModelDrafter
from specdec.errors import ConfigError
from specdec.lm.recurrent import RecurrentLM
from specdec.load import accepted_length
from specdec.nn.lstm import LSTM
from specdec.training import data
from specdec.training.distill_recipe import DistillSettings
from specdec.training.recipe import Recipe, ShapeRecipe, parse_recipe
from specdec.training.shapes import new_draft
from specdec.training.trainer import train

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]


def with_lstm(recipe: Recipe) -> Recipe:
    return replace(recipe, draft=replace(recipe.draft, kind="lstm"))


def test_a_recurrent_draft_is_trained_with_its_target(tmp_path: Path, toy_recipe: Recipe) -> None:
    recipe = with_lstm(toy_recipe)
    short = train(with_training(recipe, max_steps=2), tmp_path / "short", progress=False)
    out = tmp_path / "long"
    report = train(with_training(recipe, max_steps=60), out, progress=False, decode=accepted_length)
    assert report.draft_loss < short.draft_loss - 1 and report.acceptance > 0.2
    assert report.mean_acceptance_length is not None and report.mean_acceptance_length > 1
    assert "An LSTM language model" in (out / "draft/README.md").read_text()

    engine = specdec.load(out / "target", draft=out / "draft", dtype="float32")
    assert isinstance(engine.drafter, ModelDrafter) and isinstance(engine.drafter.lm, RecurrentLM)
    settings = {"max_new_tokens": 20, "eos_token_id": None}
    plain = engine.generate(PROMPTS, num_draft_tokens=0, **settings)
    drafted = engine.generate(PROMPTS, num_draft_tokens=3, **settings)
    assert drafted.token_ids == plain.token_ids and drafted.stats.num_draft_tokens > 0
    assert specdec.load(out / "draft").generate(PROMPTS, **settings).finish_reasons == ["length"] * 3  # as a target


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path: Path, toy_recipe: Recipe) -> None:
    recipe = with_lstm(toy_recipe)
    train(recipe, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        stop_after(monkeypatch, 3, signal.SIGINT)
        train(recipe, tmp_path / "parts", progress=False)
    train(recipe, tmp_path / "parts", progress=False)
    first, second = (load_file(tmp_path / name / "draft/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_recurrent_draft_is_distilled(tmp_path: Path, toy_recipe: Recipe) -> None:
    train(with_training(toy_recipe, max_steps=60), tmp_path / "pair", progress=False)
    target, tokenizer = load_model(tmp_path / "pair/target")
    corpus = data.gather("path", Path(toy_recipe.data.path))
    settings = DistillSettings(
        shape="lstm", max_tokens=6_000, evaluate_every=6_000, sequence_length=32, prompt_tokens=8, new_tokens=16,
        prompts_per_round=8, evaluation_prompts=2, learning_rate=5e-3,
    )  # fmt: skip
    report = distill(target, tokenizer, corpus, tmp_path / "draft", settings, progress=False)  # type: ignore[arg-type]
    first, *_, last = report.evaluations
    assert report.initialised == [] and last.alpha > first.alpha + 0.1
    assert isinstance(load_lm(tmp_path / "draft"), RecurrentLM)
    assert "An LSTM language model" in (tmp_path / "draft/README.md").read_text()


def test_it_has_as_many_parameters_as_a_gpt_of_its_shape() -> None:
    target = ShapeRecipe(256, 8, 4, 2, 704).config(2048, 0)
    gpt, lstm = (new_draft(target, shape, 2048, 0) for shape in ("small", "lstm"))
    assert isinstance(lstm, LSTM)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (gpt, lstm)]
    assert counts[0] <= counts[1] < 1.02 * counts[0]


def test_a_recipe_of_an_lstm_needs_no_heads() -> None:
    heads = "num_attention_heads = 2\nnum_key_value_heads = 1\nintermediate_size = 24\n"
    shape = parse_recipe(RECIPE.replace(heads, 'kind = "lstm"\n'), "toy.toml").draft
    assert (shape.kind, shape.lstm_config(300, 0).hidden_size) == ("lstm", 16)
    for change, message in (
        (f'{heads}kind = "rnn"\n', "draft.kind must be one of 'gpt', 'lstm', got 'rnn'"),
        ('kind = "gpt"\n', "draft.num_attention_heads is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_recipe(RECIPE.replace(heads, change), "toy.toml")
    with pytest.raises(ConfigError, match="separate_documents must be false with draft.kind = 'lstm'"):
        separate = RECIPE.replace("rows = 2", "rows = 2\nseparate_documents = true")
        parse_recipe(separate.replace(heads, 'kind = "lstm"\n'), "toy.toml")
