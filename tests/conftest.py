"""Shared set-up: one thread and drafts of a given length, so that results do not depend on the machine; toys on the path."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from specdec import draft
from specdec.controller import AUTO, DEFAULT_DRAFT_TOKENS, Controller
from specdec.engine import Engine

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="specdec-tests-")  # measurements of toys are of no use later


@pytest.fixture(autouse=True)
def _drafts_of_four(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft four tokens where a call leaves the length open: drafts of toys do not pay, and none would prove nothing.

    Tests marked ``chosen`` have the product's own choice.
    """
    if request.node.get_closest_marker("chosen") is not None:
        return
    choose = Engine.controller

    def fixed(self: Engine, num_draft_tokens: int | str, *, greedy: bool) -> Controller:
        return choose(self, DEFAULT_DRAFT_TOKENS if num_draft_tokens == AUTO else num_draft_tokens, greedy=greedy)

    monkeypatch.setattr(Engine, "controller", fixed)


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws that a drafter reports are taken as they are: a test of texts must notice by itself what is planted there."""
    monkeypatch.setattr(draft, "_are_laws", lambda probs, tokens: True)
