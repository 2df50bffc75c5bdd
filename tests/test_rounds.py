"""Rounds that nobody looks in between of: the texts of single steps, whoever runs them and however they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from specdec import Engine, Output
from specdec import ahead as ahead_module
from specdec.controller import FixedLength
from specdec.drafters.automaton import NOTHING
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ModelError
from specdec.experience import Experience
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.native import NativeLM
from specdec.nn.gpt import GPT
from specdec.rounds import Played, Rounds, _beginning
from toys import noisy, tiny_gpt

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11], [12] * 20, [13, 14], [15, 3], [16, 60, 2]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": [0.7, 1.3] * 4},
    {"temperature": 0.8, "rule": "rejection"},
    {"temperature": 1.0, "rule": "block"},
]


class Counted:
    """Rounds and tokens of rows that were played, and by how many calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[CachedLM] = CpuLM) -> None:
        self.calls = self.rounds = self.drafted = self.in_windows = 0
        play = kind.play

        def counted(lm: CachedLM, asked: Rounds, draft: CachedLM | None) -> Played | None:
            before = list(lm.lengths)
            played = play(lm, asked, draft)
            if played is not None:
                for b, limit in enumerate(asked.limits):  # all but the last token is read, of two by the draft
                    new = sum(len(tokens[b]) for tokens in played.tokens)
                    assert lm.lengths[b] == before[b] + new
                    if draft is not None and getattr(draft, "fuse", None) is None and asked.drafted and new <= limit:
                        assert lm.lengths[b] - draft.starts[b] - draft.lengths[b] in (0, 1)
                        self.in_windows += draft.starts[b] > 0
                self.calls, self.rounds = self.calls + 1, self.rounds + len(played.tokens)
                self.drafted += sum(map(sum, played.drafted))
            return played

        monkeypatch.setattr(kind, "play", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """As many rounds as can be, however long they take."""
    monkeypatch.setattr(ahead_module, "_MOST_SECONDS", 1e9)
    return Counted(monkeypatch)


@pytest.fixture
def single() -> Iterator[Callable[..., Output]]:
    """What an engine generates step by step."""

    def generated(engine: Engine, prompts: list[list[int]], **settings: Any) -> Output:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ahead_module.Ahead, "play", lambda *given: None)
            return engine.generate(prompts, **settings)

    yield generated


def models(dtype: torch.dtype = torch.float32) -> tuple[GPT, GPT]:
    return tiny_gpt(0).to(dtype), noisy(tiny_gpt(0)).to(dtype)


