"""The rows of a batch: their tokens, laws and random streams, and the only place that cuts at EOS, stop and length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec import draws
from specdec.draft import Draft
from specdec.errors import ModelError, SpecDecError
from specdec.lm.base import window_start
from specdec.processors import Processing, RowCriteria, RowProcessors
from specdec.sampling import (
    GREEDY,
    Randomness,
    SamplingParams,
    filtered,
    filters,
    laws,
    prefix_processors,
    same_filters,
)
from specdec.text import TextStream
from specdec.verify import Verdict


@dataclass(frozen=True)
class Request:
    """One row to generate: validated, in token ids, independent of every other row.

    ``max_length`` counts prompt and new tokens; beyond the model's context the row keeps its most recent tokens only.
    ``sample_of`` names requests that share a prompt (and its prefill). ``processing`` takes the place of ``params``.
    ``source`` is what the encoder of an encoder-decoder reads, see ``CachedLM.enter``.
    """

    prompt: tuple[int, ...]
    max_length: int
    params: SamplingParams = GREEDY
    seed: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    sample_of: int | None = None
    processing: Processing | None = None
    source: Any = None

    @property
    def greedy(self) -> bool:
        """Whether every law of this row is one-hot."""
        return self.processing.filters.greedy if self.processing else self.params.greedy


class Row:
    """A request under way."""

    _ids = itertools.count()

    def __init__(self, request: Request, index: int, text: TextStream | None, device: torch.device) -> None:
        self.id = next(Row._ids)
        self.request, self.index, self.text = request, index, text
        self.tokens = list(request.prompt)
        self.logprobs: list[float] = []
        self.from_draft: list[bool] = []
        self.finish_reason: str | None = None
        self.error: SpecDecError | None = None
        given = request.processing or processing_of(request, device)
        self.filters = given.filters
        self.processors = RowProcessors(given.processors, given.head, given.place)
        self._criteria = RowCriteria(given.criteria, given.head, given.place, device)
        self.raw_logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.runs_alone = not (self.processors or self._criteria or request.stop)  # nothing else reads its text

    @property
    def new_tokens(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def remaining(self) -> int:
        """How many tokens may still come."""
        return self.request.max_length - len(self.tokens)

    def commit(self, tokens: Sequence[int], accepted: int) -> int:
        """Enter tokens until one ends the row; return how many entered. The first ``accepted`` came from the draft."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            self.from_draft.append(i < accepted)
            stopped = self.text.push(token) if self.text is not None else False
            if token in self.request.eos_ids:
                self.finish("eos")
            elif stopped or (self._criteria and self._criteria.met(self.new_tokens)):
                self.finish("stop")
            elif self.remaining == 0:
                self.finish("length")
            if self.finish_reason is not None:
                return i + 1
        return len(tokens)

    def finish(self, reason: str) -> None:
        """End the row."""
        self.finish_reason = reason
        if self.text is not None:
            self.text.finish()

    def fail(self, error: SpecDecError) -> None:
        """End the row with an error; its neighbours go on."""
        self.error = error
        self.finish("error")


@dataclass(frozen=True)
class Step:
    """What one round did: per live row the tokens proposed, accepted and entered, and the rows it ended.

    ``retried`` rows met NaN or infinity in a pass that read drafts. A refused token may be to blame, so nothing entered:
    their caches are read anew, and the next step drafts nothing. Of trees, ``paths`` are the places of the accepted
    tokens among those proposed, and ``depths`` how many could have been accepted; ``drafted`` counts all of them. Without
    drafts a round may be of several ``passes``. ``is_first``: something was prepared for it that others like it will find.
    """

    rows: list[Row]
    drafted: list[int]
    accepted: list[int]
    committed: list[int]
    finished: list[int] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)
    paths: list[list[int]] | None = None
    depths: list[int] | None = None
    passes: int = 1
    is_first: bool = False


