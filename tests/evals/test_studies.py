"""The studies of evals/ find what is there on tiny settings, and notice what is wrong; their scripts run on any pair."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from specdec import Engine
from specdec.check import CheckReport, Finding
from specdec.costs import Costs
from specdec.demo import pair_or_demo
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.load import load
from specdec.sequences import Sequences
from specdec.training.data import CODE, task_prompts
from toys import TableLM, random_table

EVALS = Path(__file__).parents[2] / "evals"
VOCAB = 6
TARGET = random_table(VOCAB, seed=1)
OTHER = 0.6 * TARGET + random_table(VOCAB, seed=2, spread=1.0)
PROMPTS = [[1, 2, 3, 1], [4, 5, 0, 4], [2, 5, 2, 1]]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", EVALS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


lossless, acceptance, quality, decoding = map(script, ("lossless", "acceptance", "quality", "decoding"))


def engine(draft: torch.Tensor = OTHER) -> Engine:
    return Engine(TableLM(TARGET), ModelDrafter(TableLM(draft)))


# --- lossless


def test_the_picture_shows_what_fails_too(tmp_path: Path) -> None:
    texts = [
        Finding(f"{kind} text", False, "", {"equal": 7, "rows": 8, "partings": []}) for kind in ("greedy", "seeded")
    ]
    law = Finding("first tokens keep the law (block)", False, "", {"p_value": 0.0})
    control = Finding("a wrong law is noticed: first tokens keep the law", False, "", {"p_value": 1.0})
    report = CheckReport([*texts, law, control], {})
    lossless.draw({("float32", "draft model"): report, ("bfloat16", "lookup"): report}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert list(lossless.drafters_of("./draft").values()) == ["./draft", "suffix", ["./draft", "suffix"]]
    assert list(lossless.drafters_of("suffix").values()) == ["suffix"]


# --- acceptance


def test_overlap_and_coverage_are_those_of_the_tables() -> None:
    """Against sums over the texts themselves."""
    found = engine()
    overlap, coverage = acceptance.agreement(found, PROMPTS, 12)
    for temperature in (1.0, 0.0):
        written = found.generate(
            PROMPTS, temperature=temperature, seed=0, max_new_tokens=12, num_draft_tokens=0
        ).token_ids
        places = [(*a, b) for p, new in zip(PROMPTS, written, strict=True) for *a, b in triples([*p[-2:], *new])]
        laws = [(TARGET[i, j].softmax(-1), OTHER[i, j].softmax(-1)) for i, j, _ in places]
        if temperature:
            assert overlap == pytest.approx(
                sum(float(torch.minimum(p, q).sum()) for p, q in laws) / len(laws), rel=1e-5
            )
        else:
            ranks = [int((q > q[p.argmax()]).sum()) for p, q in laws]
            expected = [sum(rank < n for rank in ranks) / len(ranks) for n in (1, 2, 4, 6)]
            assert coverage == pytest.approx(expected)


def triples(tokens: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


@pytest.fixture(autouse=True)
def _no_more_than_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "FIRST", (1, 2, 4, 6))


def test_a_draft_that_is_the_target_agrees_everywhere_and_a_swapped_one_does_not() -> None:
    overlap, coverage = acceptance.agreement(engine(TARGET), PROMPTS, 8)
    assert overlap == pytest.approx(1) and coverage == [1.0] * 4
    overlap, coverage = acceptance.agreement(engine(-TARGET), PROMPTS, 8)
    assert overlap < 0.5 and coverage[0] == 0 and coverage[-1] == 1
    both = Engine(TableLM(TARGET), HybridDrafter(ModelDrafter(TableLM(TARGET)), SuffixDrafter()))
    assert acceptance.agreement(both, PROMPTS, 8)[0] == pytest.approx(1)
    assert acceptance.agreement(Engine(TableLM(TARGET), SuffixDrafter()), PROMPTS, 8) == (None, None)


def test_what_is_promised_follows_from_acceptance_and_costs() -> None:
    costs = Costs()
    for _ in range(5):
        for k in (0, 1, 2, 8):
            costs.count_pass(1, k, 1.0)  # a pass costs the same, however much it reads
        costs.count_draft(1, 1, 0.25)
        costs.count_draft(1, 8, 2.0)
    survival = [0.5**i for i in range(1, 9)]
    assert acceptance.expected_tokens(survival, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))  # Leviathan's formula
    assert acceptance.predicted(costs, survival, 3) == pytest.approx(1.875 / 1.75)
    assert acceptance.predicted(costs, [0.0] * 8, 8) == pytest.approx(1 / 3)
    assert acceptance.predicted(costs, [1.0] * 8, 8) == pytest.approx(9 / 3)


def test_a_task_is_measured_at_every_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(acceptance, "LENGTHS", (1, 3))
    found = engine()
    costs = acceptance.measured_costs(found, PROMPTS[:1], 12)
    result = acceptance.study(found, "toy", PROMPTS, costs, 24, rounds=1)
    assert all(costs.knows(1, drafted) for drafted in (0, 1, 3)) and result.prompts == 3
    assert len(result.survival) == 3 and sorted(result.survival, reverse=True) == result.survival
    # Rows end within a draft, so the last passes are shorter: nearly what acceptance by position says.
    assert result.tokens_per_pass[1] == pytest.approx(result.predicted_tokens[1], rel=0.15)
    assert 1 < result.tokens_per_pass[0] < min(2.0, result.tokens_per_pass[1])
    assert min(result.speedup) > 0 and min(result.predicted_speedup) > 0
    acceptance.draw([result, replace(result, task="lookup", overlap=None, coverage=None)], tmp_path / "a.png")
    assert acceptance.table([result]).row_count == 1 and (tmp_path / "a.png").stat().st_size > 0


ROWS = [
    {"question_id": 1, "category": "stem", "turns": ["Why does ice float on water?", "And why does steam rise?"]},
    {"question_id": 2, "category": "writing", "turns": ["Write two lines about a lighthouse."]},
    {"question_id": 3, "category": "qa", "turns": ["Which planet is the largest?"], "reference": ["Jupiter"]},
]


def test_tasks_are_read_from_spec_bench_and_from_the_users_files(tiny_pair: Path, tmp_path: Path) -> None:
    tokenizer: Any = load(tiny_pair / "target", dtype="float32").tokenizer
    bench, own = tmp_path / "question.jsonl", tmp_path / "own.jsonl"
    bench.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own.write_text('{"text": "import os"}\n\n{"text": "x = 1"}\n')
    tasks = task_prompts(tokenizer, count=2, tokens=5, jsonl={bench: "turns", own: "text"})
    assert list(tasks) == [CODE, "stem", "writing", "qa", "own"] and len(tasks["own"]) == 2
    assert tasks["stem"] == [tokenizer.encode("Why does ice float on water?")[-5:]]
    assert list(acceptance.conversation_as_one(tasks)) == [CODE, "qa", "own", "conversation"]
    assert acceptance.conversation_as_one(tasks)["conversation"] == [*tasks["stem"], *tasks["writing"]]
    with pytest.raises(ConfigError, match="own.jsonl, line 1 has no text under 'prompt'; it has 'text'"):
        task_prompts(tokenizer, count=1, tokens=5, jsonl={own: "prompt"})
    for wrong, said in ('{"text": ""}', "line 1 has an empty text"), ("{", "line 1 is not JSON"):
        own.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            task_prompts(tokenizer, count=1, tokens=5, jsonl={own: "text"})
    with pytest.raises(ConfigError, match="cannot be read as text"):
        task_prompts(tokenizer, count=1, tokens=5, jsonl={tmp_path / "none": "text"})


# --- quality

DOCUMENTS = [[1, 2, 3, 1, 2, 3, 1, 2, 3, 1], [4, 5, 0, 4, 5, 0, 1, 1, 1, 1]]


def expected_logprobs() -> list[list[float]]:
    laws = TARGET.log_softmax(-1)
    return [[float(laws[i, j, k]) for i, j, k in triples(document[1:])] for document in DOCUMENTS]


@pytest.mark.parametrize("k", [0, 3])
def test_the_engine_reads_held_out_text_as_the_table_says(k: int) -> None:
    for drafter in (ModelDrafter(TableLM(OTHER)), SuffixDrafter()):
        found, refused = quality.logprobs_of(Engine(TableLM(TARGET), drafter), DOCUMENTS, 3, k)
        for row, expected in zip(found, expected_logprobs(), strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
        assert (refused > 0) == (k > 0 and isinstance(drafter, SuffixDrafter))


def test_wrong_logprobs_are_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one position, but only where drafts are checked: plain and speculative perplexities differ."""
    right = Sequences._committed_logprobs

    def wrong(self: Sequences, logits: torch.Tensor, draft: Any, verdict: Any) -> list[list[float]]:
        return right(self, logits.roll(1, 1), draft, verdict)

    monkeypatch.setattr(Sequences, "_committed_logprobs", wrong)
    plain, speculative = (quality.logprobs_of(engine(), DOCUMENTS, 3, k)[0] for k in (0, 3))
    assert plain[0] == pytest.approx(expected_logprobs()[0], abs=1e-5)
    assert speculative[0] != pytest.approx(expected_logprobs()[0], abs=1e-2)


