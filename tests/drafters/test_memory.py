"""What a thousand requests leave behind: nothing, whoever drafts."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest
import torch

from specdec import Engine
from specdec.draft import Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.own import SelfDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.lm.base import CachedLM
from specdec.lm.paged import PagedCache
from specdec.nn.block import BlockHead
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.sequences import Step
from toys import native, noisy, tiny_gpt

REQUESTS, WARM_UP = 1000, 250
MOST_GROWTH = 60_000  # bytes, of 750 requests: caches of small things that are still filling


class Leaking(SuffixDrafter):
    """Keeps what it has seen of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def observe(self, step: Step) -> None:
        self.seen += [list(step.rows[slot].tokens) for slot in step.finished]
        super().observe(step)


DRAFTERS: dict[str, Callable[[GPT, CachedLM], Drafter]] = {
    "model": lambda target, lm: ModelDrafter(native(noisy(target, 0.02))),
    "tree": lambda target, lm: TreeDrafter(native(noisy(target, 0.02))),
    "suffix": lambda target, lm: SuffixDrafter(),
    "hybrid": lambda target, lm: HybridDrafter(ModelDrafter(native(noisy(target, 0.02))), SuffixDrafter()),
    "self": lambda target, lm: SelfDrafter(lm),
    "eagle3": lambda target, lm: Eagle3Drafter(Eagle3Head.for_target(target), lm),
    "block": lambda target, lm: BlockDrafter(BlockHead.for_target(target), lm),
}


def tensor_bytes() -> int:
    """Of all storages that are reachable (of packed weights none can be asked for)."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_mkldnn]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def growth(make: Callable[[GPT, CachedLM], Drafter], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """By how many bytes tensors and Python's objects grow from the 250th request to the 1,000th."""
    monkeypatch.setattr(
        PagedCache, "remember", lambda *given: None
    )  # what is remembered of finished texts has a bound of its own
    target = tiny_gpt(0)
    lm = native(target)
    engine = Engine(lm, make(target, lm))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (int(torch.randint(1, 9, (), generator=draw)),), generator=draw).tolist()
               for _ in range(REQUESTS)]  # fmt: skip

    def serve(begin: int, end: int) -> tuple[int, int]:
        lengths = [1 + i % 4 for i in range(begin, end)]
        engine.generate(
            prompts[begin:end], max_new_tokens=lengths, temperature=[float(i % 2) for i in lengths],
            num_draft_tokens=3, max_batch_size=16,
        )  # fmt: skip
        return tensor_bytes(), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = serve(0, WARM_UP)
        after = serve(WARM_UP, REQUESTS)
    finally:
        tracemalloc.stop()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("name", list(DRAFTERS))
def test_a_thousand_requests_leave_memory_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(growth(DRAFTERS[name], monkeypatch)) <= MOST_GROWTH


def test_the_test_notices_a_drafter_that_keeps_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(growth(lambda target, lm: Leaking(), monkeypatch)) > MOST_GROWTH
