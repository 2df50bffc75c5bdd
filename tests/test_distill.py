"""A draft for a target that exists: what it begins with, what it learns from, when it stops, what is kept."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import specdec
from specdec.distill import Distillation, distill
from specdec.errors import ConfigError, ModelError
from specdec.machine import batch_rows
from specdec.nn.divergences import DIVERGENCES
from specdec.nn.gpt import GPT
from specdec.training.checkpoint import load_checkpoint
from specdec.training.data import Corpus, batch, encode, gather
from specdec.training.distill_recipe import DistillSettings
from specdec.training.shapes import draft_config, initialise

TINY = {"rows": 4, "sequence_length": 64, "prompt_tokens": 16, "new_tokens": 32, "prompts_per_round": 8}
TINY |= {"evaluation_prompts": 4, "seed": 0}
OUT = Path("draft")  # of runs that write nothing


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    whole = gather("stdlib")
    return Corpus(whole.training[:40], whole.held_out[:4])


@pytest.fixture(scope="module")
def tokenizer(tiny_pair: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_pair / "target")


@pytest.fixture(scope="module")
def llama(tiny_pair: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_pair / "target", dtype="float32")


@pytest.fixture(scope="module")
def qwen(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A target of another architecture that has learned something."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**shape, num_key_value_heads=1, head_dim=32, vocab_size=len(tokenizer), eos_token_id=0)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = encode(tokenizer, corpus.training)
    for step in range(60):
        rows = batch(tokens, rows=8, length=64, seed=0, step=step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def settings(**changes: Any) -> DistillSettings:
    return DistillSettings(**{**TINY, "max_tokens": 12_000, "evaluate_every": 6_000, **changes})


def test_a_draft_of_another_architecture_raises_acceptance(
    qwen: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    """Offline text, then the target's own; the saved draft speculates for the target, and changes no text."""
    report = distill(qwen, tokenizer, corpus, tmp_path / "draft", settings(learning_rate=5e-3), progress=False)
    first, *_, last = report.evaluations
    assert report.best > 0 and last.alpha > first.alpha + 0.1
    best = report.evaluations[report.best]
    assert best.greedy_length + best.sampled_length > first.greedy_length + first.sampled_length
    plain = specdec.generate(qwen, [[5, 6, 7]], max_new_tokens=20)
    fast = specdec.generate(qwen, [[5, 6, 7]], draft=tmp_path / "draft", tokenizer=tokenizer, max_new_tokens=20)
    assert fast.token_ids == plain.token_ids and fast.stats.num_draft_tokens > 0
    written = json.loads((tmp_path / "draft-distill.json").read_text())
    assert len(written["evaluations"]) == len(report.evaluations) and written["best"] == report.best


