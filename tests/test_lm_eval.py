"""lm-eval's tasks give on our engine what they give on lm-eval's own ``hf`` model; from a local task, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import specdec.lm_eval
from specdec import ConfigError, PromptError, load
from specdec.lm_eval import SpecDecLM, score

GENERATE = """
task: complete_code
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "return"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
task: choose_code
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["{{answer}}", "{{wrong}}"]
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: perplexity_of_code
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TASKS = ["complete_code", "choose_code", "perplexity_of_code"]
DOCUMENTS = [
    {"question": "import os\n", "answer": "import sys", "wrong": "zebra", "text": "import os\nimport sys\n"},
    {"question": "def main(argv):\n    ", "answer": "return 0", "wrong": "0 return", "text": "x = 1\n" * 100},
    {"question": "class LRUCache:\n    def get(self, key):\n", "answer": "pass", "wrong": "xq", "text": "a b c"},
    {"question": "for i in range(10): ", "answer": "print(i)", "wrong": "\n", "text": "def f():\n    return 1\n"},
    {"question": "try:\n    x = 1\nexcept ", "answer": "ValueError:", "wrong": "0", "text": "y"},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in zip(TASKS, (GENERATE, CHOOSE, PERPLEXITY), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)).replace("CACHE", str(folder / "cache")))
    return folder


@pytest.fixture(scope="module")
def hf(tiny_pair: Path) -> LM:
    # Its cache of logits gives wrong scores where contexts of different lengths make equal texts (lm-eval 0.4.13).
    given = {"dtype": "float32", "device": "cpu", "batch_size": 3, "logits_cache": False}
    return get_model("hf")(pretrained=str(tiny_pair / "target"), **given)


@pytest.fixture(scope="module")
def ours(tiny_pair: Path) -> SpecDecLM:
    return SpecDecLM(
        str(tiny_pair / "target"), draft=str(tiny_pair / "draft"), dtype="float32", batch_size=3, num_draft_tokens=3
    )


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_tasks_give_the_same_results(tasks: Path, hf: LM, ours: SpecDecLM) -> None:
    found = []
    for model in (ours, hf):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found.append(simple_evaluate(model, tasks=TASKS, task_manager=manager, bootstrap_iters=0))
    mine, theirs = found
    for task in TASKS:
        for sample, reference in zip(mine["samples"][task], theirs["samples"][task], strict=True):
            assert sample["doc_id"] == reference["doc_id"]
            assert sample["arguments"] == reference["arguments"]
            if task == "complete_code":
                assert sample["resps"] == reference["resps"]
            else:
                assert numbers(sample["resps"]) == pytest.approx(numbers(reference["resps"]), abs=1e-4, rel=1e-5)
        for metric, value in theirs["results"][task].items():
            assert mine["results"][task][metric] == (pytest.approx(value) if isinstance(value, float) else value)
    assert mine["config"]["mean_acceptance_length"] > 1


def numbers(responses: Any) -> list[float]:
    """Every number in nested lists of responses; booleans as 0 and 1, strings of them as what they say."""
    if isinstance(responses, list | tuple):
        return [value for response in responses for value in numbers(response)]
    return [float({"True": 1, "False": 0}.get(responses, responses))]


SETTINGS: list[dict[str, Any]] = [
    {"until": ["\n\n"], "max_gen_toks": 32},
    {"until": "\n", "do_sample": False, "temperature": 0.0, "top_p": 0, "max_tokens": 30},
    {"until": [], "max_new_tokens": 20},
    {"until": ["e", "zzz"], "max_gen_toks": 40, "repetition_penalty": 1.2},
]


def test_mixed_settings_keep_their_order(hf: LM, ours: SpecDecLM) -> None:
    prompts = [document["question"] for document in DOCUMENTS] + ["import os\n" * 120]
    given = requests("generate_until", *((prompt, kwargs) for prompt in prompts for kwargs in SETTINGS))
    assert ours.generate_until(given) == hf.generate_until(given)


