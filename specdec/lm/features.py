"""What chosen layers of a model put out for the tokens it has committed, until a drafter takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


class Features:
    """Per slot, outputs [n, F] of tokens read in the passes since ``keep``, and of committed ones not yet taken."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self._pending: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._committed: defaultdict[int, list[Tensor]] = defaultdict(list)

    def add(self, slot: int, outputs: Tensor) -> None:
        """Tokens were read, and may be refused."""
        self._pending[slot].append(outputs)

    def keep(self, slot: int, path: Sequence[int]) -> None:
        """Of the tokens read, those at the places ``path`` stay."""
        read = self._pending.pop(slot, [])
        if not path or not read:
            return
        outputs = read[0] if len(read) == 1 else torch.cat(read)
        is_leading = isinstance(path, range) or list(path) == list(range(len(path)))
        self._committed[slot].append(outputs[: len(path)].clone() if is_leading else outputs[list(path)])

    def take(self, slot: int, missing: Tensor) -> Tensor:
        """Everything committed since the last time; ``missing`` if that is nothing."""
        parts = self._committed.pop(slot, [missing])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def held(self, slot: int) -> list[Tensor]:
        """What was committed and not yet taken, in parts."""
        return self._committed.get(slot, [])

    def hold(self, slot: int, outputs: Tensor, *, anew: bool) -> None:
        """Tokens were read and committed, behind what is held or (``anew``) in its place."""
        if anew:
            self._committed.pop(slot, None)
        if len(outputs):
            self._committed[slot].append(outputs)

    def whole(self, slot: int, length: int) -> Tensor | None:
        """[length, F] of all ``length`` tokens of a row; None if some were taken."""
        parts = self._committed.get(slot, [])
        if not parts or sum(map(len, parts)) != length:
            return None
        self._committed[slot] = [parts[0] if len(parts) == 1 else torch.cat(parts)]
        return self._committed[slot][0]

    def copy(self, source: int, target: int, fewer: int) -> None:
        """Slot ``target`` becomes slot ``source`` without its last ``fewer`` tokens."""
        parts = self._committed.get(source)
        self.drop(target)
        if parts:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._committed[target] = [whole[: max(0, len(whole) - fewer)]]

    def drop(self, slot: int) -> None:
        """The row in ``slot`` is no more."""
        self._pending.pop(slot, None)
        self._committed.pop(slot, None)
