"""What a comparison found, for people and programs: report.json, report.md, report.png and report.html."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench import PARTS, PLAIN, Measurement, kind_of_text
from specdec.limit import Limit
from specdec.machine import machine
from specdec.picture import draw_sweep

NAME = "report"
COLUMNS = ("way", "tokens/s", "to plain", "accepted", "length", "accepted by position", *PARTS)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
tr.best {{ font-weight: bold; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
{lines}
<img alt="speed by draft length, time by part, acceptance by position" src="data:image/png;base64,{picture}">
{tables}
</body></html>
"""


def write_figures(file: Path, figures: Mapping[str, Any]) -> None:
    """A study's figures as JSON, with the machine they were made on; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Report:
    """Measurements of a sweep, what they were made on, and how far the machine could go."""

    title: str
    measurements: Sequence[Measurement]
    machine: dict[str, Any]
    settings: dict[str, Any]
    limit: Limit | None = None

    def write(self, directory: Path) -> None:
        """All four files into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        picture = directory / f"{NAME}.png"
        draw_sweep(self.measurements, picture, self.title)
        texts = {
            "json": json.dumps(self.as_dict(), indent=1) + "\n",
            "md": self.as_markdown(picture.name),
            "html": self.as_html(picture.read_bytes()),
        }
        for form, text in texts.items():
            (directory / f"{NAME}.{form}").write_text(text, encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "machine": self.machine,
            "settings": self.settings,
            "limit": self.limit and self.limit.as_dict(),
            "measurements": [m.as_dict() for m in self.measurements],
        }

    def lines(self) -> list[str]:
        """What there is to say in sentences: the fastest of every cell, and the distance to the machine's limit."""
        found = []
        for batch, temperature in self._cells():
            best = self._fastest(batch, temperature)
            name, ratio = best.method, f", {best.speedup:.2f}x plain decoding"
            if name == PLAIN:
                name, ratio = "plain decoding", ""
            speed = f"{best.tokens_per_second:.0f} tokens/s"
            found.append(f"Batch {batch}, {kind_of_text(temperature)}: {name} is fastest, {speed}{ratio}.")
        return [*found, *self._limit_lines()]

    def _limit_lines(self) -> list[str]:
        if self.limit is None:
            return []
        limit = (
            f"Limit: memory gives {self.limit.bytes_per_second / 1e9:.1f} GB/s and a pass reads "
            f"{self.limit.weight_bytes / 1e6:.1f} MB of weights, so {self.limit.passes_per_second:.0f} passes/s at most."
        )
        found = [limit]
        for m in self.measurements:
            if m.passes_per_second is not None and m.bytes_per_pass is not None:
                found.append(
                    f"Plain decoding, batch {m.batch}, {kind_of_text(m.temperature)}: {m.passes_per_second:.0f} passes/s, "
                    f"{self.limit.weight_bytes / m.bytes_per_pass:.0%} of the limit."
                )
        return found

    def as_markdown(self, picture: str) -> str:
        """Sentences, the picture and a table for every batch size and temperature."""
        parts = [f"# {self.title}", "\n".join(f"- {line}" for line in self.lines()), f"![speed]({picture})"]
        for batch, temperature in self._cells():
            rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells_of(m) for m in self._of(batch, temperature))]
            table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
            parts.append(f"## Batch {batch}, {kind_of_text(temperature)}\n\n{table}")
        return "\n\n".join([*parts, self._made_on()]) + "\n"

    def as_html(self, picture: bytes) -> str:
        """One page that needs no other file."""
        tables = ""
        for batch, temperature in self._cells():
            best = self._fastest(batch, temperature)
            rows = _html_row("th", COLUMNS)
            rows += "".join(_html_row("td", _cells_of(m), best=m is best) for m in self._of(batch, temperature))
            tables += f"<h2>Batch {batch}, {kind_of_text(temperature)}</h2>\n<table>{rows}</table>\n"
        return _PAGE.format(
            title=html.escape(self.title),
            lines="".join(f"<p>{html.escape(line)}</p>\n" for line in self.lines()),
            picture=base64.b64encode(picture).decode(),
            tables=f"{tables}<p>{html.escape(self._made_on())}</p>",
        )

    def _made_on(self) -> str:
        known = {**self.machine, **self.settings}
        return "Measured on " + ", ".join(f"{name}: {value}" for name, value in known.items() if value is not None)

    def _cells(self) -> list[tuple[int, float]]:
        return list(dict.fromkeys(m.cell for m in self.measurements))

    def _of(self, batch: int, temperature: float) -> list[Measurement]:
        return [m for m in self.measurements if m.cell == (batch, temperature)]

    def _fastest(self, batch: int, temperature: float) -> Measurement:
        return max(self._of(batch, temperature), key=lambda m: m.tokens_per_second)


def _cells_of(m: Measurement) -> tuple[str, ...]:
    positions = " ".join(f"{rate:.0%}" for rate in m.acceptance_rate_per_position)
    shares = [getattr(m, field) for field in PARTS.values()]
    return (
        m.method,
        f"{m.tokens_per_second:.1f}",
        f"{m.speedup:.2f}x",
        "-" if m.acceptance_rate is None else f"{m.acceptance_rate:.0%}",
        "-" if m.mean_acceptance_length is None else f"{m.mean_acceptance_length:.2f}",
        positions or "-",
        *("-" if share is None else f"{share:.0%}" for share in shares),
    )


def _html_row(kind: str, cells: Sequence[str], *, best: bool = False) -> str:
    inner = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
    return f'<tr class="best">{inner}</tr>\n' if best else f"<tr>{inner}</tr>\n"