def test_scores_are_those_of_hf_also_where_texts_are_cut(hf: LM, ours: SpecDecLM) -> None:
    pairs = [
        ("", "import os"), ("import os", "\nimport sys"), ("x = ", "1"), ("x =", " 1"), ("def f():\n" * 100, "pass"),
        ("import ", "os, " * 60), ("a", "b" * 70),
    ]  # fmt: skip
    given = requests("loglikelihood", *pairs)
    for (mine, greedy), (theirs, also) in zip(ours.loglikelihood(given), hf.loglikelihood(given), strict=True):
        assert (mine, greedy) == (pytest.approx(theirs, abs=1e-4, rel=1e-5), also)
    texts = requests("loglikelihood_rolling", ("import os\n",), ("x = 1\n" * 200,), ("y",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hf.loglikelihood_rolling(texts), rel=1e-5)


def test_a_greedy_continuation_is_recognised(ours: SpecDecLM) -> None:
    context = "def main(argv):\n"
    (text,) = ours.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 4})))
    tokens = ours.tok_encode(context)
    written = ours.engine.generate([tokens], max_new_tokens=4, num_draft_tokens=0).token_ids[0]
    assert ours.tokenizer.decode(written) == text
    (right, greedy), (wrong, other) = score(
        ours.engine.target, [(tokens, written), (tokens, [*written[:-1], written[-1] ^ 1])]
    )
    assert greedy and not other and right > wrong


@pytest.mark.parametrize("scored_tokens", [2, 5, 2048])
def test_scores_do_not_depend_on_the_size_of_passes(
    ours: SpecDecLM, monkeypatch: pytest.MonkeyPatch, scored_tokens: int
) -> None:
    pairs = [([5], [6, 7, 8, 9, 10]), ([1, 2, 3], [4]), (list(range(40)), list(range(50, 57))), ([9], [8, 7])]
    expected = [score(ours.engine.target, [pair])[0] for pair in pairs]
    monkeypatch.setattr(specdec.lm_eval, "SCORED_TOKENS", scored_tokens)
    for (found, greedy), (value, also) in zip(score(ours.engine.target, pairs), expected, strict=True):
        assert (found, greedy) == (pytest.approx(value, abs=1e-4), also)


def test_sampling_has_a_seed_and_goes_on_from_it(tiny_pair: Path) -> None:
    engine = load(tiny_pair / "target", draft=tiny_pair / "draft", dtype="float32")
    kwargs = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "top_k": 20}
    given = requests("generate_until", *[("import os\n", kwargs)] * 3)
    first, again, other = (SpecDecLM(engine, batch_size=8, seed=seed).generate_until(given) for seed in (7, 7, 8))
    assert first == again != other and len(set(first)) == 3


def test_what_is_unknown_is_an_error(tiny_pair: Path, ours: SpecDecLM) -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_draft_tokens'"):
        SpecDecLM("/nowhere", num_draft_token=3)
    with pytest.raises(ConfigError, match="batch_size must be an integer >= 1"):
        SpecDecLM("/nowhere", batch_size="many")
    with pytest.raises(ConfigError, match="max_length must be from 2 to the model's context of 256"):
        SpecDecLM(str(tiny_pair / "target"), max_length=1000)
    with pytest.raises(ConfigError, match="num_beams"):
        ours.generate_until(requests("generate_until", ("x", {"until": [], "max_gen_toks": 4, "num_beams": 4})))
    with pytest.raises(ConfigError, match="max_gen_toks must be less than the model's context of 256"):
        ours.generate_until(requests("generate_until", ("x", {"until": []})))
    with pytest.raises(PromptError, match="a continuation to score must have 1 to 256 tokens"):
        ours._loglikelihood_tokens([(None, [1], [])])
    stream = ours.engine.stream("import os", max_new_tokens=4)
    next(stream)
    with pytest.raises(ConfigError, match="in the middle of a stream"):
        score(ours.engine.target, [([1], [2])])
    stream.close()


def test_the_command_line_knows_the_model(tasks: Path, tiny_pair: Path, tmp_path: Path) -> None:
    arguments = f"pretrained={tiny_pair / 'target'},draft={tiny_pair / 'draft'},dtype=float32,num_draft_tokens=3"
    command = [sys.executable, "-m", "specdec.lm_eval", "--model", "specdec", "--model_args", arguments]
    command += ["--tasks", "complete_code", "--include_path", str(tasks), "--batch_size", "2"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command += ["--output_path", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=offline)
    (report,) = tmp_path.rglob("results_*.json")
    results = json.loads(report.read_text())
    assert "exact_match,none" in results["results"]["complete_code"]
    assert results["config"]["mean_acceptance_length"] > 1


def test_the_package_does_not_need_it() -> None:
    code = (
        "import sys, specdec, specdec.cli; assert not [name for name in sys.modules if 'lm_eval' in name];"
        "sys.modules['lm_eval'] = None; import specdec.lm_eval"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AssertionError" not in failed.stderr and "pip install 'specdec[lm-eval]'" in failed.stderr
