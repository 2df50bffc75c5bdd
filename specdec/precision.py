"""Models run in the precision they were loaded in, also where the caller has asked torch for mixed precision."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

Made = TypeVar("Made")

_KINDS = ("cpu", "cuda")


def is_mixed() -> bool:
    """Whether torch would compute in another precision than asked for."""
    return any(map(torch.is_autocast_enabled, _KINDS))


@contextmanager
def own_precision() -> Iterator[None]:
    """Compute in the precision of what is computed with."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _KINDS):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def each_in_own_precision(made: Generator[Made]) -> Iterator[Made]:
    """What a generator makes, each in its own precision; whoever takes it goes on as they were."""
    try:
        while True:
            with own_precision():
                found = next(made, None)
            if found is None:
                return
            yield found
    finally:
        made.close()