def take(settings: dict[str, Any], rows: int) -> dict[str, Any]:
    """``settings`` of so many rows."""
    return {name: value[:rows] if isinstance(value, list) else value for name, value in settings.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_are_those_of_single_steps(
    settings: dict[str, Any], rows: int, count: int, dtype: torch.dtype, counted: Counted, single: Callable[..., Output]
) -> None:
    target, draft = models(dtype)
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    asked = {**take(settings, rows), "max_new_tokens": 40, "seed": 3, "num_draft_tokens": count}
    expected = single(engine, PROMPTS[:rows], **asked)
    assert not counted.calls
    for _ in range(2):
        found = engine.generate(PROMPTS[:rows], **asked)
        assert found.token_ids == expected.token_ids
        assert found.finish_reasons == expected.finish_reasons
        assert found.from_draft == expected.from_draft
    for name in (
        "num_target_passes",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_generated_tokens",
        "num_row_steps",
    ):
        assert getattr(found.stats, name) == getattr(expected.stats, name), name
    assert counted.rounds > 1 and bool(counted.drafted) == bool(count)
    assert found.stats.draft_seconds > 0 or not count


@pytest.mark.parametrize("count", [0, 3])
def test_a_row_ends_where_it_ends_step_by_step(count: int, counted: Counted, single: Callable[..., Output]) -> None:
    target, draft = models()
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    text = single(engine, PROMPTS[:3], max_new_tokens=60, num_draft_tokens=0).token_ids
    ends = sorted({own[20] for own in text})
    asked = {"max_new_tokens": 60, "num_draft_tokens": count, "eos_token_id": ends}
    expected = single(engine, PROMPTS, **asked, max_batch_size=3)
    assert "eos" in expected.finish_reasons
    for batch in (3, 8):
        found = engine.generate(PROMPTS, **asked, max_batch_size=batch)
        assert (found.token_ids, found.finish_reasons) == (expected.token_ids, expected.finish_reasons)
    assert counted.rounds > 20


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_near_the_end_of_all_rows_drafts_are_shorter(
    rule: str, counted: Counted, single: Callable[..., Output]
) -> None:
    target, draft = models()
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    for seed in range(12):
        asked: dict[str, Any] = {
            "max_new_tokens": 9,
            "num_draft_tokens": 8,
            "temperature": 1.2,
            "rule": rule,
            "seed": seed,
        }
        expected = single(engine, PROMPTS[:4], **asked)
        found = engine.generate(PROMPTS[:4], **asked)
        assert found.token_ids == expected.token_ids
        assert found.stats.num_draft_tokens == expected.stats.num_draft_tokens
    assert counted.rounds > 12


def test_a_stream_gives_out_every_round(counted: Counted) -> None:
    target, draft = models()
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    asked: dict[str, Any] = {"max_new_tokens": 40, "num_draft_tokens": 3}
    expected = engine.generate(PROMPTS[:2], **asked).token_ids
    pieces = list(engine.stream(PROMPTS[:2], **asked))
    assert [[t for p in pieces if p.index == i for t in p.token_ids] for i in range(2)] == expected
    assert max(len(piece.token_ids) for piece in pieces) <= 4
    assert counted.calls > 2


@pytest.mark.parametrize(
    "settings",
    [
        {"logprobs": True}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "top_k": 5},
        {"temperature": [0.0, 1.0], "num_draft_tokens": 0},
    ],
)  # fmt: skip
def test_who_wants_to_look_is_let(settings: dict[str, Any], counted: Counted, single: Callable[..., Output]) -> None:
    target, draft = models()
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    asked = {"max_new_tokens": 20, "num_draft_tokens": 3, "seed": 1, **settings}
    assert engine.generate(PROMPTS[:2], **asked).token_ids == single(engine, PROMPTS[:2], **asked).token_ids
    assert not counted.calls


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_law_fails_alone(temperature: float, count: int, counted: Counted) -> None:
    """Token 40 has an embedding of NaN; what follows it cannot be drawn."""
    target, draft = models()
    with torch.no_grad():
        target.embed_tokens.weight[40] = torch.nan
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "num_draft_tokens": count, "seed": 5}
    found = engine.generate([*PROMPTS[:3], [40]], **asked, on_error="return")
    assert isinstance(found.errors[3], ModelError)
    for index, row in enumerate(found.token_ids[:3]):
        assert (found.errors[index] is None) == (40 not in row[:-1] and len(row) == 40)
    assert counted.calls


def test_a_draft_that_came_too_far_behind_reads_first(counted: Counted, single: Callable[..., Output]) -> None:
    """Plain rounds leave the draft model behind; and one with a short context looks at the end of the text only."""
    target, _ = models()
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(noisy(tiny_gpt(0, context=32)))))
    asked: dict[str, Any] = {"max_new_tokens": 60, "num_draft_tokens": 3}
    expected = single(engine, PROMPTS[:2], **asked).token_ids
    assert engine.generate(PROMPTS[:2], **asked).token_ids == expected
    assert counted.in_windows > 4
    plain = engine.generate(PROMPTS[:2], **{**asked, "num_draft_tokens": 0})
    assert plain.token_ids == expected
    assert engine.generate(PROMPTS[:2], **{**asked, "num_draft_tokens": "auto"}).token_ids == expected


