"""What does a drafter bring that needs no model? Suffix decoding and plain prompt lookup, by kind of text.

python benchmarks/lookups.py [--texts 16] [--rounds 3] [--kinds code "code editing" ...] [--wide] [--cpu-time]

The demo's target reads at its own speed, but says texts that are prescribed: a model of 7 M parameters copies nothing,
and lookups live on what larger ones copy. Kinds: real code after 400 tokens of it; a function written again with
a parameter renamed and a line added; tokens at random; and the target's own greedy text. One text at a time, ways in
turn; on a busy machine ``--cpu-time`` counts the seconds that the process had. ``--wide`` takes the widened target (520 M
parameters). Writes benchmarks/results/lookups.json, or lookups_wide.json.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from specdec import Draft, Drafter, Engine, bench, load
from specdec.bench import Measurement, Method, Run
from specdec.controller import AUTO
from specdec.demo import decoding_dtype_name, demo_pair
from specdec.drafters.suffix import SuffixDrafter
from specdec.machine import machine
from specdec.sequences import Row, Sequences, Step
from specdec.training.data import gather
from specdec.widen import wide_pair

RESULTS = Path(__file__).parent / "results"
LENGTHS: tuple[int | str, ...] = (4, 8, 15, AUTO)
PROMPT_TOKENS, NEW_TOKENS = 400, 256
FUNCTION_TOKENS = range(150, 400)

Text = tuple[list[int], list[int]]  # a prompt, and what is said to it


def code(files: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    """Parts of files, and what their authors wrote next."""
    for source in files:
        ids = tokenizer.encode(source, add_special_tokens=False, verbose=False)
        for end in range(PROMPT_TOKENS, len(ids) - NEW_TOKENS, PROMPT_TOKENS + NEW_TOKENS):
            yield ids[end - PROMPT_TOKENS : end], ids[end : end + NEW_TOKENS]


def edits(files: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    """Functions, and the same ones with a parameter renamed and a comment in the middle."""
    for source in files:
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not node.args.args:
                continue
            function = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
            name = node.args.args[-1].arg
            lines = re.sub(rf"\b{name}\b", f"given_{name}", function).splitlines(keepends=True)
            lines.insert(len(lines) // 2, "    # checked\n")
            asked, said = (
                tokenizer.encode(text, add_special_tokens=False, verbose=False)
                for text in (f"{function}\n\n# The same, renamed:\n", "".join(lines))
            )
            if len(asked) in FUNCTION_TOKENS:
                yield asked, said


def kinds(engine: Engine, count: int) -> dict[str, list[Text]]:
    """``count`` texts of each kind."""
    assert engine.tokenizer is not None
    files = [document.text for document in gather("stdlib").held_out]
    made = {"code": code(files, engine.tokenizer), "code editing": edits(files, engine.tokenizer)}
    found = {name: random.Random(0).sample(list(texts), count) for name, texts in made.items()}
    draw = random.Random(0)
    ids = [[draw.randrange(engine.limits.vocab_size) for _ in range(PROMPT_TOKENS + NEW_TOKENS)] for _ in range(count)]
    found["no repetition"] = [(text[:PROMPT_TOKENS], text[PROMPT_TOKENS:]) for text in ids]
    prompts = [prompt for prompt, _ in found["code"]]
    own = engine.generate(prompts, max_new_tokens=NEW_TOKENS, num_draft_tokens=0, eos_token_id=None)
    found["own greedy text"] = list(zip(prompts, own.token_ids, strict=True))
    return found


class PromptLookup:
    """What followed the latest occurrence of the row's last tokens, 4 if they occurred, else fewer (Saxena 2023)."""

    def __init__(self) -> None:
        self._read, self._ends = 0, dict[tuple[int, ...], int]()

    def reserve(self, rows: int, length: int) -> None: ...

    def observe(self, step: Step) -> None: ...

    def copy(self, source: int, target: int, length: int | None = None) -> None: ...

    def free(self, rows: int) -> None:
        self.__init__()  # type: ignore[misc]

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        (row,) = sequences.rows
        return Draft.certain([self._guess(row, lengths[0])], sequences.device)

    def _guess(self, row: Row, count: int) -> list[int]:
        tokens = row.tokens
        for end in range(self._read + 1, len(tokens)):
            for size in range(1, min(4, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._read = len(tokens) - 1
        sizes = range(min(4, len(tokens) - 1), 0, -1)
        end = next((end for size in sizes if (end := self._ends.get(tuple(tokens[-size:])))), None)
        found = [] if end is None else tokens[end : end + count]
        return [found[i % len(found)] for i in range(count)] if found else []


class Dictation:
    """Makes an engine's target say prescribed texts, one row at a time, at the cost of its own passes."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.text = engine, [0]
        self._append = engine.target.append
        engine.target.append = self.append  # type: ignore[method-assign]

    def append(self, tokens: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        """Read as the target does; the prescribed tokens are the likeliest."""
        logits = self._append(tokens, *given, **more)
        start = self.engine.target.lengths[0] + 1
        for place, token in enumerate(self.text[start : start + logits.shape[1]]):
            logits[0, place, token] = 1e4
        return logits

    def method(self, drafter: Drafter | None, length: int | str, texts: list[Text]) -> Method:
        """Says every text."""
        engine = Engine(self.engine.target, drafter, vocab_size=self.engine.limits.vocab_size)

        def run(chosen: Sequence[Sequence[int]]) -> Run:
            (i,) = chosen[0]
            prompt, said = texts[i]
            self.text = prompt + said
            started = time.perf_counter()
            output = engine.generate([prompt], max_new_tokens=len(said), num_draft_tokens=length, eos_token_id=None)
            assert output.token_ids == [said], "not the prescribed text"
            return Run(output.token_ids, time.perf_counter() - started, output.stats)

        return bench.one_by_one(run)


def measure(dictation: Dictation, texts: list[Text], rounds: int) -> list[Measurement]:
    """Plain decoding, and both drafters at every length; prompt lookup has no idea how long its drafts should be."""
    methods = {bench.PLAIN: dictation.method(None, 0, texts)}
    for length in LENGTHS:
        if length != AUTO:
            methods[f"prompt lookup, {length}"] = dictation.method(PromptLookup(), length, texts)
        methods[f"suffix, {length}"] = dictation.method(SuffixDrafter(), length, texts)
    return bench.summaries(bench.timed_rounds(methods, [[i] for i in range(len(texts))], rounds=rounds), batch=1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", help="of texts; all by default")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    console = Console()
    pair = demo_pair(console)
    engine = load(wide_pair(pair)[0] if given.wide else pair / "target", dtype=decoding_dtype_name())
    found = kinds(engine, given.texts)
    if unknown := set(given.kinds or ()) - set(found):
        parser.error(f"kinds of text are {', '.join(found)}, got {', '.join(sorted(unknown))}")
    found = {kind: texts for kind, texts in found.items() if kind in (given.kinds or found)}
    dictation = Dictation(engine)
    figures = {}
    for kind, texts in found.items():
        measured = measure(dictation, texts, given.rounds)
        console.print(bench.table(measured, f"{kind}: {len(texts)} texts"))
        figures[kind] = [one.as_dict() for one in measured]
    (RESULTS / f"lookups{'_wide' if given.wide else ''}.json").write_text(
        json.dumps({"machine": machine(), "cpu_time": given.cpu_time, "cells": figures}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