def test_lines_end_in_punctuation_and_matches_are_exact(tiny_pair: Path) -> None:
    found = load(tiny_pair / "target", draft="suffix", dtype="float32")
    assert found.tokenizer is not None
    texts = ["import os\n\ndef f(a):\n    return g(a)\n\nx", "words only\nno more\n", "f(x)  \n"]
    lines = quality.lines_to_complete(found, [found.tokenizer.encode(text) for text in texts])
    assert lines == [
        {"context": "import os\n\ndef f(a):\n    return g(a", "answer": ")"},
        {"context": "f(x", "answer": ")"},
    ]
    given = {"stop": "\n", "max_new_tokens": 24, "num_draft_tokens": 0}
    written = found.generate([line["context"] for line in lines], **given).texts
    assert written is not None
    right = [{**line, "answer": text.rstrip()} for line, text in zip(lines, written, strict=True)]
    wrong = [{**right[0], "answer": right[0]["answer"] + "!"}, right[1]]
    for k in (0, 3):
        assert quality.exact_match(found, right, k) == 1 and quality.exact_match(found, wrong, k) == 0.5


NUMBERS = quality.Numbers(20.0, 0.25, 0.25, 3.0, 0.05, 10)


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"refused": 99}, True),
        ({"perplexity": 20.00001}, True),
        ({"perplexity": 20.01}, False),
        ({"perplexity": 0.25, "exact_match": 20.0}, False),  # swapped
        ({"exact_match": 0.26}, False),
        ({"task": 0.26}, False),
        ({"task": None}, False),
        ({"sampled": 3.2}, True),  # less than three standard errors
        ({"sampled": 3.4}, False),
    ],
)
def test_numbers_that_differ_are_told_apart(changes: dict[str, Any], is_same: bool) -> None:
    assert quality.same(NUMBERS, replace(NUMBERS, **changes), torch.float32) is is_same