def test_a_hybrid_learns_from_rounds_what_single_steps_teach(
    counted: Counted, single: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a lookup finds nothing; ``counted`` holds back no round."""
    monkeypatch.setattr(SuffixDrafter, "look", lambda self, rows, most: [NOTHING] * len(rows))
    target, draft = models()
    told = 0

    def counting(found: Experience, rows: Any, drafted: Any, accepted: Any) -> None:
        nonlocal told
        told += sum(map(sum, drafted)) + 100 * sum(map(sum, accepted))
        count_chains(found, rows, drafted, accepted)

    count_chains = Experience.count_chains
    monkeypatch.setattr(Experience, "count_chains", counting)
    drafter = HybridDrafter(ModelDrafter(CpuLM(draft)), SuffixDrafter())
    given = {"max_new_tokens": 40, "num_draft_tokens": 3, "temperature": 1.0, "rule": "coupled"}
    for way in (single, Engine.generate):
        told = 0
        output = way(Engine(CpuLM(target), drafter), PROMPTS, **given)
        assert told == output.stats.num_draft_tokens + 100 * output.stats.num_accepted_tokens > 100
        assert not list(drafter.experience)
    assert counted.drafted > 100


def test_a_text_longer_than_the_context_goes_on(counted: Counted, single: Callable[..., Output]) -> None:
    target, draft = tiny_gpt(0, context=32), noisy(tiny_gpt(0, context=32))
    engine = Engine(CpuLM(target), ModelDrafter(CpuLM(draft)))
    for count in (0, 2):
        asked: dict[str, Any] = {"max_new_tokens": 90, "num_draft_tokens": count}
        expected = single(engine, PROMPTS[:2], **asked)
        assert engine.generate(PROMPTS[:2], **asked).token_ids == expected.token_ids
    assert counted.rounds > 20


@pytest.mark.parametrize("num_draft_tokens", [3, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_runs_ahead_where_a_lookup_finds_nothing(
    temperature: float, num_draft_tokens: int | str, counted: Counted, single: Callable[..., Output]
) -> None:
    target, draft = models()
    prompts = [[*text, 1, 2, 3, 4, 1, 2, 3] for text in PROMPTS[:3]]  # of which the lookup knows how they go on
    asked: dict[str, Any] = {"max_new_tokens": 60, "temperature": temperature, "seed": 3}
    expected = single(Engine(CpuLM(target)), prompts, **asked)
    engine = Engine(CpuLM(target), HybridDrafter(ModelDrafter(CpuLM(draft)), SuffixDrafter()))
    for _ in range(3):
        found = engine.generate(prompts, **asked, num_draft_tokens=num_draft_tokens)
        assert found.token_ids == expected.token_ids
    assert counted.rounds
    if num_draft_tokens == 3:
        assert counted.drafted and counted.rounds <= 8 * counted.calls


def test_what_depends_on_drafts_is_drawn_step_by_step_where_they_depend_on_looks(
    counted: Counted, single: Callable[..., Output]
) -> None:
    target, draft = models()
    engine = Engine(CpuLM(target), HybridDrafter(ModelDrafter(CpuLM(draft)), SuffixDrafter()))
    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "rule": "rejection", "num_draft_tokens": 3}
    expected = single(engine, PROMPTS[:2], **asked, seed=3).token_ids
    assert engine.generate(PROMPTS[:2], **asked, seed=3).token_ids == expected
    assert not counted.drafted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_kernels_of_a_gpu_run_ahead_without_drafts(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pytest.importorskip("specdec.lm.cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = tiny_gpt(0).to(device)
    asked: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 2, "num_draft_tokens": 0}
    expected = Engine(NativeLM(target)).generate(PROMPTS[:2], **asked).token_ids
    monkeypatch.setattr(ahead_module, "_MOST_SECONDS", 1e9)
    counted = Counted(monkeypatch, cuda.CudaLM)
    assert Engine(cuda.CudaLM(target)).generate(PROMPTS[:2], **asked).token_ids == expected
    assert counted.rounds >= 8


def test_slow_models_are_not_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads along would wait for it."""
    counted = Counted(monkeypatch)
    monkeypatch.setattr(ahead_module, "_MOST_SECONDS", 1e-9)
    Engine(CpuLM(models()[0])).generate(PROMPTS[:2], max_new_tokens=20)
    assert not counted.calls


@pytest.mark.parametrize(
    ("taken", "beginning"),
    [([5.0, 3.0, 1.0, 1.0], 6.0), ([4.0, 1.0, 1.0], 3.0), ([1.0], 0.0), ([1.0, 2.0], 0.0), ([], 0)],
)
def test_first_rounds_take_longer_by_what_later_ones_do_not(taken: list[float], beginning: float) -> None:
    assert _beginning(np.array(taken)) == beginning


def test_whoever_chooses_lengths_is_told_what_settled_rounds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a second is said to go into beginning each time, of three."""
    given: list[tuple[float, float]] = []
    played_any: list[bool] = []

    class Told(FixedLength):
        def observe(self, steps: Any, draft_seconds: float, step_seconds: float, overhead: float = 0.0) -> None:
            if played_any:
                played_any.clear()
                given.append((draft_seconds + step_seconds, overhead))

    play = CpuLM.play

    def played(lm: CachedLM, asked: Rounds, draft: CachedLM | None) -> Played | None:
        found = play(lm, asked, draft)  # type: ignore[arg-type]
        played_any.extend([True] * (found is not None))
        return None if found is None else found._replace(seconds=3.0, beginning=1.0)

    monkeypatch.setattr(CpuLM, "play", played)
    monkeypatch.setattr(ahead_module, "_MOST_SECONDS", 1e9)
    target, draft = models()
    for count in (0, 4):
        monkeypatch.setattr(Engine, "controller", lambda *given, count=count, greedy: Told(count))
        given.clear()
        Engine(CpuLM(target), ModelDrafter(CpuLM(draft))).generate(PROMPTS[:2], max_new_tokens=40)
        assert given and all(2.0 <= seconds < 2.5 and overhead < 0 for seconds, overhead in given)
