"""What does sampling cost speculation, and what does dropout left on do to a text?

python evals/decoding.py [--target DIR --draft DIR]

Ways to choose the next token side by side on the same prompts: the entropy of the law, how much the text repeats itself,
how many guesses are accepted and how many tokens a pass commits. Then dropout: a model in training mode writes another
text every time; the engine, given that model, writes the text it should, and leaves the model in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.checkpoints import checkpoint_directory
from specdec.demo import decoding_dtype_name, pair_or_demo
from specdec.engine import Engine
from specdec.load import load
from specdec.picture import COLOURS
from specdec.report import write_figures
from specdec.sampling import SamplingParams, filters, law
from specdec.scoring import Text, scored
from specdec.training.data import gather, held_out_prompts

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "greedy": SamplingParams(),
    "T=0.7": SamplingParams(0.7),
    "T=1": SamplingParams(1.0),
    "T=1.5": SamplingParams(1.5),
    "top-k 20": SamplingParams(1.0, top_k=20),
    "top-p 0.9": SamplingParams(1.0, top_p=0.9),
    "min-p 0.1": SamplingParams(1.0, min_p=0.1),
}
DRAFTED = 4  # tokens per pass
DROPOUT = 0.1
NAMES = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout")  # in configs


@dataclass(frozen=True)
class WayResult:
    """Entropy in bits per token; distinct_n: different n-grams as a share of all, mean over texts."""

    way: str
    entropy: float
    distinct_1: float
    distinct_2: float
    acceptance_rate: float
    tokens_per_pass: float


@dataclass(frozen=True)
class DropoutResult:
    """Tokens equal to the text of the model without dropout, as shares: plain passes in training mode, the engine."""

    training: list[float]
    engine: float
    is_left_training: bool


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams of a text as a share of all (Li et al. 2016, arXiv 1510.03055)."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)


def compare(engine: Engine, way: str, prompts: Sequence[list[int]], new_tokens: int, n: int) -> WayResult:
    """One way to choose tokens, with speculation, which keeps its law."""
    params = WAYS[way]
    given = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    output = engine.generate(
        prompts,
        n=n,
        max_new_tokens=new_tokens,
        num_draft_tokens=DRAFTED,
        rule="block",
        seed=0,
        eos_token_id=None,
        **given,
    )
    texts = [Text(prompts[i // n], new) for i, new in enumerate(output.token_ids)]
    entropies = [
        torch.special.entr(law(logits, filters(params))).sum(-1).mean()
        for logits in scored(engine.target, texts, engine.limits.vocab_size)
    ]
    bits = float(torch.stack(entropies).mean()) / torch.tensor(2.0).log().item()
    shares = [sum(distinct(text.new, size) for text in texts) / len(texts) for size in (1, 2)]
    return WayResult(way, bits, *shares, output.stats.acceptance_rate, output.stats.mean_acceptance_length)


def with_dropout(target: str) -> PreTrainedModel | None:
    """Hugging Face's model of a checkpoint with dropout of ``DROPOUT``, in training mode; None if it has no dropout."""
    directory = checkpoint_directory(target)
    config = AutoConfig.from_pretrained(directory)
    known = {name: DROPOUT for name in NAMES if hasattr(config, name)}
    if not known:
        return None
    transformers.utils.logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **known)
    return model.train()


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """The largest logit of a full forward pass, again and again, in whatever mode the model is."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def dropout(model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: int) -> DropoutResult:
    """Texts of a model in training mode, twice, and of an engine that was given it, against those in evaluation mode."""
    model.eval()
    right = [plain_greedy(model, prompt, new_tokens) for prompt in prompts]
    model.train()
    torch.manual_seed(0)
    wrong = [[plain_greedy(model, prompt, new_tokens) for prompt in prompts] for _ in range(2)]
    engine = load(model, draft="suffix")
    own = engine.generate(prompts, max_new_tokens=new_tokens, num_draft_tokens=DRAFTED, eos_token_id=None).token_ids
    return DropoutResult([_equal(texts, right) for texts in wrong], _equal(own, right), all_training(model))


def all_training(model: PreTrainedModel) -> bool:
    """Whether every module of it is in training mode."""
    return all(module.training for module in model.modules())


def _equal(texts: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    pairs = [a == b for text, other in zip(texts, right, strict=True) for a, b in zip(text, other, strict=True)]
    return sum(pairs) / len(pairs)


def draw(results: Sequence[WayResult], path: Path) -> None:
    """Save entropy, repetition and acceptance by way, and acceptance against entropy, as a PNG."""
    figure, panels = plt.subplots(1, 4, figsize=(14, 4), layout="constrained")
    names = [r.way for r in results]
    _bars(panels[0], names, [r.entropy for r in results], "entropy of the law, bits per token")
    _bars(panels[1], names, [100 * r.distinct_2 for r in results], "different pairs of tokens, % of all")
    _bars(panels[2], names, [r.tokens_per_pass for r in results], f"tokens per pass, {DRAFTED} drafted")
    last = panels[3]
    for r, colour in zip(results, COLOURS, strict=False):
        last.scatter(r.entropy, 100 * r.acceptance_rate, color=colour, label=r.way)
    last.set_xlabel("entropy of the law, bits per token")
    last.set_ylabel("guesses accepted, %")
    last.legend(frameon=False, fontsize=8)
    last.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], label: str) -> None:
    bars = axes.barh(names, values, color=COLOURS[: len(names)])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def tables(results: Sequence[WayResult], dropped: DropoutResult | None) -> list[Table]:
    """Ways to choose, and what dropout does."""
    ways = Table(
        "way", "entropy, bits", "distinct-1", "distinct-2", "accepted", "tokens per pass", title="What sampling costs"
    )
    for r in results:
        shares = (f"{share:.0%}" for share in (r.distinct_1, r.distinct_2, r.acceptance_rate))
        ways.add_row(r.way, f"{r.entropy:.2f}", *shares, f"{r.tokens_per_pass:.2f}")
    if dropped is None:
        return [ways]
    shown = Table(
        "a model in training mode", "tokens as they should be", title=f"Dropout of {DROPOUT:g} left on, greedy"
    )
    for i, share in enumerate(dropped.training, 1):
        shown.add_row(f"plain forward passes, run {i}", f"{share:.0%}")
    left = "left in training mode" if dropped.is_left_training else "NOT left in training mode"
    shown.add_row(f"the engine, given that model ({left})", f"{dropped.engine:.0%}")
    return [ways, shown]


def main(
    target: Annotated[str | None, typer.Option(help="Target; default: the demo's pair.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Draft model, or suffix.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out code.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of every text.")] = 64,
    samples: Annotated[int, typer.Option(help="Texts of every prompt.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto: what this machine computes fastest.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Compare all ways, show dropout, print, draw, write."""
    console = Console()
    where, given = pair_or_demo(target, draft)
    engine = load(where, draft=given, dtype=decoding_dtype_name() if dtype == "auto" else dtype)
    assert engine.tokenizer is not None
    texts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=prompts, tokens=64)
    results = []
    for way, params in WAYS.items():
        with console.status(way):
            results.append(compare(engine, way, texts, new_tokens, 1 if params.greedy else samples))
    model = with_dropout(where)
    with console.status("dropout"):
        dropped = None if model is None else dropout(model, texts[:3], min(new_tokens, 32))
    for table in tables(results, dropped):
        console.print(table)
    figures: dict[str, Any] = {
        "settings": {"prompts": prompts, "new_tokens": new_tokens, "samples": samples, "drafted": DRAFTED}
    }
    figures |= {"ways": [asdict(r) for r in results], "dropout": dropped and asdict(dropped)}
    write_figures(out / "decoding.json", figures)
    draw(results, out / "decoding.png")


if __name__ == "__main__":
    typer.run(main)
