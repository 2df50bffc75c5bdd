"""Run the benchmarks, print one table, write benchmarks/results/generate.json with the machine described.

python benchmarks/run.py        (or: make bench)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specdec.machine import machine

HERE = Path(__file__).parent
COLUMNS = {"method": "{}", "batch": "{}", "temperature": "{:g}", "tokens_per_second": "{:.0f}",
           "ratio_to_plain": "{:.2f}x", "acceptance_rate": "{:.0%}", "mean_acceptance_length": "{:.2f}",
           "overhead_share": "{:.0%}"}  # fmt: skip
HEADINGS = ("method", "batch", "T", "tokens/s", "ratio", "accepted", "length", "bookkeeping")


def main() -> int:
    """Benchmarks' exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-enable", "--benchmark-only", "--timeout=0",
                   f"--benchmark-json={report}", "--benchmark-columns=median,iqr,rounds"]  # fmt: skip
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
        cells = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    rows = sorted((cell["extra_info"] for cell in cells), key=lambda row: (row["temperature"], row["batch"]))
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in COLUMNS.items()))
    Console().print(table)
    (HERE / "results").mkdir(exist_ok=True)
    figures = {"machine": machine(), "cells": rows}
    (HERE / "results/generate.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
