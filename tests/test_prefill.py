"""Prompts are read in bounded parts beside the rows that decode, the shortest first, and no text depends on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from specdec import Draft, Engine, ModelError, admission
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Call, Piece
from specdec.lm.base import window_start
from specdec.lm.native import NativeLM
from specdec.nn.gpt import GPT
from specdec.sequences import Sequences, Step
from toys import TableLM, native, noisy, random_table, tiny_gpt

VOCAB = 61
PREFILL, FILL, PASS = 64, 128, 16  # small, so that prompts of some hundred tokens take many rounds


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PREFILL_TOKENS", PREFILL), ("FILL_TOKENS", FILL), ("PASS_TOKENS", PASS)):
        monkeypatch.setattr(admission, name, value)


def prompt_of(length: int, vocab_size: int = VOCAB) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@cache
def target() -> GPT:
    return tiny_gpt(0, context=512)


class Pass(NamedTuple):
    """One forward pass: how many real tokens each of its rows had, how wide it was, and whether rows decoded in it."""

    counts: list[int]
    width: int
    decodes: bool

    @property
    def cells(self) -> int:
        return self.width * len(self.counts)


class RecordingLM(NativeLM):
    """Remembers its passes."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.passes: list[Pass] = []

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        rows, width = tokens.shape
        self.passes.append(Pass(list(self._counts or [width] * rows), width, needs_logits))
        return super()._forward(tokens, lengths, first, needs_logits=needs_logits)


def rounds(passes: Sequence[Pass]) -> list[list[Pass]]:
    """The reading passes before each pass that decodes."""
    found: list[list[Pass]] = [[]]
    for one in passes:
        if one.decodes:
            found.append([])
        else:
            found[-1].append(one)
    assert found[-1] == []
    return found[:-1]


