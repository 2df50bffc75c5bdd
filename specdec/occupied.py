"""Models and drafters hold rows of one call at a time; engines may share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from specdec.draft import Drafter
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM

_LOCK = Lock()
_OCCUPIED: set[int] = set()  # ids of those that a call under way uses, and so keeps alive


@contextmanager
def occupied(target: CachedLM, drafter: Drafter | None) -> Iterator[None]:
    """Keep a target, and a drafter with its model, for the block. Raises ``ConfigError`` if another call has one of them."""
    inner = getattr(drafter, "model", drafter)  # of a hybrid, the drafter that runs one
    parts = {id(part) for part in (target, drafter, inner, getattr(inner, "lm", None)) if part is not None}
    with _LOCK:
        if parts & _OCCUPIED or any(target.lengths):
            raise ConfigError(
                "this model is in the middle of a stream, or of a call in another thread or callback; finish or close that "
                "before the next call: models hold the rows of one call at a time"
            )
        _OCCUPIED.update(parts)
    try:
        yield
    finally:
        _OCCUPIED.difference_update(parts)
