"""Are the numbers of an evaluation the same with and without speculation?

python evals/quality.py [--target DIR --draft DIR]        exit code 1 if they are not

Held-out code through the engine, plain and with every drafter: its perplexity, token by token as the engine reads it
(a processor lets nothing but the text be written, so that drafts are checked and refused on the way), how often a line is
completed exactly, the same as a task of lm-eval where that is installed, and how likely the target finds what is sampled.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import string
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from specdec.demo import decoding_dtype_name, pair_or_demo
from specdec.engine import Engine
from specdec.load import load
from specdec.picture import COLOURS
from specdec.processors import Processing
from specdec.report import write_figures
from specdec.requests import Settings
from specdec.sampling import GREEDY, filters
from specdec.sequences import Request
from specdec.training.data import gather, held_out_prompts
from specdec.tuned import LOOKUP

RESULTS = Path(__file__).parent / "results"
PLAIN, DRAFTED = 0, 4  # tokens drafted per pass
SAMPLES = 8  # of every prompt
DIFFERENT = 4.0  # standard errors between means of samples: once in 16,000
NEAR = {torch.float32: 1e-5, torch.float64: 1e-9}  # how far perplexities may be apart, as a share; others: 1e-2
TASK = """
task: complete_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Numbers:
    """What an evaluation says: of held-out text, of completed lines, of sampled text; nats per token.

    ``task`` is lm-eval's exact match, None where that is not installed.
    """

    perplexity: float
    exact_match: float
    task: float | None
    sampled: float
    sampled_error: float
    refused: int


class Follow(LogitsProcessor):
    """Leaves only the token by which ``document`` goes on."""

    def __init__(self, document: Sequence[int]) -> None:
        self.document = list(document)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -math.inf)
        token = self.document[min(input_ids.shape[1], len(self.document) - 1)]  # a drafter may look past the end
        allowed[:, token] = scores[:, token]
        return allowed


def logprobs_of(engine: Engine, documents: Sequence[list[int]], prompt: int, k: int) -> tuple[list[list[float]], int]:
    """The engine's log-probabilities of all tokens of ``documents`` but the first ``prompt``, and how many drafted
    tokens were refused on the way."""
    requests: list[Any] = []
    for document in documents:
        head = tuple(document[:prompt])
        processing = Processing(head, LogitsProcessorList([Follow(document)]), filters(GREEDY))
        requests.append(Request(head, len(document), processing=processing))
    call = engine.call(requests, Settings(logprobs=True, num_draft_tokens=k))
    call.quietly()
    output = call.output()
    assert output.logprobs is not None
    assert output.token_ids == [list(document[prompt:]) for document in documents], "the engine wrote another text"
    return output.logprobs, output.stats.num_draft_tokens - output.stats.num_accepted_tokens


def lines_to_complete(engine: Engine, prompts: Sequence[list[int]]) -> list[dict[str, str]]:
    """Held-out code that ends before the punctuation at the end of a line, and that punctuation.

    Hard enough for a small model to be wrong, easy enough to be right now and then.
    """
    assert engine.tokenizer is not None
    found = []
    for prompt in prompts:
        lines = engine.tokenizer.decode(prompt).split("\n")[:-1]  # the last one may be cut
        last = max((i for i, line in enumerate(lines) if re.search(r"\w\W+$", line)), default=None)
        if last is not None:
            word = lines[last].rstrip(string.punctuation + string.whitespace)
            context, answer = "\n".join([*lines[:last], word]), lines[last][len(word) :].rstrip()
            found += [{"context": context, "answer": answer}] if word and answer else []
    return found


def exact_match(engine: Engine, lines: Sequence[Mapping[str, str]], k: int) -> float:
    """The share of lines completed as they were."""
    contexts = [line["context"] for line in lines]
    texts = engine.generate(contexts, stop="\n", max_new_tokens=24, num_draft_tokens=k).texts
    assert texts is not None
    return sum(text.rstrip() == line["answer"] for text, line in zip(texts, lines, strict=True)) / len(lines)


