"""A report says what was measured: the same figures in every form, and a page that needs no other file."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from specdec.bench import Measurement
from specdec.limit import Limit
from specdec.picture import COLOURS, _acceptance_by_position, _acceptance_lines, _speed_by_length
from specdec.report import Report


def measured(method: str, speed: float, temperature: float = 0.0, **given: object) -> Measurement:
    family, _, length = method.partition(" ")
    number = "auto" if length == "auto" else int(length.removeprefix("k=") or 0)
    return Measurement(
        method, 1, temperature, speed, speed / 10, speed, speed, 3, family=family, num_draft_tokens=number,
        **given,  # type: ignore[arg-type]
    )  # fmt: skip


def report() -> Report:
    shares = {"prefill_share": 0.1, "draft_share": 0.2, "verify_share": 0.65, "overhead_share": 0.05}
    found = [
        measured("plain", 10.0, passes_per_second=25.0, bytes_per_pass=4e7, mean_acceptance_length=1.0, **shares),
        measured("<b>|x auto", 20.0, acceptance_rate=0.75, acceptance_rate_per_position=[0.9, 0.6], **shares),
        measured("<b>|x k=2", 15.0, acceptance_rate=0.5, acceptance_rate_per_position=[0.8, 0.2], **shares),
        measured("HF", 5.0),
        measured("plain", 12.0, temperature=1.0),
        measured("HF", 5.0, temperature=1.0),
    ]
    return Report("a & b", found, {"cores": 2}, {"rounds": 3}, Limit(1e9, 10_000_000))


def test_all_forms_are_written_and_hold_the_figures(tmp_path: Path) -> None:
    report().write(tmp_path / "new" / "folder")
    files = {file.name: file for file in (tmp_path / "new/folder").iterdir()}
    assert sorted(files) == ["report.html", "report.json", "report.md", "report.png"]
    figures = json.loads(files["report.json"].read_text())
    assert [m["tokens_per_second"] for m in figures["measurements"]] == [10, 20, 15, 5, 12, 5]
    assert figures["limit"] == {"bytes_per_second": 1e9, "weight_bytes": 10_000_000, "passes_per_second": 100}
    assert (figures["machine"], figures["settings"]) == ({"cores": 2}, {"rounds": 3})
    markdown = files["report.md"].read_text()
    assert r"| <b>\|x auto | 20.0 | 2.00x | 75% | - | 90% 60% | 10% | 20% | 65% | 5% |" in markdown
    assert "| HF | 5.0 | 0.50x | - | - | - | - | - | - | - |" in markdown
    assert "## Batch 1, greedy" in markdown and "## Batch 1, T=1" in markdown
    page = files["report.html"].read_text()
    assert "<td>90% 60%</td>" in page and "&lt;b&gt;|x auto" in page and "<b>|x" not in page and "a &amp; b" in page
    assert page.count('<tr class="best">') == 2
    pictures = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(pictures) == 1 and pictures[0].startswith("data:image/png;base64,")
    assert base64.b64decode(pictures[0].split(",")[1]) == files["report.png"].read_bytes()


def test_sentences_name_the_fastest_and_the_distance_to_the_limit() -> None:
    assert report().lines() == [
        "Batch 1, greedy: <b>|x auto is fastest, 20 tokens/s, 2.00x plain decoding.",
        "Batch 1, T=1: plain decoding is fastest, 12 tokens/s.",
        "Limit: memory gives 1.0 GB/s and a pass reads 10.0 MB of weights, so 100 passes/s at most.",
        "Plain decoding, batch 1, greedy: 25 passes/s, 25% of the limit.",
    ]


def ticks(axes: Axes) -> list[float]:
    """Those in view."""
    low, high = axes.get_xlim()
    return [place for place in axes.get_xticks() if low <= place <= high]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_positions_are_whole_numbers(count: int) -> None:
    found = [measured(f"x k={k}", 10.0, acceptance_rate_per_position=[0.5] * k) for k in (count, 1)]
    _, (one, other) = plt.subplots(1, 2)
    _acceptance_by_position(one, found, {"x": COLOURS[0]})
    _acceptance_lines(other, {"here": found}, dict.fromkeys([m.method for m in found], COLOURS[0]))
    for axes in (one, other):
        assert ticks(axes) and all(place == int(place) and 1 <= place <= count for place in ticks(axes))
        assert axes.get_xlim()[1] > count
    plt.close()


def test_auto_is_a_length_only_where_it_was_measured() -> None:
    for methods, expected in ((["plain", "x k=2"], "012"), (["plain", "x k=2", "x auto"], ["0", "1", "2", "auto"])):
        _, axes = plt.subplots()
        _speed_by_length(axes, [measured(name, 10.0) for name in methods], {"plain": COLOURS[0], "x": COLOURS[1]})
        assert [label.get_text() for label in axes.get_xticklabels()] == list(expected)
        plt.close()
