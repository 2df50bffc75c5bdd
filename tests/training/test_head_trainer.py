"""Training feature heads: what they learn from, what is kept, and that a folder of them drafts for its target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from block_toys import features_of
from specdec import Engine, load
from specdec.checkpoints import load_lm, load_module
from specdec.cli import app
from specdec.errors import ConfigError, ModelError
from specdec.heads import HEADS, train_checkpoint
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.nn.heads import FeatureHead
from specdec.training.checkpoint import verify_folder
from specdec.training.data import Corpus, gather
from specdec.training.head_trainer import HeadSettings, HeadTraining, Reader, train_head

TINY = HeadSettings(
    max_tokens=6_000, rows=4, sequence_length=64, learning_rate=5e-3, evaluations=2, evaluation_prompts=4,
    prompt_tokens=16, new_tokens=32, prompts_per_round=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_pair: Path) -> Path:
    return tiny_pair / "target"


@pytest.fixture(scope="module")
def gpt(target: Path) -> GPT:
    model = load_module(target)
    assert isinstance(model, GPT)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    whole = gather("stdlib")
    return Corpus(whole.training[:12], whole.held_out[:2])


@pytest.fixture(scope="module")
def tokenizer(target: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(target)


def engine_for(model: Any, kind: str = "eagle3") -> Callable[[FeatureHead], Engine]:
    lm = load_lm(model)
    return lambda head: Engine(lm, HEADS[kind].drafter(head, lm))


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_trained_head_raises_acceptance_and_drafts_for_its_target(
    kind: str, gpt: GPT, target: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    head, out = HEADS[kind].new(gpt, None), tmp_path / "head"
    report = train_head(gpt, head, tokenizer, corpus, out, TINY, engine=engine_for(gpt, kind), progress=False)
    first, *_, last = report.evaluations
    assert report.best > 0 and last.length > first.length + 0.2 and last.tokens >= TINY.max_tokens
    verify_folder(out)
    assert json.loads((out / "training.json").read_text())["best"] == report.best
    prompts = [[5, 6, 7], [8, 9]]
    plain = load(target).generate(prompts, max_new_tokens=30)
    output = load(target, draft=out).generate(prompts, max_new_tokens=30, num_draft_tokens=3)
    assert output.token_ids == plain.token_ids and output.stats.num_accepted_tokens > 0


def test_a_hugging_face_target_gives_what_ours_gives(gpt: GPT, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype="float32").eval()
    tokens = torch.arange(40).view(2, 20)
    count = gpt.config.num_hidden_layers - 1
    found, expected = (Reader(one, range(count)).read(tokens) for one in (model, gpt))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not one.is_inference()  # a head could not learn from them
    torch.testing.assert_close(expected, features_of(gpt, range(count), tokens))
    assert not gpt.layers[0]._forward_hooks
    head = Eagle3Head.for_target(model)
    assert torch.equal(head.lm_head.weight, Eagle3Head.for_target(gpt).lm_head.weight)
    assert head.loss(tokens, *found)[0].isfinite()


def losses_of(training: HeadTraining, steps: int) -> list[float]:
    return [training.train_step(i / steps)[0] for i in range(steps)]


def training(gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, **changes: Any) -> HeadTraining:
    torch.manual_seed(0)
    head = Eagle3Head.for_target(gpt, steps=2)
    return HeadTraining(
        gpt, head, tokenizer, corpus, Path("head"), replace(TINY, **changes), engine_for(gpt)
    )  # writes nothing


def test_a_seed_is_a_run(gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    one, again, other = (training(gpt, tokenizer, corpus, seed=seed, on_policy=0.5) for seed in (0, 0, 1))
    losses = losses_of(one, 2)
    assert losses == losses_of(again, 2) != losses_of(other, 2) and one.tokens == 4 * 64 + 4 * 33
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), again.head.parameters(), strict=True))


def test_the_targets_own_text_is_learned_from(gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    run = training(gpt, tokenizer, corpus)
    first, begin = run.own_text()
    rows = torch.cat([first, *run.written])
    assert begin == 15  # prompts are not learned from
    greedy = Engine(load_lm(gpt)).generate(rows[:, :16].tolist(), max_new_tokens=32, eos_token_id=None).token_ids
    same = sum(row[16:].tolist() == text for row, text in zip(rows, greedy, strict=True))
    assert rows.shape == (4, 48) and 2 <= same < 4  # every other one is greedy


def test_the_target_stays_as_it_is_and_the_head_takes_its_precision(
    gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    before = [weight.clone() for weight in gpt.parameters()]
    losses_of(training(gpt, tokenizer, corpus), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, gpt.parameters(), strict=True))
    halved = GPT(gpt.config).to(torch.bfloat16).requires_grad_(False)
    run = training(halved, tokenizer, corpus)
    assert {weight.dtype for weight in run.head.parameters()} == {torch.bfloat16}
    assert all(loss > 0 for loss in losses_of(run, 2))


def test_the_better_head_is_kept(gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tmp_path: Path) -> None:
    run = training(gpt, tokenizer, corpus)
    run.out = tmp_path / "head"
    losses_of(run, 12)
    run.evaluate()
    kept = (run.out / "model.safetensors").read_bytes()
    with torch.no_grad():
        run.head.get_parameter("lm_head.weight").neg_()  # guesses what is least likely
    run.evaluate()
    assert run.report.best == 0 and (run.out / "model.safetensors").read_bytes() == kept
    assert run.report.evaluations[1].length < run.report.evaluations[0].length


def test_a_loss_that_is_not_finite_ends_the_run(
    gpt: GPT, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(gpt, tokenizer, corpus)
    right = run.head.loss
    monkeypatch.setattr(run.head, "loss", lambda *given: (right(*given)[0] * torch.inf, {}))
    before = [weight.clone() for weight in run.head.parameters()]
    with pytest.raises(ModelError, match="diverged at step 0"):
        run.train_step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, run.head.parameters(), strict=True))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("".join(f"line {n} of file {i} says {n * n}\n" for n in range(900)))
    return folder


def test_the_command_line_trains_a_head_that_generate_takes(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    command = ["train", str(target), "--drafter", "eagle3", "--out", str(out), "--data", str(text), "--tokens", "1"]
    runner = CliRunner()
    result = runner.invoke(app, [*command, "--draft-vocab-size", "50", "--width", "32"])
    assert result.exit_code == 0 and "accepted length" in result.stdout
    head = Eagle3Head.load(out)
    assert len(head.draft_ids) == 50 and head.config.decoder.hidden_size == 32 < head.config.target_hidden_size
    again = runner.invoke(app, command)
    assert isinstance(again.exception, ConfigError) and "exists; choose another folder" in str(again.exception)
    given = ["generate", str(target), "--prompt", "line", "--max-new-tokens", "8"]
    assert runner.invoke(app, [*given, "--draft", str(out)]).stdout == runner.invoke(app, given).stdout


def test_what_cannot_be_trained_is_refused(target: Path, text: Path, tmp_path: Path) -> None:
    for settings, said in (
        ({"max_tokens": 0}, "needs a budget"),
        ({"on_policy": 1.5}, "shares from 0 to 1, got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be between 0 and 1"),
        ({"rows": -1}, "rows must be >= 0, got -1"),
        ({"sequence_length": 8}, "sequence_length must be >= 16, got 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(TINY, **settings)
    with pytest.raises(ConfigError, match="drafter must be one of eagle3, block, got 'medusa'"):
        train_checkpoint(str(target), "medusa", tmp_path, "stdlib", TINY)
    with pytest.raises(ConfigError, match="name it with out"):
        train_checkpoint(str(target), "eagle3", None, "stdlib", TINY)
    with pytest.raises(ConfigError, match="draft_vocab_size must be from 0 to"):
        train_checkpoint(str(target), "eagle3", tmp_path / "head", str(text), TINY, draft_vocab_size=10**6)
    with pytest.raises(ConfigError, match="leave width at 0"):
        train_checkpoint(str(target), "block", tmp_path / "head", str(text), TINY, width=16)
    with pytest.raises(ConfigError, match="guesses every token"):
        train_checkpoint(str(target), "block", tmp_path / "head", str(text), TINY, draft_vocab_size=20)
