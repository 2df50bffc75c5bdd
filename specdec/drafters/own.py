"""The target guesses for itself, in a cheaper way, and shares its cache with that: no second model, nothing to train.

Weights rounded to bytes halve what a pass reads; a window of the latest tokens (and the first ones) spares it most of a
long text; skipped layers spare it part of the model (draft and verify: Zhang et al. 2023, arXiv 2309.08168; SWIFT: Xia et
al. 2024, arXiv 2410.06916; sparse cache: TriForce, Sun et al. 2024, arXiv 2404.11912).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.model import ModelDrafter
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.view import CpuView
from specdec.sequences import Sequences, Step

SAMPLE_TOKENS, PREFIX_TOKENS = 48, 64  # of the text that tells which layers can be spared, and of what comes before it
LONGEST_DRAFT = 8  # that is thought of then
WINDOW = 256  # tokens at the end of a text that drafts look at, besides the first ones


class SelfDrafter(ModelDrafter):
    """Drafts with a ``CpuView`` of the target, which has read all of a row but its last token at any time."""

    lm: CpuView

    def __init__(
        self,
        target: CachedLM,
        *,
        in_bytes: bool = True,
        window: int | None = WINDOW,
        layers: list[int] | None = None,
    ) -> None:
        """Raises ``ConfigError`` for a target that is not one of our compiled ones, or lacks these ``layers``."""
        if not isinstance(target, CpuLM):
            raise ConfigError(
                f"only a model that specdec has compiled for this processor can draft for itself, and {type(target).__name__} "
                'is not; load its checkpoint by path, or take draft="suffix"'
            )
        count = target.config.num_hidden_layers
        if layers is not None and (
            not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < count
        ):
            raise ConfigError(f"layers must be some of 0 to {count - 1} in rising order, got {layers}")
        if window is not None and window < 1:
            raise ConfigError(f"window must be a number of tokens >= 1 or None, got {window}")
        super().__init__(CpuView(target, layers=layers, in_bytes=in_bytes, window=window))

    def observe(self, step: Step) -> None:
        self.lm.release()

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Nothing to do: the cache is the target's."""

    def free(self, rows: int) -> None:
        """The cache is the target's, but for what was drafted in a step that was interrupted."""
        self.lm.release()

    def _new_tokens(self, sequences: Sequences, count: int) -> tuple[Tensor, list[int]]:
        self._count, self._unread = count, [1] * len(sequences)
        return sequences.last_tokens, self._unread

    def _texts(self, sequences: Sequences) -> list[list[int]]:
        raise AssertionError("what was committed has been read")


@torch.inference_mode()
def spared_layers(target: CachedLM, text: Sequence[int]) -> list[int]:
    """The layers to draft with: those that are left after sparing, one by one, the layer that is missed least.

    As many are spared as promise most tokens per time on ``text`` (at least a few dozen tokens), whose likeliest next
    tokens by fewer layers are compared with those by all. The target must be idle, and is left so.
    """
    drafter = SelfDrafter(target, in_bytes=False, window=None)  # says what is wrong with the target
    lm, read = drafter.lm, list(text[: PREFIX_TOKENS + SAMPLE_TOKENS])
    if len(read) < SAMPLE_TOKENS:
        raise ConfigError(f"the sample text must have at least {SAMPLE_TOKENS} tokens, got {len(read)}")
    target.reserve(1, len(read))
    lm.reserve(1, len(read))
    target.fill([read[:-SAMPLE_TOKENS]]) if len(read) > SAMPLE_TOKENS else None
    sample = torch.tensor([read[-SAMPLE_TOKENS:]])
    expected = target.append(sample).argmax(-1)
    target.keep([0])

    def agreement(layers: Sequence[int]) -> float:
        view = CpuView(lm, layers=layers)
        view.reserve(1, len(read))
        return float((view.append(sample).argmax(-1) == expected).float().mean())

    count = lm.config.num_hidden_layers
    kept, best, most = list(range(count)), list(range(count)), 1.0
    while len(kept) > 1:
        found = [(agreement([*kept[:i], *kept[i + 1 :]]), i) for i in range(len(kept))]
        rate, i = max(found)
        del kept[i]
        gain = _gain(rate, len(kept) / count)
        if gain > most:
            best, most = [*kept], gain
    target.free(0)
    return best


def _gain(rate: float, cost: float) -> float:
    """Tokens per time of the best draft length, to plain decoding; a drafted token costs ``cost`` passes (Leviathan 2023)."""
    return max(sum(rate**i for i in range(k + 1)) / (1 + k * cost) for k in range(LONGEST_DRAFT + 1))
