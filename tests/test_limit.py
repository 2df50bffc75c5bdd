"""The machine's limit counts the weights that a step reads, each once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from specdec import limit
from specdec.checkpoints import load_lm
from specdec.limit import Limit, read_bandwidth, weight_bytes
from specdec.lm import base
from specdec.nn import cpu
from toys import tiny_gpt


class Model(nn.Module):
    """A table of 10 x 4 and a head of its shape, perhaps the same."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=True)
        if tied:
            self.head.weight = self.table.weight


@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_embeddings_are_not_read_unless_they_are_the_head_too(tied: bool) -> None:
    model = Model(tied=tied)
    assert weight_bytes(model) == (10 * 4 + 10) * 4
    assert weight_bytes(model.to(torch.bfloat16)) == (10 * 4 + 10) * 2


def test_a_loaded_model_knows_what_a_pass_reads_although_its_weights_are_packed(tiny_pair: Path) -> None:
    gpt = tiny_gpt()
    linear = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, nn.Linear))
    norms = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, nn.RMSNorm))
    assert load_lm(gpt).weight_bytes == 4 * (linear + norms)
    whole, half = (load_lm(tiny_pair / "target", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert whole.weight_bytes == 2 * half.weight_bytes > 0


def test_the_limit_is_bandwidth_over_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limit(30e9, 10_000_000).passes_per_second == 3000
    seconds = iter([2.0, 0.5, 1.0])
    monkeypatch.setattr(limit, "_BUFFER", {"cpu": 4000})
    monkeypatch.setattr(limit, "_TRIES", 3)
    monkeypatch.setattr(limit, "_seconds", lambda buffer: next(seconds) * buffer.numel() / 1000)
    assert read_bandwidth(torch.device("cpu")) == 8000  # of the fastest read
    monkeypatch.undo()
    monkeypatch.setattr(limit, "_BUFFER", {"cpu": 1 << 20})
    assert read_bandwidth(torch.device("cpu")) > 0


def test_a_model_on_cpu_reads_as_fast_as_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's sums do not reach what memory gives; a limit that passes exceed would be none."""
    monkeypatch.setattr(cpu, "_LARGE", (64, 128))
    monkeypatch.setattr(limit, "_BUFFER", {"cpu": 4096})
    assert cpu.read_bandwidth() > 0
    lm = load_lm(tiny_gpt())
    for compiled, read in ((7.0, 5.0), (5.0, 7.0)):
        monkeypatch.setattr(cpu, "read_bandwidth", lambda compiled=compiled: compiled)
        monkeypatch.setattr(base, "read_bandwidth", lambda device, read=read: read)
        assert lm.read_bandwidth() == 7.0