class Sequences:
    """The live rows, in slots 0 .. B-1, as one batch of tensors. With ``record`` rows keep their logits and scores."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context: int,
        device: torch.device,
        coupled: bool,
        logprobs: bool,
        record: bool = False,
        trees: bool = False,
    ) -> None:
        self.rows: list[Row] = []
        self.vocab_size, self.context, self.device = vocab_size, context, device
        self.coupled, self._logprobs, self._record, self._trees = coupled, logprobs, record, trees

    def __len__(self) -> int:
        return len(self.rows)

    def begin_step(self) -> None:
        """Gather what a step needs of its rows; what of it a GPU must know goes there when it is asked for."""
        columns = zip(*((row.tokens[-1], row.request.seed, len(row.tokens)) for row in self.rows), strict=True)
        self._columns = self._placed = torch.tensor(list(columns), dtype=torch.long)
        self._is_placed = self.device.type == "cpu"
        self._randomness: Randomness | None = None
        self.filters = same_filters([row.filters for row in self.rows])
        self.greedy = all(by.greedy for by in self.filters)
        self._reads_prefix = [b for b, row in enumerate(self.rows) if row.processors]

    @property
    def last_tokens(self) -> Tensor:
        """Each row's last token, [B, 1]."""
        return self._on_device()[0].unsqueeze(1)

    @property
    def last_tokens_here(self) -> Tensor:
        """The same on the processor."""
        return self._columns[0].unsqueeze(1)

    @property
    def keys_here(self) -> tuple[Tensor, Tensor]:
        """Seeds and lengths [B] of the rows, which random numbers are made of, on the processor."""
        return self._columns[1], self._columns[2]

    @property
    def randomness(self) -> Randomness:
        """The step's random numbers."""
        if self._randomness is None:
            _, seeds, text_lengths = self._on_device()
            self._randomness = Randomness(seeds, text_lengths, coupled=self.coupled, constant=self.greedy)
        return self._randomness

    def _on_device(self) -> Tensor:
        """Last tokens, seeds and lengths, [3, B]: the one host-to-device copy of a step."""
        if not self._is_placed:
            self._placed, self._is_placed = self._columns.to(self.device, non_blocking=True), True
        return self._placed

    @property
    def runs_alone(self) -> bool:
        """Whether nobody wants to see logits or to change them, and rows end by their tokens and lengths alone."""
        return not (self._logprobs or self._record) and all(row.runs_alone for row in self.rows)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end one of the rows."""
        return sorted(frozenset().union(*(row.request.eos_ids for row in self.rows)))

    @property
    def only_largest(self) -> bool:
        """Whether the largest of a drafter's own logits is all that is asked for."""
        return self.greedy and not self._reads_prefix

    @property
    def takes_trees(self) -> bool:
        """Whether a draft may branch: the target reads trees, and no processor wants to know what came before."""
        return self._trees and not self._reads_prefix

    @property
    def starts(self) -> list[int]:
        """Where each row's window begins: 0 unless it outgrew the context."""
        return [window_start(len(row.tokens), self.context) for row in self.rows]

    def draft_limits(self) -> list[int]:
        """The most tokens each row may draft: a step ends with one more, and a window must not hop inside a block."""
        windows = zip(self.rows, self.starts, strict=True)
        return [min(row.remaining - 1, start + self.context - len(row.tokens)) for row, start in windows]

    def fit(self, logits: Tensor) -> Tensor:
        """Logits [..., W] as float32 [..., V] on the batch's device; ids that pad the head are cut, lacking ones -inf.

        Sizes of embedding tables are often rounded up, and differently for target and draft. float32 comes first,
        because reductions over bfloat16 are several times slower on CPU.
        """
        if logits.shape[-1] > self.vocab_size:
            logits = logits[..., : self.vocab_size]
        logits = logits.to(self.device, torch.float32)
        missing = self.vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def process(self, logits: Tensor, draft: Draft) -> Tensor:
        """Scores [B, K+1, V]: logits after the processors that read the text; kept where they are asked for.

        Position t follows the row's text and its first t draft tokens; processors see exactly that prefix.
        """
        if self._reads_prefix:
            logits = logits.clone()
            counts = draft.lengths.tolist()
        for b in self._reads_prefix:
            row = self.rows[b]
            logits[b] = row.processors.verify(row.new_tokens, draft.tokens[b, : counts[b]], logits[b])
        self._processed = logits if self._record else None
        return logits

    def draft_laws(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Laws [B, 1, V] of a drafter's logits [B, 1, V] of the position after ``drafted`` [B, i], one after another."""
        if self._reads_prefix:
            logits = logits.clone()
        for b in self._reads_prefix:
            row = self.rows[b]
            logits[b, 0] = row.processors.draft(row.new_tokens, drafted[b], logits[b, 0])
        return laws(logits, self.filters)

    def drawing(self, laws: Tensor) -> draws.Drawing | None:
        """How a drafter draws tokens at once and fills their ``laws`` [B, K, V]; None where it takes more than that."""
        temperatures = self.temperatures
        if self._reads_prefix or temperatures is None:
            return None
        return draws.Drawing(temperatures, *self.keys_here, laws, coupled=self.coupled)

    @property
    def temperatures(self) -> list[float] | None:
        """What the rows' logits are divided by, if that is all that makes laws of them."""
        found = [by.temperature for by in (row.filters for row in self.rows) if by.temperature is not None]
        return found if len(found) == len(self.rows) else None

    def commit(self, logits: Tensor, is_sound: Tensor, draft: Draft, verdict: Verdict) -> Step:
        """Enter accepted tokens and the next one into every row; the step's one device-to-host synchronisation.

        ``is_sound`` [B]: whether tokens could be drawn everywhere. Logprobs are those of ``logits``, before any filter.
        """
        table = _to_host(verdict.accepted, draft.lengths, is_sound, verdict.next_token, draft.tokens)
        logprobs = self._committed_logprobs(logits, draft, verdict) if self._logprobs else None
        accepted = [count if sound else 0 for count, sound in zip(table[0], table[2], strict=True)]
        step = Step(list(self.rows), table[1], accepted, [])
        for b, (row, count, sound, next_token, drafted) in enumerate(zip(self.rows, accepted, *table[2:], strict=True)):
            if not sound and not drafted:
                row.fail(_no_law(row))
            step.committed.append(row.commit([*drafted[:count], next_token], count) if sound else 0)
            if row.processors:
                row.processors.commit(step.committed[b])
            if self._processed is not None:
                row.raw_logits.append(logits[b, : step.committed[b]].clone())  # the rest of the pass is not kept
                row.scores.append(filtered(self._processed[b, : step.committed[b]], row.filters))
            if logprobs is not None:
                row.logprobs.extend(logprobs[b][: step.committed[b]])
            if row.finish_reason is not None:
                step.finished.append(b)
            elif not sound:
                step.retried.append(b)
        return step

    def enter(
        self,
        tokens: Sequence[Sequence[int]],
        drafted: Sequence[int],
        accepted: Sequence[int],
        passes: int = 1,
        is_first: bool = False,
    ) -> Step:
        """What ``commit`` does, for a round that has been decided: its tokens [B][n], drafted and accepted [B]."""
        given = zip(self.rows, tokens, accepted, strict=True)
        committed = [row.commit(own, count) for row, own, count in given]
        finished = [b for b, row in enumerate(self.rows) if row.finish_reason is not None]
        return Step(
            list(self.rows), list(drafted), list(accepted), committed, finished, passes=passes, is_first=is_first
        )

    def remove(self, slots: Sequence[int], copy: Callable[[int, int], None]) -> None:
        """Drop the rows in ``slots``; the last rows move into the holes through ``copy(source, target)``."""
        gone = set(slots)
        kept = [b for b in range(len(self.rows)) if b not in gone]
        holes = [b for b in sorted(gone) if b < len(kept)]
        movers = [b for b in kept if b >= len(kept)]
        for source, target in zip(movers, holes, strict=True):
            copy(source, target)
            self.rows[target] = self.rows[source]
        del self.rows[len(kept) :]

    def _committed_logprobs(self, logits: Tensor, draft: Draft, verdict: Verdict) -> list[list[float]]:
        """The target's own log-probability (before filters) of the accepted tokens and the next one, per row."""
        accepted = verdict.accepted.unsqueeze(1)
        tokens = torch.nn.functional.pad(draft.tokens, (0, 1)).scatter(1, accepted, verdict.next_token.unsqueeze(1))
        found: list[list[float]] = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        return found


def _to_host(*columns: Tensor) -> list[list[Any]]:
    """Columns [B] and a table [B, K], the last one, as lists, in one transfer."""
    if columns[0].is_cpu:
        return [column.tolist() for column in columns]
    *single, table = columns
    lines = torch.cat([torch.stack([column.long() for column in single], dim=1), table], dim=1).tolist()
    count = len(single)
    return [*([line[i] for line in lines] for i in range(count)), [line[count:] for line in lines]]


def processing_of(request: Request, device: torch.device) -> Processing:
    """What the request's ``params`` say."""
    head, params = request.prompt, request.params
    processors = prefix_processors(params, len(head), sorted(request.eos_ids), device)
    return Processing(head, processors, filters(params))


def _no_law(row: Row) -> ModelError:
    return ModelError(
        f"no next token can be drawn for request {row.index} after {len(row.new_tokens)} new tokens: the target's "
        "logits, after the row's processors, are NaN, +inf or all -inf. Expected finite numbers for some tokens and "
        "-inf for the others. Check the weights, use float32 instead of float16, or loosen repetition_penalty and "
        "min_new_tokens"
    )
