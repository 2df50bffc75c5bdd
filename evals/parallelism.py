"""Why do Transformers train in parallel and decode one token after another?

python evals/parallelism.py [--target DIR --draft DIR]

An LSTM and our GPT of as many parameters, and a tiny T5, all with random weights, for speed does not depend on what they
are; the pair that decodes is a trained one. Words:

- A *serial step* is a call of a module that waits for the call before it: the LSTM's cells, the GPT, a decoder. Steps are
  counted by hooks while the models run.
- *Whole*: one pass over a text of N tokens and one backward pass, every position predicting the next token (teacher
  forcing). *Position by position*: N passes, each of which predicts one token; the GPT reads the prefix again, the LSTM goes
  on from its state. Their gradients are the same, and are compared.
- Decoding is greedy, of one row, by the same engine and the same torch code: without a cache (the text is read again for every
  token), with keys and values, and with a draft of four tokens per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

from specdec.checkpoints import load_model
from specdec.demo import pair_or_demo
from specdec.drafters.model import ModelDrafter
from specdec.engine import Engine
from specdec.lm.base import CachedLM
from specdec.lm.native import NativeLM
from specdec.load import load
from specdec.machine import single_threaded
from specdec.nn.gpt import GPT, Attention, Block, rotary, rotate
from specdec.nn.lstm import LSTM, Cells, LSTMConfig, Trainable
from specdec.report import write_figures
from specdec.training.data import gather, held_out_prompts
from specdec.training.objective import Pair

from parallelism_picture import draw, tables  # isort: skip (it lies beside this script)

RESULTS = Path(__file__).parent / "results"
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 704}
VOCABULARY, DRAFTED, PROMPT_TOKENS = 2048, 4, 64


@dataclass(frozen=True)
class Sizes:
    """How much is measured. lengths: of one row; tokens: of a batch, however it is laid out; text: serial tokens."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tokens: int = 1024
    text: int = 128
    new_tokens: int = 96
    rounds: int = 3


def models(shape: Mapping[str, int], vocabulary: int, context: int) -> dict[str, Trainable]:
    """A GPT and an LSTM of as many parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"], vocab_size=vocabulary,
                         max_position_embeddings=context, bos_token_id=None, eos_token_id=None)  # fmt: skip
    gpt = GPT(config)
    return {"GPT": gpt, "LSTM": LSTM(LSTMConfig.with_parameters(parameters(gpt), vocabulary))}


def parameters(model: nn.Module) -> int:
    """How many numbers the model has."""
    return sum(weight.numel() for weight in model.parameters())


def seconds_of(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median seconds of every run, one after the other in each round, after a round to warm up."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - started)
    return {key: statistics.median(found[1:]) for key, found in times.items()}


@contextmanager
def calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Counts how often each module is called."""
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            counts[name] += 1

        return add

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def random_rows(rows: int, length: int) -> Tensor:
    """Tokens [rows, length + 1]: every model is given the same."""
    generator = torch.Generator().manual_seed(rows * 10_000 + length)
    return torch.randint(VOCABULARY, (rows, length + 1), generator=generator)


def learn_whole(model: Trainable, tokens: Tensor) -> Tensor:
    """Add the gradient of the mean loss on tokens [B, T + 1], all positions at once; the loss."""
    loss = Pair(model, None, distillation=0.0)(tokens).sum()
    loss.backward()
    return loss.detach()


def learn_by_position(model: Trainable, tokens: Tensor) -> Tensor:
    """What ``learn_whole`` does, one position after the other."""
    total, count = torch.zeros(()), tokens[:, 1:].numel()
    state: tuple[Tensor, Tensor] | None = None
    for t in range(tokens.shape[1] - 1):
        if isinstance(model, LSTM):
            states, state = model.lstm(model.embed_tokens(tokens[:, t : t + 1]), state)
        else:
            states = model(tokens[:, : t + 1])
        loss = F.cross_entropy(model.lm_head(states[:, -1]).float(), tokens[:, t + 1], reduction="sum") / count
        if isinstance(model, GPT):
            loss.backward()
            loss = loss.detach()
        total = total + loss
    if isinstance(model, LSTM):
        total.backward()  # the state of every step is a function of all before it
    return total.detach()


def gradient_difference(model: Trainable, tokens: Tensor) -> float:
    """The largest difference between the gradients of both ways to learn, relative to the largest gradient."""
    found = []
    for learn in (learn_whole, learn_by_position):
        model.zero_grad()
        learn(model, tokens)
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    model.zero_grad()
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


@torch.no_grad()
def read_in_steps(model: LSTM, tokens: Tensor) -> Tensor:
    """Hidden states [B, T, H] of tokens [B, T] from the cells that a fused kernel hides; each waits for the one before."""
    return _steps(Cells(model), model, tokens)


