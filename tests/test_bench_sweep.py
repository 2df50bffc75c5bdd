"""A sweep runs every drafter at every length, each on the batches that it takes, and knows which is which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from specdec import Stats, sweep
from specdec.bench import Method, Run
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError, PeerError
from specdec.sweep import Way, engines, lengths_of, measure, own_ways


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["auto", "1..3"], ["auto", 1, 2, 3]),
        (["5", "2", "5", "auto", "auto"], [5, 2, "auto"]),
        (["4..4"], [4]),
    ],
)
def test_lengths_are_numbers_ranges_or_auto(given: list[str], found: list[int | str]) -> None:
    assert lengths_of(given) == found


@pytest.mark.parametrize("given", ["many", "3..1", "1..", "-1", "", "0", "1000"])
def test_other_lengths_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="k must be"):
        lengths_of([given])


def test_every_drafter_is_there_alone_and_with_the_lookup(tiny_pair: Path) -> None:
    draft = str(tiny_pair / "draft")
    plain, drafting = engines(str(tiny_pair / "target"), [draft, "suffix", draft])
    kinds = {name: (one.draft, type(one.engine.drafter)) for name, one in drafting.items()}
    assert kinds == {
        "draft": ((draft,), ModelDrafter),
        "draft + lookup": ((draft, "suffix"), HybridDrafter),
        "lookup": (("suffix",), SuffixDrafter),
    }
    assert all(one.engine.target is plain.target for one in drafting.values()) and plain.drafter is None
    assert sweep.first_model(drafting) == draft and sweep.first_model({"lookup": drafting["lookup"]}) is None
    names = [way.name for way in own_ways(plain, drafting, ["auto", 2], 4)]
    own = [f"{name} {length}" for name in drafting for length in ("auto", "k=2")]
    assert names == ["plain", *own]


def test_names_that_would_not_tell_ways_apart_are_paths(tiny_pair: Path) -> None:
    other = tiny_pair.parent / "other-pair" / "draft"
    other.parent.mkdir(exist_ok=True)
    if not other.exists():
        other.symlink_to(tiny_pair / "draft")
    _, drafting = engines(str(tiny_pair / "target"), [str(tiny_pair / "draft"), str(other)])
    assert list(drafting)[::2] == [str(tiny_pair / "draft"), str(other), "lookup"]


def recorded(calls: list[tuple[float, list[int]]], seconds: float) -> Callable[[float], Method]:
    def at(temperature: float) -> Method:
        def run(prompts: Sequence[Sequence[int]]) -> Run:
            calls.append((temperature, [prompt[0] for prompt in prompts]))
            stats = Stats(num_generated_tokens=2 * len(prompts), num_row_steps=len(prompts), total_seconds=1.0)
            return Run([[7, 7] for _ in prompts], seconds, stats)

        return run

    return at


def test_cells_run_whole_batches_and_keep_out_what_refuses_them() -> None:
    plain: list[tuple[float, list[int]]] = []
    single: list[tuple[float, list[int]]] = []
    ways = [Way("plain", 0, recorded(plain, 2.0)), Way("HF", 3, recorded(single, 1.0), largest_batch=1)]
    found = measure(
        ways, [[1], [2], [3]], batches=[1, 2], temperatures=[0.0, 0.5], rounds=1, console=Console(file=StringIO())
    )
    assert [(m.method, m.batch, m.temperature, m.speedup) for m in found] == [
        ("plain", 1, 0.0, 1), ("HF k=3", 1, 0.0, 2), ("plain", 2, 0.0, 1),
        ("plain", 1, 0.5, 1), ("HF k=3", 1, 0.5, 2), ("plain", 2, 0.5, 1),
    ]  # fmt: skip
    assert [(m.family, m.num_draft_tokens) for m in found[:2]] == [("plain", 0), ("HF", 3)]
    one_by_one = [(0.0, [1]), (0.0, [2]), (0.0, [3])]
    assert plain[:10] == [*one_by_one * 2, *[(0.0, [1, 2]), (0.0, [3, 1])] * 2]
    assert single[:6] == one_by_one * 2 and {len(rows) for _, rows in single} == {1}


def test_a_peer_that_fails_is_left_out_whenever_it_does() -> None:
    calls: list[int] = []

    def failing(prompts: Sequence[Sequence[int]]) -> Run:
        calls.append(1)
        if len(calls) == 2:
            raise PeerError("out of memory")
        return Run([[7, 7] for _ in prompts], 1.0)

    ways = [Way("plain", 0, recorded([], 1.0)), Way("Peer", 0, lambda temperature: failing)]
    with pytest.warns(UserWarning, match="Peer is left out: out of memory"):
        found = measure(ways, [[1]], batches=[1], temperatures=[0.0], rounds=3, console=Console(file=StringIO()))
    assert [(m.method, m.rounds) for m in found] == [("plain", 3)] and len(calls) == 2
