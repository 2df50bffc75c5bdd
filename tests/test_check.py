"""``specdec.check`` passes pairs that are right, and fails for every kind of error planted in one."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import specdec
from specdec import CheckReport, ConfigError, Draft, Drafter, Engine, verify
from specdec.check import (
    ALPHA,
    Finding,
    Subject,
    WrongLaw,
    greedy_texts,
    logprobs,
    seeded_texts,
    table_tests,
    text_test,
)
from specdec.cli import app
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.scoring import ChiSquare, Text, pair_test, pearson, rank_test, scored
from specdec.sequences import Sequences
from specdec.verify import Verdict
from toys import TableLM, native, noisy, random_table, tiny_gpt

VOCAB = 6
TARGET = random_table(VOCAB, seed=1)
OTHER = 0.6 * TARGET + random_table(VOCAB, seed=2, spread=1.0)
CHEAP: dict[str, Any] = {"samples": 600, "max_new_tokens": 12}
SHORT = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]
PROMPTS = [[1, 2, 3, 1, 2], [4, 5, 0, 4], [2, 2, 5, 2, 2]]
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "model": lambda: ModelDrafter(TableLM(OTHER)),
    "lookup": SuffixDrafter,
    "both": lambda: HybridDrafter(ModelDrafter(TableLM(OTHER)), SuffixDrafter()),
    "the target itself": lambda: ModelDrafter(TableLM(TARGET)),
}


def report_of(drafter: Drafter | None = None, target: TableLM | None = None, **settings: Any) -> CheckReport:
    engine = Engine(target or TableLM(TARGET), drafter or DRAFTERS["model"]())
    return specdec.check(engine, **{**CHEAP, **settings})


def failed(report: CheckReport) -> set[str]:
    """The first words of the questions that were answered with no."""
    return {" ".join(finding.name.split()[:2]) for finding in report.findings if not finding.passed}


def subject(drafter: Drafter | None = None, target: TableLM | None = None) -> Subject:
    return Subject(Engine(target or TableLM(TARGET), drafter or DRAFTERS["model"]()), 4, 12, seed=0)


def lawful(drafter: Drafter | None = None) -> list[bool]:
    """Whether first tokens, pairs and texts pass."""
    own = subject(drafter)
    tests = [*table_tests(own, PROMPTS, 400, "block"), text_test(own, PROMPTS, 600, "block")]
    return [test.passed for test in tests]


@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_right_pairs_pass(drafter: str) -> None:
    """About 14 tests at 1e-6 each, seeds fixed."""
    report = report_of(DRAFTERS[drafter]())
    assert report.passed and not failed(report), str(report.findings)
    assert len(report.findings) == 14 and all(finding.figures for finding in report.findings)
    assert report.findings[0].figures["equal"] == report.findings[0].figures["rows"] == 8


def test_a_drafter_that_reports_a_wrong_law_fails() -> None:
    assert failed(report_of(WrongLaw(DRAFTERS["model"]()))) == {"first tokens", "pairs of", "ranks in"}  # CASES 3
    for drafter in (SuffixDrafter(), ModelDrafter(TableLM(TARGET))):
        assert lawful(drafter) == [True] * 3 and lawful(WrongLaw(drafter)) == [False] * 3


class LikeliestAsDrawn(ModelDrafter):
    """Proposes its likeliest tokens and says that they were drawn."""  # CASES 2, 9

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        return draft if draft.probs is None else Draft(draft.probs.argmax(-1), draft.lengths, draft.probs)


def test_likeliest_tokens_passed_off_as_drawn_fail() -> None:
    assert lawful(LikeliestAsDrawn(TableLM(OTHER))) == [False] * 3


def test_swapped_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sequences.process

    def swapped(self: Sequences, logits: Tensor, draft: Draft) -> Tensor:
        return right(self, logits, draft).roll(1, 0)

    monkeypatch.setattr(Sequences, "process", swapped)
    assert lawful()[1:] == [False] * 2  # neighbours of one prompt have the same first law
    assert not seeded_texts(subject(), PROMPTS).passed


def test_one_token_too_many_accepted_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.greedy

    def generous(largest: Tensor, draft: Draft) -> Verdict:
        found = right(largest, draft)
        accepted = (found.accepted + 1).minimum(draft.lengths)
        return Verdict(accepted, largest.gather(1, accepted.unsqueeze(1)).squeeze(1))

    assert greedy_texts(subject(), PROMPTS).passed
    monkeypatch.setattr(verify, "greedy", generous)
    found = greedy_texts(subject(), PROMPTS)
    assert not found.passed and "NOT a tie" in found.detail and found.figures["partings"]


def test_a_seed_that_means_something_else_with_drafts_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seeded_texts(subject(), PROMPTS).passed
    monkeypatch.setitem(verify.RULES, "coupled", verify.rejection)
    found = seeded_texts(subject(), PROMPTS)
    assert not found.passed and "NOT a tie" in found.detail


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logprobs: [[value + 1e-3 for value in row] for row in logprobs],
        lambda logprobs: [[*row[1:], row[0]] for row in logprobs],  # another position's
        lambda logprobs: logprobs[1:] + logprobs[:1],  # another row's
    ],
)
def test_wrong_logprobs_fail(wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert logprobs(subject(), PROMPTS).passed
    right = Sequences._committed_logprobs
    monkeypatch.setattr(Sequences, "_committed_logprobs", lambda *given: wrong(right(*given)))
    found = logprobs(subject(), PROMPTS)
    assert not found.passed and "more than rounding" in found.detail


class Rounding(TableLM):
    """Passes over several tokens round otherwise than those over one: all logits of one token are off by ``error``."""

    def __init__(self, table: Tensor, error: float) -> None:
        super().__init__(table)
        self.error = error

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        logits = super()._forward(tokens, lengths, first, needs_logits=needs_logits).clone()
        if tokens.shape[1] > 1:
            logits[..., 2] += self.error
        return logits


def with_ties() -> Tensor:
    """Half of the laws have two best tokens, 1 and 2, the second being less by 1e-6."""
    table = random_table(VOCAB, seed=5)
    table[::2, :, 1] = table[::2].amax(-1) + 0.5
    table[::2, :, 2] = table[::2, :, 1] - 1e-6
    return table


def test_partings_at_ties_are_explained_and_others_are_not() -> None:
    found = greedy_texts(subject(target=Rounding(with_ties(), error=1e-5)), PROMPTS)
    assert found.passed and found.figures["partings"] and "a tie, as rounding" in found.detail
    assert all(parting["is_tie"] and parting["gap"] < 1e-4 for parting in found.figures["partings"])
    found = greedy_texts(subject(target=Rounding(with_ties(), error=0.1)), PROMPTS)
    assert not found.passed and "NOT a tie" in found.detail
    assert any(parting["gap"] > 0.01 and not parting["is_tie"] for parting in found.figures["partings"])


def test_what_says_nothing_does_not_pass() -> None:
    sure = failed(report_of(target=TableLM(1000 * TARGET)))  # no law leaves anything to chance
    assert sure == {"first tokens", "pairs of", "ranks in", "a wrong"}
    silent = SuffixDrafter(factor=1e-9)  # and a drafter that never guesses tests nothing
    found = greedy_texts(subject(silent), PROMPTS)
    assert not found.passed and "nothing was drafted" in found.detail and lawful(silent) == [False] * 3


def shown(report: CheckReport) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_what_was_not_tested_is_not_called_wrong() -> None:
    report = report_of(SuffixDrafter(factor=1e-9))
    untested = [one.name for one in report.findings if not one.tested]
    assert not report.passed and len(untested) == 13 and not any("log-prob" in name for name in untested)
    assert "NO" not in shown(report) and "take prompts that the drafter" in shown(report)
    assert shown(report).count("not tested") == 13 + 1  # what to do about it
    wrong = shown(report_of(WrongLaw(DRAFTERS["model"]())))
    assert "NO" in wrong and "not tested" not in wrong


def test_a_wrong_text_without_drafts_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = subject(SuffixDrafter(factor=1e-9), Rounding(TARGET, 0.0))
    monkeypatch.setattr(Subject, "rounding", lambda self, logits: torch.full(logits.shape[:1], -1.0))
    found = greedy_texts(silent, PROMPTS)
    assert found.tested and not found.passed


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=3)
    ).eval()  # fmt: skip


def test_hugging_face_models_pass_in_bfloat16() -> None:
    """Where a pass over five tokens rounds otherwise than five over one."""
    target = llama(0).to(torch.bfloat16)
    report = specdec.check(target, draft=noisy(target, 0.05), prompts=SHORT, **CHEAP)
    assert report.passed, str(report.findings)
    assert report.settings["dtype"] == "bfloat16"
    assert len(report.findings) == 12  # no filters: rounding would move tokens across their edges


def test_our_gpt_passes() -> None:
    target = tiny_gpt(0, vocab_size=40)
    engine = Engine(native(target), ModelDrafter(native(noisy(target, 0.03))))
    report = specdec.check(engine, prompts=[*SHORT[:2], [8] * 300], **CHEAP)  # one is too long for the context
    assert report.passed and report.findings[0].figures["rows"] == 3, str(report.findings)


@pytest.mark.slow
def test_encoder_decoders_pass() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(**shape, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, forced_eos_token_id=1)
    target = T5ForConditionalGeneration(config).eval()
    for weight in target.parameters():
        weight.data *= 1.5
    report = specdec.check(target, draft=noisy(target, 0.01), prompts=SHORT[:2], samples=100, max_new_tokens=5)
    unnoticed = {finding.name for finding in report.findings if not finding.passed}
    assert not {name for name in unnoticed if not name.startswith("a wrong law")}, str(report.findings)
    assert report.findings[0].figures["rows"] == 2


def test_bad_input_is_an_error_before_work_starts() -> None:
    with pytest.raises(ConfigError, match="samples must be at least 100"):
        specdec.check("/nowhere", draft="suffix", samples=10)
    with pytest.raises(ConfigError, match="num_draft_tokens must be at least 1"):
        specdec.check("/nowhere", draft="suffix", num_draft_tokens=0)
    with pytest.raises(ConfigError, match="there is no drafter to check"):
        specdec.check(Engine(TableLM(TARGET)))
    with pytest.raises(specdec.PromptError, match="token id 99"):
        report_of(prompts=[[1, 99]])


def test_the_command_line_says_so_with_its_exit_code(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "check",
        str(tiny_pair / "target"),
        "--draft",
        str(tiny_pair / "draft"),
        "--out",
        str(tmp_path / "c.json"),
    ]
    command += ["--samples", "200", "--max-new-tokens", "6", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["passed"] and written["settings"]["samples"] == 200
    bad = CheckReport([Finding("greedy text is plain decoding's", False, "7 of 8 equal")], {})
    monkeypatch.setattr(sys.modules["specdec.check"], "check", lambda *given, **settings: bad)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "NO" in result.output and "7 of 8 equal" in result.output


# --- Scoring


def test_scores_are_those_of_the_text_before_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Text([1, 2], [3, 4, 0]), Text([5], [1]), Text([0, 1, 2, 3], [4, 5])]
    for most in (2**26, 1):  # all in one pass, one by one
        monkeypatch.setattr(sys.modules["specdec.scoring"], "_LOGITS", most)
        lm = TableLM(TARGET)
        found = list(scored(lm, texts))
        assert torch.equal(found[0], torch.stack([TARGET[1, 2], TARGET[2, 3], TARGET[3, 4]]))
        assert torch.equal(found[1], TARGET[0, 5][None]) and torch.equal(found[2], TARGET[[2, 3], [3, 4]])
        assert not any(lm.lengths)


def test_a_model_in_use_is_not_scored() -> None:
    engine = Engine(TableLM(TARGET))
    stream = engine.stream([1, 2], max_new_tokens=4)
    next(stream)
    with pytest.raises(ConfigError, match="in the middle of a stream"):
        next(scored(engine.target, [Text([1], [2])]))
    stream.close()


def test_p_values_are_scipys() -> None:
    observed, expected = torch.tensor([30, 50, 20, 1, 1]), torch.tensor([25.0, 50.0, 23.0, 1.0, 3.0])
    pooled = stats.chisquare([30, 50, 22], [25, 50, 27])  # 1 and 3 are less than five together, so 23 joins them
    test = pearson(observed, expected)
    assert test.freedom == 2 and test.statistic == pytest.approx(pooled.statistic)
    assert test.p_value == pytest.approx(pooled.pvalue)
    assert test.plus(ChiSquare(3.0, 4)).p_value == pytest.approx(stats.chi2.sf(test.statistic + 3, 6))
    assert ChiSquare().p_value == 1 and pearson(torch.tensor([1, 9]), torch.tensor([0.0, 10.0])).p_value == 0


def drawn(laws: Tensor, count: int, seed: int) -> Tensor:
    return torch.multinomial(laws, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_held_against_both_laws() -> None:
    """2,000 pairs; swapped ones have the right marginals' sum and the wrong law."""
    first, seconds = TARGET[0, 1].softmax(-1), TARGET[1].softmax(-1)
    firsts = drawn(first, 2000, 0)
    pairs = torch.stack([firsts, drawn(seconds[firsts], 1, 1)[:, 0]], dim=1)
    tables = {x: seconds[x] for x in range(VOCAB) if 2000 * float(first[x]) >= 5}
    assert pair_test(pairs, first, tables).p_value > 1e-3
    assert pair_test(pairs.flip(1), first, tables).p_value < ALPHA
    assert pair_test(pairs, first, {x: seconds[(x + 1) % VOCAB] for x in tables}).p_value < ALPHA


def test_the_rank_test_is_calibrated_and_has_power() -> None:
    """Of 200 tests of right samples about a tenth fall below 0.1: 8 to 35 with all but one chance in 10,000."""
    laws = random_table(80, seed=3)[0].softmax(-1)  # 80 positions
    below = 0
    for seed in range(200):
        below += rank_test([Text([0], drawn(laws, 1, seed)[:, 0].tolist())], [laws]).p_value < 0.1
    assert 8 <= below <= 35
    greedy = Text([0], laws.argmax(-1).tolist())
    assert rank_test([greedy], [laws]).p_value < ALPHA
    sharper = [Text([0], drawn(laws**1.5, 1, seed)[:, 0].tolist()) for seed in range(10)]
    assert rank_test(sharper, [laws] * 10).p_value < ALPHA
    impossible = laws.clone()
    impossible[0, greedy.new[0]] = 0
    assert math.isinf(rank_test([greedy], [impossible]).statistic)
