"""Rows on their way into the batch: they wait for a place, their prompts are read, a bounded part each round.

Live rows have the first slots. A prompt read in one pass is read in the slot behind them, where its row stays. One that
takes several passes is read in the last slot that is free, out of everybody's way, and moves once, when it is done.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable

from specdec.draft import Drafter
from specdec.lm.base import FILL_TOKENS, CachedLM, catch_up, window_start
from specdec.sequences import Row, Sequences

PREFILL_TOKENS = 512  # of prompts, padding included, that rows which decode wait for in a round
PASS_TOKENS = 64  # a pass over fewer takes about as long: padding costs nothing up to here, and no smaller part is read


class Admission:
    """The rows of a call that are not live yet, and what makes them so.

    Up to ``places`` rows, live ones included, are under way at a time, in the order of the prompts. Of these the one
    with the fewest unread tokens is read first, so that no short prompt waits for a long one. Samples of a prompt wait
    for the first of them and copy what it has read.
    """

    def __init__(
        self, rows: Iterable[Row], places: int, sequences: Sequences, target: CachedLM, drafter: Drafter | None
    ) -> None:
        self.places, self.sequences, self.target, self.drafter = places, sequences, target, drafter
        self._waiting = deque(rows)
        self._unread: list[Row] = []  # without a slot, shortest first
        # In the slots places - 1, places - 2, ... A row begins only if it is shorter than what is left of those that
        # have begun, so the last of them is always the first to end, and its slot the one nearest to the live rows.
        self._begun: list[Row] = []
        self._siblings: list[Row] = []

    def __len__(self) -> int:
        return len(self._waiting) + self._under_way

    @property
    def _under_way(self) -> int:
        return len(self._unread) + len(self._begun) + len(self._siblings)

    def admit(self) -> list[Row]:
        """One round of reading; the rows that went live. Live rows whose cache is behind are read anew at once."""
        live = len(self.sequences)
        catch_up(self.target, [row.tokens for row in self.sequences.rows], self.sequences.starts, slack=1)
        self._join()
        budget = PREFILL_TOKENS if live else FILL_TOKENS
        while budget >= PASS_TOKENS and (self._begun or self._unread):
            # What is ready by now waits for short prompts, which then decode beside it, and for no long one.
            limit = min(budget, PREFILL_TOKENS) if len(self.sequences) else budget
            count = self._read(limit)
            budget = budget - count if count < limit else 0
        return self.sequences.rows[live:]

    def _join(self) -> None:
        """Waiting rows take the places that are free."""
        free = self.places - len(self.sequences) - self._under_way
        joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        if not joining:
            return
        live = {row.request.sample_of: slot for slot, row in enumerate(self.sequences.rows)}
        reading = {row.request.sample_of for row in (*self._begun, *self._unread)}
        for row in joining:
            sample = row.request.sample_of
            if sample is not None and sample in live and self.target.starts[live[sample]] == self._start(row):
                self._share_prompt(live[sample], row)
            elif sample is not None and sample in reading:
                self._siblings.append(row)
            else:
                reading.add(sample)
                insort(self._unread, row, key=self._length)

    def _read(self, limit: int) -> int:
        """One pass over at most ``limit`` tokens, padding included; how many it took."""
        if not self._next_has_begun:
            rows = self._alike(limit)
            if rows:
                return self._read_whole(rows)
            row = self._unread.pop(0)
            self._begun.append(row)
            self._seat(row, self._begun_slot)
        return self._read_part(limit)

    @property
    def _next_has_begun(self) -> bool:
        """Whether the row with the fewest unread tokens has read some already."""
        if not self._begun or not self._unread:
            return bool(self._begun)
        return len(self._rest(self._begun[-1], self._begun_slot)) <= self._length(self._unread[0])

    def _alike(self, limit: int) -> list[Row]:
        """The shortest rows, as many as one pass reads to their ends with little padding.

        Rows that begin alike are not read side by side: the second reuses what the first has read.
        """
        count = total = 0
        begins: set[tuple[int, ...]] = set()
        for row in self._unread:
            length, begin = self._length(row), self._new_begin(row)
            cells, total = length * (count + 1), total + length
            if cells > limit or cells - total > PASS_TOKENS or begin in begins:
                break
            begins |= {begin} - {()}
            count += 1
        return self._unread[:count]

    def _new_begin(self, row: Row) -> tuple[int, ...]:
        """The first tokens of a row, if others could reuse them once they are read, and cannot yet."""
        begin = tuple(row.tokens[: self.target.reused_tokens])
        if self._start(row) or self._length(row) < len(begin) or self.target.knows(begin):
            return ()
        return begin

    def _read_whole(self, rows: list[Row]) -> int:
        del self._unread[: len(rows)]
        first = len(self.sequences)
        for slot, row in enumerate(rows, first):
            self._seat(row, slot)
        texts = [self._rest(row, slot) for slot, row in enumerate(rows, first)]
        self.target.fill(texts, first=first)
        self._go_live(rows)
        return len(rows) * max(map(len, texts))

    def _read_part(self, limit: int) -> int:
        """Go on with the row that began last."""
        slot = self._begun_slot
        text = self._rest(self._begun[-1], slot)
        self.target.fill([text[:limit]], first=slot)
        if len(text) <= limit:
            first = len(self.sequences)
            if slot != first:
                self.target.copy(slot, first)
                self.target.forget(slot)
            self._go_live([self._begun.pop()])
        return min(len(text), limit)

    @property
    def _begun_slot(self) -> int:
        return self.places - len(self._begun)

    def _rest(self, row: Row, slot: int) -> list[int]:
        """What the row in ``slot`` has to read before it goes live."""
        return row.tokens[self.target.starts[slot] + self.target.lengths[slot] : -1]

    def _seat(self, row: Row, slot: int) -> None:
        self.target.restart(slot, self._start(row))
        self.target.enter(slot, row.request.source)
        if self.target.starts[slot] == 0:
            self.target.recall(slot, row.tokens[:-1])

    def _go_live(self, rows: list[Row]) -> None:
        """These rows have read their prompts, in the slots behind the live ones; so have their siblings then."""
        leaders = {row.request.sample_of: slot for slot, row in enumerate(rows, len(self.sequences))}
        self.sequences.rows.extend(rows)
        for slot, row in enumerate(rows, len(self.sequences) - len(rows)):
            self.target.remember(slot, row.tokens)
        siblings = self._siblings
        self._siblings = [row for row in siblings if row.request.sample_of not in leaders]
        for row in siblings:
            if row.request.sample_of in leaders:
                self._share_prompt(leaders[row.request.sample_of], row)

    def _share_prompt(self, leader: int, row: Row) -> None:
        """A new row takes the prompt that a live sample of the same prompt has read."""
        slot, length = len(self.sequences), len(row.request.prompt) - 1
        self.target.copy(leader, slot, length - self.target.starts[leader])
        if self.drafter is not None:
            self.drafter.copy(leader, slot, length)
        self.sequences.rows.append(row)

    def _start(self, row: Row) -> int:
        return window_start(len(row.tokens), self.sequences.context)

    def _length(self, row: Row) -> int:
        """How many tokens a row without a slot has to read before it goes live."""
        return len(row.tokens) - 1 - self._start(row)