def _steps(cells: Cells, model: LSTM, tokens: Tensor) -> Tensor:
    state, hidden = torch.zeros(model.config.num_hidden_layers, 2, len(tokens), model.config.hidden_size), []
    for x in model.embed_tokens(tokens).unbind(1):
        state = cells(x, state)
        hidden.append(state[-1, 0])
    return torch.stack(hidden, dim=1)


@torch.no_grad()
def serial_steps(model: Trainable, tokens: Tensor) -> int:
    """Calls that wait for each other while the model reads tokens [B, T] whose next ones are known."""
    if isinstance(model, GPT):
        with calls({"model": model}) as counts:
            model(tokens)
        return counts["model"]
    cells = Cells(model)
    with calls({"model": cells}) as counts:
        _steps(cells, model, tokens)
    return counts["model"]


def layouts(count: int) -> list[tuple[int, int]]:
    """Ways to lay out ``count`` tokens as rows x length, from one row to one token each."""
    return [(count // length, length) for length in (4**i for i in range(20)) if length < count] + [(1, count)]


def fused_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The block as it is: all heads in one product, gate and up in one."""
    return block(x, rope, None, None)


def block_in_parts(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The same of one head after another, then of gate and up apart. Every head has keys and values of its own."""
    attention: Attention = block.self_attn
    normed, size = block.input_layernorm(x), attention.head_dim
    queries, keys, values = attention.qkv_proj.weight.split(attention.heads * size)
    for head in range(attention.heads):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (F.linear(normed, weight[own]).unsqueeze(2) for weight in (queries, keys, values))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, *rope), rotate(k, *rope), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        x = x + F.linear(mixed, attention.o_proj.weight[:, own])
    gate, up = block.mlp.gate_up_proj.weight.chunk(2)
    normed = block.post_attention_layernorm(x)
    return x + block.mlp.down_proj(F.silu(F.linear(normed, gate)) * F.linear(normed, up))


class Uncached(CachedLM):
    """A ``GPT`` without a cache: it reads a row from its beginning for every pass."""

    mechanism = "whole rows"

    def __init__(self, model: GPT) -> None:
        super().__init__(
            model.config.vocab_size, model.config.max_position_embeddings, torch.device("cpu"), torch.float32
        )
        self.model, self.texts = model, torch.zeros(0, 0, dtype=torch.long)

    def _reserve(self, rows: int, length: int) -> None:
        self.texts = F.pad(self.texts, (0, max(0, length - self.texts.shape[1]), 0, max(0, rows - len(self.texts))))

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        width, states = tokens.shape[1], []
        self._reserve(first + len(tokens), max(lengths) + width)
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True), first):
            self.texts[row, length : length + width] = ids
            if needs_logits:
                states.append(self.model(self.texts[row : row + 1, : length + width])[0, -width:])
        return torch.stack(states) if states else torch.zeros(0)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.texts[target] = self.texts[source]

    def _wipe(self, first: int, last: int) -> None:
        self.texts[first:last] = 0