@pytest.mark.usefixtures("believed")
def test_samples_of_a_wrong_drafter_have_other_nats() -> None:
    """A planted error: guesses passed off as certain enough to be kept whatever the target says."""
    prompts = [*PROMPTS, [0, 1, 2]] * 4
    plain, right = (quality.sampled_nats(engine(-TARGET), prompts, k, 24, seed) for k, seed in ((0, 0), (3, 9000)))
    assert abs(plain[0] - right[0]) < 4 * math.hypot(plain[1], right[1])

    class Careless(ModelDrafter):
        def propose(self, sequences: Sequences, lengths: list[int]) -> Any:
            draft = super().propose(sequences, lengths)
            return draft if draft.probs is None else replace(draft, probs=draft.probs * 1e-9)

    wrong = quality.sampled_nats(Engine(TableLM(TARGET), Careless(TableLM(-TARGET))), prompts, 3, 24, 18_000)
    assert wrong[0] - plain[0] > 10 * math.hypot(plain[1], wrong[1])


# --- decoding


def test_entropy_and_repetition_of_made_up_texts() -> None:
    assert decoding.distinct([1, 2, 3, 4], 1) == 1 and decoding.distinct([1, 1, 1, 1], 1) == 0.25
    assert decoding.distinct([1, 2, 1, 2, 1], 2) == 0.5
    flat = Engine(TableLM(torch.zeros(8, 8, 8)), SuffixDrafter())
    found = {way: decoding.compare(flat, way, [[1, 2, 3]], 20, 2) for way in ("greedy", "T=1", "T=1.5", "top-p 0.9")}
    assert found["greedy"].entropy == pytest.approx(0, abs=1e-5)
    assert found["T=1"].entropy == found["T=1.5"].entropy == pytest.approx(3)
    assert found["greedy"].distinct_2 < found["T=1"].distinct_2
    uneven = {way: decoding.compare(engine(), way, PROMPTS, 24, 2) for way in ("T=0.7", "T=1", "T=1.5", "min-p 0.1")}
    assert uneven["T=0.7"].entropy < uneven["T=1"].entropy < uneven["T=1.5"].entropy
    assert uneven["min-p 0.1"].entropy < uneven["T=1"].entropy
    assert all(1 <= r.tokens_per_pass <= 5 and 0 < r.acceptance_rate < 1 for r in uneven.values())


def test_dropout_changes_plain_passes_and_not_the_engine() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, attention_dropout=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    found = decoding.dropout(model, [[1, 2, 3], [4, 5]], 12)
    assert max(found.training) < 1 and found.engine == 1 and found.is_left_training
    model.eval()
    assert not decoding.all_training(model)


# --- The scripts


def test_half_a_pair_is_an_error() -> None:
    assert pair_or_demo("t", ["d", "suffix"]) == ("t", ["d", "suffix"]) and pair_or_demo("t", ["d"]) == ("t", "d")
    for target, draft in (("t", None), (None, ["d"])):
        with pytest.raises(ConfigError, match="a pair is a target and a draft"):
            pair_or_demo(target, draft)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "options"),
    [
        (lossless, "--samples 1500 --max-new-tokens 12"),
        (acceptance, "--prompts 1 --prompt-tokens 24 --new-tokens 8 --rounds 1 --dtype float32"),
        (quality, "--documents 2 --tokens 32 --new-tokens 8 --dtype float32"),
        (decoding, "--prompts 1 --new-tokens 8 --samples 1 --dtype float32"),
    ],
)
def test_scripts_run_on_any_pair(study: ModuleType, options: str, tiny_pair: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(study.main)
    pair = ["--target", str(tiny_pair / "target"), "--draft", str(tiny_pair / "draft"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*pair, *options.split()])
    assert result.exit_code == 0, result.output
    name = study.__name__.removeprefix("study_")
    assert json.loads((tmp_path / f"{name}.json").read_text())["machine"]["cores"] >= 1
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