def plain_text(model: GPT, prompt: list[int], new: int) -> list[int]:
    """What follows ``prompt``: passes over the whole window of the text, without a cache."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            window = text[window_start(len(text), model.config.max_position_embeddings) :]
            text.append(int(model.lm_head(model(torch.tensor([window])))[0, -1].argmax()))
    return text[len(prompt) :]


@cache
def text_alone(length: int, new: int) -> list[int]:
    return plain_text(target(), prompt_of(length), new)


def tokens_of(pieces: Sequence[Piece], index: int) -> list[int]:
    return [token for piece in pieces if piece.index == index for token in piece.token_ids]


# --- What waits for what


def test_a_row_decodes_between_the_parts_of_a_long_prompt(bounds: None) -> None:
    lm = RecordingLM(target())
    pieces = list(Engine(lm).stream([prompt_of(400), prompt_of(5)], max_new_tokens=[8, 40]))
    begun = next(i for i, piece in enumerate(pieces) if piece.index == 0)
    assert begun == math.ceil(399 / PREFILL)  # that many pieces of the short row come first
    assert tokens_of(pieces, 0) == text_alone(400, 8) and tokens_of(pieces, 1) == text_alone(5, 40)
    first, *others = rounds(lm.passes)
    assert [one.counts for one in first] == [[4], [PREFILL]]
    assert all(sum(one.cells for one in reading) <= PREFILL for reading in others)
    assert sum(map(len, others)) == math.ceil(399 / PREFILL) - 1


def test_a_long_prompt_that_joins_later_stalls_nobody_and_lets_short_ones_pass(bounds: None) -> None:
    # Rows 0, 1 and 2 decode. Where 2 was, 3 is read in parts; where 1 was, 4 overtakes it.
    lm = RecordingLM(target())
    shapes = [(5, 40), (6, 5), (7, 2), (400, 8), (9, 10)]
    prompts, new = [prompt_of(length) for length, _ in shapes], [count for _, count in shapes]
    pieces = list(Engine(lm).stream(prompts, max_new_tokens=new, max_batch_size=3))
    order = list(dict.fromkeys(piece.index for piece in pieces))
    assert order == [0, 1, 2, 4, 3]
    places = [i for i, piece in enumerate(pieces) if piece.index == 4]
    assert places[2] < min(i for i, piece in enumerate(pieces) if piece.index == 3)
    reading = rounds(lm.passes)[1:]
    assert all(sum(one.cells for one in part) <= PREFILL for part in reading)
    assert [[one.counts for one in part] for part in reading if part][2:4] == [[[PREFILL]], [[8], [PREFILL - 8]]]
    assert all(tokens_of(pieces, index) == text_alone(*shape) for index, shape in enumerate(shapes))


def test_a_prompt_that_is_nearly_read_goes_before_a_shorter_one(bounds: None) -> None:
    prompts = [prompt_of(n) for n in (5, 400, 6, 390)]
    pieces = list(Engine(native(target())).stream(prompts, max_new_tokens=[60, 3, 4, 3], max_batch_size=3))
    assert list(dict.fromkeys(piece.index for piece in pieces)) == [0, 2, 1, 3]


def test_where_nothing_decodes_parts_are_larger(bounds: None) -> None:
    lm = RecordingLM(target())
    Engine(lm).generate([prompt_of(400)], max_new_tokens=2)
    assert [one.counts for one in lm.passes] == [[FILL], [FILL], [FILL], [399 - 3 * FILL], [1], [1]]


def test_prompts_of_like_length_are_read_together(bounds: None) -> None:
    lm = RecordingLM(target())
    prompts = [prompt_of(n) for n in (31, 5, 4, 30, 6, 32)]
    Engine(lm).generate(prompts, max_new_tokens=3)
    reading = [one.counts for one in itertools.chain(*rounds(lm.passes))]
    assert reading == [[3, 4, 5], [29, 30], [31]]  # two of 30 are what fits into a pass beside rows that decode
    assert [one.width for one in lm.passes if not one.decodes] == [5, 30, 31]


def test_padding_costs_less_than_the_passes_it_saves() -> None:
    lm = RecordingLM(target())
    prompts = [prompt_of(n) for n in (20, 1, 90, 92, 2, 94, 22, 60, 58)]
    Engine(lm).generate(prompts, max_new_tokens=1)
    reading = [one for one in lm.passes if not one.decodes]
    assert sorted(itertools.chain(*(one.counts for one in reading))) == sorted(len(prompt) - 1 for prompt in prompts)
    assert all(one.cells - sum(one.counts) <= admission.PASS_TOKENS for one in reading)
    assert len(reading) < 5


def test_samples_share_a_prompt_that_is_read_in_parts(bounds: None) -> None:
    lm = RecordingLM(target())
    prompts = [prompt_of(300), prompt_of(5)]
    settings = {"temperature": 1.0, "rule": "coupled", "max_new_tokens": 12}
    for size in (8, 3):
        lm.passes.clear()
        output = Engine(lm).generate(prompts, n=3, seed=[50, 60], max_batch_size=size, **settings)
        for i, seed in enumerate(output.seeds):
            alone = Engine(native(target())).generate([prompts[i // 3]], seed=seed, **settings)
            assert output.token_ids[i] == alone.token_ids[0]
        assert sum(sum(one.counts) for one in lm.passes if not one.decodes) == 299 + 4


# --- Texts and slots

SHAPES = [
    (5, 30),
    (300, 9),
    (17, 3),
    (1, 25),
    (150, 20),
    (160, 2),
    (6, 1),
    (90, 12),
    (2, 40),
    (400, 6),
    (20, 8),
    (33, 5),
]


def drafter_of(name: str) -> Any:
    model = ModelDrafter(native(noisy(target(), 0.015)))
    return {"none": None, "model": model, "hybrid": HybridDrafter(model, SuffixDrafter()), "suffix": SuffixDrafter()}[
        name
    ]


@pytest.mark.parametrize("draft", ["none", "model", "hybrid", "suffix"])
def test_texts_are_those_of_each_row_alone(bounds: None, draft: str) -> None:
    lengths, new = zip(*SHAPES, strict=True)
    for size, n in ((1, 1), (2, 1), (3, 2), (5, 1), (12, 2)):
        found = Engine(native(target()), drafter_of(draft))
        output = found.generate(
            [prompt_of(length) for length in lengths], max_new_tokens=list(new), max_batch_size=size, n=n,
            num_draft_tokens=3,
        )  # fmt: skip
        assert output.token_ids == [text_alone(*shape) for shape in SHAPES for _ in range(n)]
        assert output.stats.num_requests == n * len(SHAPES)
        assert output.stats.num_prompt_tokens == n * sum(lengths)
        assert output.stats.num_generated_tokens == n * sum(new)
        assert 0 < output.stats.prefill_seconds < output.stats.total_seconds


@pytest.mark.parametrize("draft", ["model", "hybrid"])
def test_coupled_samples_are_those_of_each_row_alone(bounds: None, draft: str) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "rule": "coupled"}
    prompts, new = [prompt_of(length) for length, _ in SHAPES], [count for _, count in SHAPES]
    plain = Engine(native(target()))
    alone = [
        plain.generate([prompt], seed=70 + i, max_new_tokens=new[i], **settings).token_ids[0]
        for i, prompt in enumerate(prompts)
    ]
    found = Engine(native(target()), drafter_of(draft))
    for size in (2, 4, 12):
        output = found.generate(
            prompts, seed=70, max_new_tokens=new, max_batch_size=size, num_draft_tokens=3, **settings
        )
        assert output.token_ids == alone


def test_windows_of_prompts_past_the_context_are_read_in_parts(bounds: None) -> None:
    model = tiny_gpt(0, context=128)
    shapes = [(300, 40), (5, 150), (120, 30), (128, 90), (129, 20), (7, 5)]
    prompts, new = [prompt_of(length) for length, _ in shapes], [count for _, count in shapes]
    expected = [plain_text(model, prompt, count) for prompt, count in zip(prompts, new, strict=True)]
    found = Engine(native(model), ModelDrafter(native(noisy(tiny_gpt(0, context=64), 0.015))))
    for size, k in ((12, 3), (3, 0), (4, 5), (1, 2)):
        output = found.generate(
            prompts, n=2, max_new_tokens=new, max_batch_size=size, num_draft_tokens=k, context="slide"
        )
        assert output.token_ids == [text for text in expected for _ in range(2)]


def check_slots(call: Call) -> None:
    """What every slot of target and drafter holds, to the token; the ``memory`` of a ``TableLM`` is its cache."""
    lm, rows, begun = call.target, call.sequences.rows, call.admission._begun
    assert isinstance(lm, TableLM) and isinstance(call.drafter, ModelDrafter) and isinstance(call.drafter.lm, TableLM)
    draft, places = call.drafter.lm, call.admission.places
    assert len(rows) + call.admission._under_way <= places <= len(lm.memory)
    held = {slot: row.tokens[lm.starts[slot] : -1] for slot, row in enumerate(rows)}
    for i, row in enumerate(begun):
        slot = places - 1 - i
        assert slot not in held and lm.starts[slot] == window_start(len(row.tokens), lm.context)
        assert 0 < lm.lengths[slot] < len(row.tokens) - 1 - lm.starts[slot]
        held[slot] = row.tokens[lm.starts[slot] :][: lm.lengths[slot]]
    for slot, length in enumerate(lm.lengths):
        assert length == len(held.get(slot, [])) and lm._pending[slot] == 0
        assert lm.memory[slot, :length].tolist() == held.get(slot, [])
        assert slot in held or not lm.memory[slot].any()
    for slot, length in enumerate(draft.lengths):
        text = rows[slot].tokens[draft.starts[slot] :] if slot < len(rows) else []
        assert draft.memory[slot, :length].tolist() == text[:length] and length <= len(text)
        assert slot < len(rows) or not draft.memory[slot].any()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_every_slot_holds_its_row_after_every_step(bounds: None, size: int) -> None:
    tables = [random_table(11, seed=1), random_table(11, seed=1) + 0.3 * random_table(11, seed=2)]
    found = Engine(TableLM(tables[0], 150), ModelDrafter(TableLM(tables[1], 70)))
    prompts = [[1 + token % 10 for token in prompt_of(length)] for length, _ in SHAPES]
    settings = {
        "max_new_tokens": [count for _, count in SHAPES], "max_batch_size": size, "n": 2, "context": "slide",
        "num_draft_tokens": 2, "temperature": 1.0, "seed": 3,
    }  # fmt: skip
    call = found._call(prompts, None, settings, streaming=False)
    steps = overlaps = 0
    for step in call.steps():
        check_slots(call)
        steps += 1
        overlaps += len(call.admission._begun) > 0
        assert step.rows and sum(step.committed) >= len(step.rows)
    assert call.stats.num_target_passes == steps
    assert size == 1 or overlaps > 5  # rows that are read in parts beside these steps
    assert [len(row.new_tokens) for row in call.rows.values()] == [count for _, count in SHAPES for _ in range(2)]


# --- Rows that break beside one that reads


def poisoned() -> GPT:
    """Token 60 breaks every row that reads it, and is never generated."""
    model = tiny_gpt(0, context=512)
    model.embed_tokens.weight[60] = math.nan
    model.lm_head.weight[60] = 0
    return model


class Poison:
    """Drafts the token that breaks the target."""

    retried = 0

    def reserve(self, rows: int, length: int) -> None: ...

    def copy(self, source: int, target: int, length: int | None = None) -> None: ...

    def free(self, rows: int) -> None: ...

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        return Draft(torch.full((len(lengths), 1), 60), torch.tensor(lengths).clamp(max=1))

    def observe(self, step: Step) -> None:
        self.retried += len(step.retried)


def test_a_row_that_is_read_anew_or_fails_disturbs_none_that_reads(bounds: None) -> None:
    prompts = [[token % 60 for token in prompt_of(length)] for length in (5, 300, 8, 200)]
    model, new = poisoned(), [20, 6, 12, 6]
    alone = [plain_text(model, prompt, count) for prompt, count in zip(prompts, new, strict=True)]
    drafter = Poison()
    for size in (2, 3, 5):
        output = Engine(native(model), drafter).generate(
            [[60, 3], *prompts], max_new_tokens=[5, *new], max_batch_size=size, num_draft_tokens=1, on_error="return"
        )
        assert output.token_ids == [[], *alone] and isinstance(output.errors[0], ModelError)
    assert drafter.retried > 20


def test_a_stream_that_is_abandoned_amid_a_prompt_leaves_nothing_behind(bounds: None) -> None:
    lm = NativeLM(target())
    found = Engine(lm, drafter_of("model"))
    stream = found.stream([prompt_of(300), prompt_of(5), prompt_of(200)], max_new_tokens=20)
    next(stream)
    assert lm.lengths[2] > 0  # in part
    stream.close()
    assert not any(lm.lengths) and not any(buffer.any() for pair in lm.cache.layers.values() for buffer in pair)
    assert found.generate([prompt_of(300)], max_new_tokens=9).token_ids == [text_alone(300, 9)]