def test_the_targets_own_text_is_learned_after_its_prompts(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    run = Distillation(llama, tokenizer, corpus, settings(rows=2), OUT)
    rows, learned_from = run.own_text()
    assert rows.shape == (2, 48) and learned_from == 15
    plain = specdec.generate(llama, rows[:, :16], max_new_tokens=32, eos_token_id=None)
    rounds = torch.cat([rows, *run.written])
    greedy = specdec.generate(llama, rounds[:, :16], max_new_tokens=32, eos_token_id=None).token_ids
    same = sum(row[16:].tolist() == text for row, text in zip(rounds, greedy, strict=True))
    assert len(plain.token_ids) == 2 and 4 <= same < 8  # every other one is greedy
    before = run.draft.lm_head.weight.clone()
    run.train_step(rows, learned_from, 0.5)
    assert run.tokens == 2 * 32 and not torch.equal(before, run.draft.lm_head.weight)


@pytest.mark.parametrize("loss", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("entries", [0, 8])
def test_every_loss_learns(
    loss: str, entries: int, llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    run = Distillation(llama, tokenizer, corpus, settings(loss=loss, teacher_entries=entries, learning_rate=5e-3), OUT)
    rows, learned_from = run.given_text()
    losses = [run.train_step(rows, learned_from, 0.3) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_a_draft_as_wide_as_the_target_begins_as_some_of_its_layers(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    config = draft_config(llama.config, "wide", llama.config.vocab_size, None)
    config.num_hidden_layers = llama.config.num_hidden_layers
    whole = GPT(config)
    names = initialise(whole, llama)
    assert set(names) == set(whole.state_dict())
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(whole.lm_head(whole(tokens)), llama(tokens).logits, atol=1e-4)
    run = Distillation(llama, tokenizer, corpus, settings(shape="wide"), OUT)
    assert any(name.startswith("layers.0.") for name in run.report.initialised)


@pytest.mark.parametrize(
    ("changes", "context"),
    [({}, 64), ({"new_tokens": 60}, 128), ({"draft_context": 100}, 100), ({"draft_context": 9999}, 256)],
)
def test_a_draft_reads_hardly_more_than_it_learns_from_in_a_row(
    changes: dict[str, Any], context: int, llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    run = Distillation(llama, tokenizer, corpus, settings(**changes), OUT)
    assert run.draft.config.max_position_embeddings == context  # at most the target's


def test_batches_are_small_where_that_costs_nothing() -> None:
    assert batch_rows(torch.device("cpu")) == 1 < batch_rows(torch.device("cuda"))


def test_what_does_not_fit_is_left_to_chance(qwen: Qwen3ForCausalLM) -> None:
    """Layers of another make are not copied in part; embeddings are, where the width is the same."""
    wide = initialise(GPT(draft_config(qwen.config, "wide", qwen.config.vocab_size, 0)), qwen)
    assert wide and set(wide) <= {"embed_tokens.weight", "lm_head.weight"}
    assert initialise(GPT(draft_config(qwen.config, "small", qwen.config.vocab_size, 0)), qwen) == []
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=4, n_head=2, n_positions=64))
    for shape in ("wide", "small", "tiny"):
        config = draft_config(other.config, shape, 50, None)
        assert config.max_position_embeddings == 64 and GPT(config).config.vocab_size == 50


@pytest.mark.parametrize("loss", ["lk_hybrid", "cross_entropy"])
def test_a_draft_may_know_the_most_frequent_tokens_only(
    loss: str, llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    """The saved folder says which; the head and the embeddings are as small, and begin as the target's rows."""
    changes = {"draft_vocab_size": 200, "shape": "wide", "loss": loss, "learning_rate": 5e-3}
    report = distill(llama, tokenizer, corpus, tmp_path / "draft", settings(**changes), progress=False)
    first, best = report.evaluations[0], report.evaluations[report.best]
    assert best.greedy_length > 1.2 and best.greedy_length >= first.greedy_length
    assert (
        report.best > 0 or loss == "cross_entropy"
    )  # tokens of a text that the target did not write may teach nothing
    assert {"embed_tokens.weight", "lm_head.weight"} & set(report.initialised)
    d2t = load_file(tmp_path / "draft/vocabulary.safetensors")["d2t"]
    assert len(d2t) == 200 and d2t[-1] == -1 and tokenizer.eos_token_id in d2t
    engine = specdec.load(llama, draft=tmp_path / "draft", tokenizer=tokenizer)
    assert engine.drafter is not None and engine.drafter.lm.vocab_size == 200  # type: ignore[attr-defined]
    plain = engine.generate([[5, 6, 7], [8]], max_new_tokens=30, num_draft_tokens=0)
    output = engine.generate([[5, 6, 7], [8]], max_new_tokens=30, num_draft_tokens=3)
    assert output.token_ids == plain.token_ids and output.stats.num_accepted_tokens > 0
    with pytest.raises(ConfigError, match="draft_vocab_size must be below the target's"):
        Distillation(llama, tokenizer, corpus, settings(draft_vocab_size=10**6), OUT)
    with pytest.raises(ConfigError, match="draft_vocab_size must be 0 or >= 3, got 2"):
        settings(draft_vocab_size=2)


def test_it_stops_when_nothing_is_won(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    report = distill(
        llama, tokenizer, corpus, tmp_path / "draft",
        settings(learning_rate=1e-9, max_tokens=10**6, evaluate_every=256, patience=2, on_policy=0.0), progress=False,
    )  # fmt: skip
    assert report.stopped_early and len(report.evaluations) == report.best + 3


def test_the_same_seed_gives_the_same_draft(llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    weights = []
    for seed in (0, 0, 1):
        run = Distillation(llama, tokenizer, corpus, settings(seed=seed), OUT)
        for text in (run.given_text, run.own_text):
            run.train_step(*text(), 0.5)
        weights.append(torch.cat([weight.flatten() for weight in run.draft.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def weights_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([weight.flatten() for weight in model.parameters()])


def run_is_refused(run: Callable[[], Any]) -> bool:
    with pytest.raises(ConfigError, match="belongs to a draft for another target"):
        run()
    return True


def test_an_interrupted_run_goes_on_bit_by_bit(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice, in the given text and in the target's own; then a third call, which has nothing left to do."""
    given = settings(max_tokens=4_000, evaluate_every=1_000, patience=0, learning_rate=5e-3)

    def run(out: Path) -> Any:
        return distill(llama, tokenizer, corpus, out, given, progress=False)

    whole = run(tmp_path / "whole")
    original = Distillation.train_step
    for stop in (2, 14):

        def stopping(self: Distillation, *args: Any, stop: int = stop) -> float:
            if self.step == stop:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(Distillation, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
        found = load_checkpoint(tmp_path / "parts-checkpoints", print)
        assert found is not None and found.meta.step == stop + 1
        assert ("written" in found.state) == (stop == 14)
    monkeypatch.undo()
    parts = run(tmp_path / "parts")
    assert torch.equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert [e.greedy_length for e in parts.evaluations] == [e.greedy_length for e in whole.evaluations]
    assert not (tmp_path / "parts-checkpoints").exists()
    assert run(tmp_path / "parts") == parts
    again = distill(
        llama, tokenizer, corpus, tmp_path / "parts", settings(max_tokens=300), progress=False, resume=False
    )
    assert len(again.evaluations) == 2 and run_is_refused(lambda: run(tmp_path / "parts"))


def test_the_draft_is_saved_in_full_precision_with_a_card(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    """And the target comes back in the mode it was given in."""
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    short = settings(max_tokens=600, evaluate_every=300, learning_rate=5e-3)
    report = distill(llama, tokenizer, corpus, tmp_path / "draft", short, name="my-target", progress=False)
    assert [module.training for module in llama.modules()] == before
    llama.eval()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert all(weight.dtype == torch.float32 for weight in saved.parameters())
    card = (tmp_path / "draft/README.md").read_text()
    best = report.evaluations[report.best]
    assert "# A draft for my-target" in card and f"temperature 1: {best.sampled_length:.2f}" in card


def test_wrong_settings_and_divergence_are_named(
    llama: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    for changes, match in [
        ({"shape": "huge"}, "shape must be one of wide, small, tiny, lstm, got 'huge'"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"on_policy": 1.5}, "on_policy must be from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens must be > 0 if max_seconds is 0"),
        ({"rows": -1}, "rows must be >= 0"),
    ]:
        with pytest.raises(ConfigError, match=match):
            settings(**changes)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="was not written by a training run"):
        distill(llama, tokenizer, corpus, tmp_path, settings(), progress=False)
    run = Distillation(llama, tokenizer, corpus, settings(), OUT)
    run.draft.norm.weight.data[0] = torch.nan
    before = run.optimizer.masters["lm_head.weight"].clone()
    with pytest.raises(ModelError, match="diverged at step 0"):
        run.train_step(*run.given_text(), 0.5)
    assert torch.equal(before, run.optimizer.masters["lm_head.weight"])