def lm_eval_match(engine: Engine, lines: Sequence[Mapping[str, str]], k: int) -> float | None:
    """The same lines as a task of lm-eval, by its own exact match; None where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return None
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from specdec.lm_eval import SpecDecLM

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "lines.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (Path(folder) / "complete_line.yaml").write_text(TASK.format(data=data, cache=Path(folder) / "cache"))
        with redirect_stderr(StringIO()):  # bars and advice
            model = SpecDecLM(engine, batch_size=8, num_draft_tokens=k)
            manager = TaskManager(include_path=folder, include_defaults=False)
            found = simple_evaluate(model, tasks=["complete_line"], task_manager=manager, bootstrap_iters=0)
    return float(found["results"]["complete_line"]["exact_match,none"])


def sampled_nats(
    engine: Engine, prompts: Sequence[list[int]], k: int, new_tokens: int, seed: int
) -> tuple[float, float]:
    """Nats per token that the target gives texts sampled at temperature 1, and the standard error of their mean."""
    given = {"temperature": 1.0, "rule": "block", "logprobs": True, "eos_token_id": None, "n": SAMPLES, "seed": seed}
    output = engine.generate(prompts, num_draft_tokens=k, max_new_tokens=new_tokens, **given)
    assert output.logprobs is not None
    means = torch.tensor([-sum(row) / len(row) for row in output.logprobs], dtype=torch.float64)
    groups = means.view(len(prompts), -1)  # prompts differ, and are the same for all, so errors are those within them
    return float(means.mean()), float((groups.var(1).mean() / len(means)).sqrt())


def same(a: Numbers, b: Numbers, dtype: torch.dtype) -> bool:
    """Whether two evaluations say the same: all but samples as far as rounding goes, these as far as chance goes."""
    near = NEAR.get(dtype, 1e-2)
    rounded = near if dtype in NEAR else 0.02  # in low precision a near-tie may change a line
    tasks = a.task == b.task or (a.task is not None and b.task is not None and abs(a.task - b.task) <= rounded)
    apart = abs(a.sampled - b.sampled) / math.hypot(a.sampled_error, b.sampled_error)
    return (
        abs(a.perplexity / b.perplexity - 1) <= near
        and abs(a.exact_match - b.exact_match) <= rounded
        and tasks
        and apart <= DIFFERENT
    )


def evaluate(
    engine: Engine,
    documents: Sequence[list[int]],
    lines: Sequence[Mapping[str, str]],
    k: int,
    new_tokens: int,
    seed: int,
) -> tuple[Numbers, list[float]]:
    """All numbers with drafts of ``k`` tokens, and the log-probability of every token of ``documents``."""
    prompt = len(documents[0]) // 4
    rows, refused = logprobs_of(engine, documents, prompt, k)
    logprobs = [value for row in rows for value in row]
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    samples = sampled_nats(engine, [document[:prompt] for document in documents], k, new_tokens, seed)
    return Numbers(
        perplexity, exact_match(engine, lines, k), lm_eval_match(engine, lines, k), *samples, refused
    ), logprobs


def table(found: Mapping[str, Numbers]) -> Table:
    """A row per way to generate."""
    result = Table("way", "perplexity", "exact match", "lm-eval exact match", "nats of samples", "guesses refused",
                   title="The same numbers?")  # fmt: skip
    for name, n in found.items():
        result.add_row(
            name, f"{n.perplexity:.4f}", f"{n.exact_match:.1%}", "not installed" if n.task is None else f"{n.task:.1%}",
            f"{n.sampled:.3f} ± {n.sampled_error:.3f}", str(n.refused),
        )  # fmt: skip
    return result


def draw(found: Mapping[str, Numbers], logprobs: Mapping[str, Sequence[float]], path: Path) -> None:
    """Save every held-out token's log-probability against plain decoding's, lines completed, and samples, as a PNG."""
    figure, (tokens, lines, samples) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    base = logprobs["plain"]
    for (name, own), colour, size in zip(logprobs.items(), COLOURS, (0, 60, 24, 6), strict=False):
        if name != "plain":
            tokens.scatter(base, own, s=size, facecolors="none", edgecolors=colour, linewidths=0.6, label=name)
    least = min(base)
    tokens.plot([least, 0], [least, 0], color="#000000", linewidth=0.6)
    tokens.set_xlabel("log-probability by plain decoding, nats")
    tokens.set_ylabel("with speculation, nats")
    tokens.set_title(f"{len(base)} tokens of held-out code", fontsize=10)
    tokens.legend(frameon=False, fontsize=8)
    names = list(found)
    shares = [100 * n.exact_match for n in found.values()]
    bars = lines.bar(names, shares, color=COLOURS[: len(names)])
    lines.bar_label(bars, [f"{share:.1f}" for share in shares], fontsize=8)
    lines.set_ylabel("lines completed exactly, %")
    samples.errorbar(
        names, [n.sampled for n in found.values()], yerr=[2 * n.sampled_error for n in found.values()], fmt="o",
        color=COLOURS[1],
    )  # fmt: skip
    samples.set_ylabel("nats per sampled token")
    samples.set_title("mean ± 2 standard errors", fontsize=10)
    for axes in (tokens, lines, samples):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    target: Annotated[str | None, typer.Option(help="Target; default: the demo's pair.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Draft model, or suffix.")] = None,
    documents: Annotated[int, typer.Option(help="Held-out texts.")] = 16,
    tokens: Annotated[int, typer.Option(help="Of every text.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Of every sampled text.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto: what this machine computes fastest.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Evaluate plain decoding and every drafter, compare, print, draw, write."""
    console = Console()
    where, given = pair_or_demo(target, draft)
    ways: dict[str, Any] = {"plain": (given, PLAIN), "draft": (given, DRAFTED)}
    if given != LOOKUP and not isinstance(given, list):
        ways |= {"lookup": (LOOKUP, DRAFTED), "both": ([given, LOOKUP], DRAFTED)}
    found: dict[str, Numbers] = {}
    logprobs: dict[str, list[float]] = {}
    for name, (drafter, k) in ways.items():
        engine = load(where, draft=drafter, dtype=decoding_dtype_name() if dtype == "auto" else dtype)
        assert engine.tokenizer is not None
        texts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=4 * documents, tokens=tokens)
        with console.status(name):
            seed = 100_000 * len(found)  # others for each: draws must be independent for their means to be compared
            lines = lines_to_complete(engine, texts)
            found[name], logprobs[name] = evaluate(engine, texts[:documents], lines, k, new_tokens, seed)
    console.print(table(found))
    passed = all(same(found["plain"], numbers, engine.target.dtype) for numbers in found.values())
    console.print("[green]the same numbers[/]" if passed else "[bold red]DIFFERENT numbers[/]")
    settings = {"dtype": str(engine.target.dtype), "documents": documents, "tokens": tokens, "drafted": DRAFTED}
    write_figures(
        out / "quality.json", {"passed": passed, "settings": settings, "ways": {n: asdict(v) for n, v in found.items()}}
    )
    draw(found, logprobs, out / "quality.png")
    raise typer.Exit(code=0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