def decode(target: GPT, draft: GPT, prompt: Sequence[int], new_tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Three ways to decode: tokens per second, calls of the target per new token, and the text."""
    ways: dict[str, tuple[CachedLM, int]] = {
        "without a cache": (Uncached(target), 0),
        "with a cache": (NativeLM(target), 0),
        "speculating": (NativeLM(target), DRAFTED),
    }
    found: dict[str, dict[str, Any]] = {}
    runs = {}
    for name, (lm, drafted) in ways.items():
        engine = Engine(lm, ModelDrafter(NativeLM(draft)) if drafted else None)
        settings = {"max_new_tokens": new_tokens, "num_draft_tokens": drafted, "eos_token_id": None}
        runs[name] = lambda engine=engine, settings=settings: engine.generate([list(prompt)], **settings)
        with calls({"model": lm.model}) as counts:  # type: ignore[attr-defined]
            output = runs[name]()
        passes = counts["model"] - isinstance(lm, NativeLM)  # the prompt's own pass
        found[name] = {"passes_per_token": passes / new_tokens, "text": output.token_ids[0]}
    for name, seconds in seconds_of(runs, rounds).items():
        found[name]["tokens_per_second"] = new_tokens / seconds
    return found


def encoder_decoder(length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Serial steps and seconds of a tiny T5 that encodes ``length`` tokens, scores as many, and writes as many."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    tokens = random_rows(1, length)[:, 1:]
    engine = load(model)
    settings = {"max_new_tokens": length, "eos_token_id": None, "num_draft_tokens": 0}
    with torch.inference_mode():
        encoded = model.get_encoder()(tokens)
    runs: dict[str, Callable[[], object]] = {
        "encoder reads": lambda: model.get_encoder()(tokens),
        "decoder scores": lambda: model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=False),
        "decoder writes": lambda: engine.generate(tokens.tolist(), **settings),
    }
    found: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        with calls({"encoder": model.get_encoder(), "decoder": model.get_decoder()}) as counts, torch.inference_mode():
            run()
        found[name] = {"steps": counts["encoder" if name == "encoder reads" else "decoder"]}
    with torch.inference_mode():
        for name, seconds in seconds_of(runs, rounds).items():
            found[name]["seconds"] = seconds
    return found


def measure(target: GPT, draft: GPT, prompt: Sequence[int], sizes: Sizes, shape: Mapping[str, int]) -> dict[str, Any]:
    """All that the picture shows."""
    both, text = models(shape, VOCABULARY, 2 * max(*sizes.lengths, sizes.tokens)), random_rows(1, sizes.text)
    rows = {length: random_rows(1, length) for length in sizes.lengths}
    laid_out = {f"{b} x {t}": random_rows(b, t) for b, t in layouts(sizes.tokens)}
    found: dict[str, Any] = {"parameters": {name: parameters(model) for name, model in both.items()}}
    found["by_length"] = learning_speeds(both, rows, sizes.rounds)
    found["by_layout"] = learning_speeds(both, laid_out, sizes.rounds)
    with single_threaded():
        found["by_layout_on_one_core"] = learning_speeds(both, laid_out, sizes.rounds)
    ways = {"whole": learn_whole, "by position": learn_by_position}
    times = seconds_of({(n, w): _run(learn, m, text) for n, m in both.items() for w, learn in ways.items()}, 1)
    found["learning"] = {
        name: {way: times[name, way] for way in ways} | {"difference": gradient_difference(model, text)}
        for name, model in both.items()
    }
    found["steps"] = {name: serial_steps(model, text[:, :-1]) for name, model in both.items()}
    found["block"] = compare_block(both["GPT"], sizes)
    found["encoder_decoder"] = encoder_decoder(sizes.text, sizes.rounds)
    found["decoding"] = decode(target, draft, prompt, sizes.new_tokens, sizes.rounds)
    return found


def learning_speeds(
    both: Mapping[str, Trainable], batches: Mapping[Any, Tensor], rounds: int
) -> dict[str, dict[Any, float]]:
    """Tokens that each model learns per second from each batch, forward and backward."""
    runs = {(n, key): _run(learn_whole, m, batch) for key, batch in batches.items() for n, m in both.items()}
    times = seconds_of(runs, rounds)
    return {name: {key: batch[:, 1:].numel() / times[name, key] for key, batch in batches.items()} for name in both}


def _run(learn: Callable[[Trainable, Tensor], Tensor], model: Trainable, batch: Tensor) -> Callable[[], object]:
    return lambda: learn(model, batch)


@torch.no_grad()
def compare_block(model: Trainable, sizes: Sizes) -> dict[str, float]:
    """Seconds of a block's two forms on one row, and how far apart what they put out is."""
    assert isinstance(model, GPT)
    x = torch.randn(1, sizes.tokens, model.config.hidden_size)
    rope = rotary(torch.arange(sizes.tokens)[None], model.frequencies, model.rope_scale, x.dtype)
    block = model.layers[0].eval()
    forms = {"together": fused_block, "in parts": block_in_parts}
    times = seconds_of({name: (lambda form=form: form(block, x, rope)) for name, form in forms.items()}, sizes.rounds)
    difference = (fused_block(block, x, rope) - block_in_parts(block, x, rope)).abs().max()
    return {**times, "difference": float(difference)}


def main(
    target: Annotated[str | None, typer.Option(help="The GPT that decodes; default: the demo's pair.")] = None,
    draft: Annotated[str | None, typer.Option(help="Its draft model.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds; medians count.")] = 3,
    longest: Annotated[int, typer.Option(help="Tokens of the longest row.")] = 2048,
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = RESULTS,
) -> None:
    """Measure, print, draw, write."""
    console = Console()
    large, small = pair_or_demo(target, [draft] if draft else None)
    sizes = Sizes(lengths=tuple(n for n in Sizes().lengths if n <= longest), rounds=rounds)
    (model, tokenizer), (other, _) = (load_model(name, dtype="float32") for name in (large, str(small)))
    assert isinstance(model, GPT) and isinstance(other, GPT)
    prompt = held_out_prompts(tokenizer, gather("stdlib"), count=1, tokens=PROMPT_TOKENS)[0]  # type: ignore[arg-type]
    with console.status("measuring, some minutes"):
        found = measure(model, other, prompt, sizes, SHAPE)
    for one in tables(found, sizes.text):
        console.print(one)
    write_figures(out / "parallelism.json", {"settings": {**asdict(sizes), **SHAPE, "dtype": "float32"}, **found})
    draw(found, sizes.text, out / "parallelism.png")


if __name__ == "__main__":
    typer.run(main)
