"""Logits processors and stopping criteria of one row, along a drafted block.

A processor may read the text before a position, may know which row of the batch it speaks of, and may remember what it
was called with. Each must see, for every verified position, exactly the prefix, the place and the history of calls that
plain decoding would have given it; what it learnt from refused positions is forgotten.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from specdec.sampling import Filters

# Those of transformers that remember calls; all its others are functions of their arguments.
REMEMBERING = ("SynthIDTextWatermarkLogitsProcessor",)
# Those that do not read the text, so that a whole batch can go through them at once.
TEXT_BLIND = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
)


@dataclass(frozen=True)
class Processing:
    """What a caller brings for one row instead of ``SamplingParams``: processors, then filters; and criteria.

    head: what stands before the new tokens as processors and criteria see it (the prompt, with its padding).
    place: the row's index in its batch, and the size of that batch.
    """

    head: tuple[int, ...]
    processors: LogitsProcessorList
    filters: Filters
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    place: tuple[int, int] = (0, 1)


def split(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Those up to the last that reads the text, and the rest; applying both in turn is applying all."""
    blind = len(processors)
    while blind > 0 and _from_transformers(processors[blind - 1], TEXT_BLIND):
        blind -= 1
    return LogitsProcessorList(processors[:blind]), LogitsProcessorList(processors[blind:])


class RowProcessors:
    """The processors of one row; see the text of the module. ``head`` are the tokens before its new ones."""

    def __init__(self, processors: LogitsProcessorList, head: Sequence[int], place: tuple[int, int] = (0, 1)) -> None:
        self._remembering = any(_remembers(processor) for processor in processors)
        self._committed = [_fork(processor) if _remembers(processor) else processor for processor in processors]
        self._committed = [_of_row(processor, place[0]) for processor in self._committed]
        self._states: list[list[Any]] = []
        self._draft = self._committed
        self._head, self._place = list(head), place

    def __bool__(self) -> bool:
        return len(self._committed) > 0

    def verify(self, new_tokens: Sequence[int], drafted: Tensor, logits: Tensor) -> Tensor:
        """Logits [T, V], processed, of the positions after ``new_tokens`` and ``drafted[:t]``; drafted is [K], T > K.

        Ends behind a drafted token that is forbidden: it will be refused, and no processor should have to make sense of
        a text that cannot be.
        """
        self._states = [self._committed]
        text = torch.cat([torch.tensor([*self._head, *new_tokens], device=logits.device), drafted.to(logits.device)])
        first = len(text) - len(drafted)
        result = logits.clone()
        for t in range(len(drafted) + 1):
            self._states.append(self._next(self._states[-1]))
            result[t] = self._apply(self._states[-1], text[: first + t], logits[t])
            if t < len(drafted) and not result[t, drafted[t]] > -math.inf:
                break
        return result

    def draft(self, new_tokens: Sequence[int], drafted: Tensor, logits: Tensor) -> Tensor:
        """Processed logits [V] of a drafter's next position, after all of ``drafted``; called for one after another."""
        self._draft = self._next(self._draft if len(drafted) else self._committed)
        text = torch.tensor([*self._head, *new_tokens], device=logits.device)
        return self._apply(self._draft, torch.cat([text, drafted.to(text)]), logits)

    def commit(self, count: int) -> None:
        """``count`` of the positions that ``verify`` saw became text."""
        self._committed = self._states[count]
        self._states = []

    def _next(self, state: list[Any]) -> list[Any]:
        if not self._remembering:
            return state
        return [_fork(processor) if _remembers(processor) else processor for processor in state]

    def _apply(self, processors: list[Any], text: Tensor, logits: Tensor) -> Tensor:
        scores, index, batch = logits[None], *self._place
        for processor in processors:
            if _knows_its_place(processor, batch):
                scores = processor(text.expand(batch, -1).clone(), scores.expand(batch, -1).clone())[index, None]
            else:
                scores = processor(text[None], scores)
        return scores[0]


class RowCriteria:
    """The stopping criteria of one row, asked after every token that enters its text."""

    def __init__(
        self, criteria: StoppingCriteriaList, head: Sequence[int], place: tuple[int, int], device: torch.device
    ) -> None:
        self._criteria = [one if _from_transformers(one) else _fork(one) for one in criteria]
        self._head, self._place, self._device = list(head), place, device

    def __bool__(self) -> bool:
        return len(self._criteria) > 0

    def met(self, new_tokens: Sequence[int]) -> bool:
        """Whether the text ends here. All are asked, because some remember being asked."""
        index, batch = self._place
        text = torch.tensor([[*self._head, *new_tokens]], device=self._device).expand(batch, -1)
        answers = [torch.as_tensor(one(text.clone(), None)).expand(batch)[index] for one in self._criteria]
        return any(bool(answer) for answer in answers)


def _remembers(processor: Any) -> bool:
    return not _from_transformers(processor) or _from_transformers(processor, REMEMBERING)


def _knows_its_place(processor: Any, batch: int) -> bool:
    """Whether it may treat the rows of a batch differently: it is the user's, or it holds something for each row."""
    if batch == 1:
        return False
    held = getattr(processor, "__dict__", {}).values()
    return not _from_transformers(processor) or any(
        isinstance(value, Tensor | list) and _length(value) == batch for value in held
    )


def _length(value: Tensor | list[Any]) -> int:
    return 0 if isinstance(value, Tensor) and value.dim() == 0 else len(value)


def _from_transformers(part: Any, names: Sequence[str] | None = None) -> bool:
    """Whether ``part`` is the library's own, and one of ``names`` if given; a subclass of the user's is not."""
    return type(part).__module__.startswith("transformers.") and (names is None or type(part).__name__ in names)


def _fork(part: Any) -> Any:
    """A copy with a memory of its own; models and tokenizers, large and not changed by reading, are shared."""
    shared = [value for value in getattr(part, "__dict__", {}).values() if isinstance(value, _SHARED)]
    return copy.deepcopy(part, {id(value): value for value in shared})


_SHARED = (nn.Module, PreTrainedTokenizerBase)


def _of_row(processor: Any, index: int) -> Any:
    """A processor that asks a user's function about rows, by their index, asks about row ``index`` only."""
    if type(processor) is not logits_process.PrefixConstrainedLogitsProcessor:
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return logits_process.PrefixConstrainedLogitsProcessor(lambda _, text: allowed(index, text), num_beams=1)
