"""The loop: draft, verify in one pass, accept, commit. Batched, ragged, with rows that come and go.

Plain decoding is this loop with no draft tokens; there is no second program.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec import tree, verify
from specdec.admission import Admission
from specdec.ahead import Ahead
from specdec.control import Adaptive
from specdec.controller import Controller, FixedLength
from specdec.costs import Costs, read_costs, write_costs
from specdec.draft import Draft, Drafter, propose, tell
from specdec.encoded import encoded_requests
from specdec.errors import GenerationError, SpecDecError
from specdec.graphs import Graphs
from specdec.judge import judge, judge_tree
from specdec.lm.base import CachedLM
from specdec.occupied import occupied
from specdec.output import Output, Piece
from specdec.precision import each_in_own_precision, is_mixed
from specdec.requests import Limits, Prompts, Settings, build_requests
from specdec.rounds import Played
from specdec.sequences import Request, Row, Sequences, Step
from specdec.stats import Stats, Stopwatch
from specdec.text import TextStream, decode

_KINDS = ("greedy", "sampled")
_WRITE_SECONDS = 30.0  # at least between two writings of measured costs


class Engine:
    """A target, perhaps a drafter, and the loop over them. Keeps models and caches between calls.

    Not thread-safe: one call at a time, because rows live in the models' caches.
    """

    def __init__(
        self,
        target: CachedLM,
        drafter: Drafter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        costs_file: Path | None = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.limits = Limits(vocab_size or target.vocab_size, target.context, eos_ids)
        self.graphs, self.ahead = Graphs(target.device), Ahead(target)
        self._costs_file, self._costs_written = costs_file, 0.0
        self._controllers: dict[str, Adaptive] = {}

    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: Tensor | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        **settings: Any,
    ) -> Output:
        """Generate for every prompt; ``settings`` are those of ``specdec.Settings``.

        prompts: text, texts, token ids, lists of them, or a padded tensor with its ``attention_mask`` (also as the
        mapping that a tokenizer returns). ``on_piece`` is called with each ``Piece`` of text as soon as it is certain.
        Raises a ``SpecDecError`` before any model runs when something given is wrong; ``GenerationError`` at the end,
        with all results in it, when a row failed on the way. With ``on_error="return"`` both are in ``errors``.
        """
        call = self._call(prompts, attention_mask, settings, streaming=on_piece is not None)
        for piece in call.pieces() if on_piece is not None else call.quietly():
            if on_piece is not None:
                on_piece(piece)
        output = call.output()
        failed = [error for error in output.errors if error is not None]
        if failed and call.settings.on_error == "raise":
            raise GenerationError(f"{len(failed)} of {len(output.errors)} rows failed; first: {failed[0]}", output)
        return output

    def stream(self, prompts: Prompts, *, attention_mask: Tensor | None = None, **settings: Any) -> Iterator[Piece]:
        """Like ``generate``, as an iterator of ``Piece``; a row that fails ends with reason "error"."""
        return self._call(prompts, attention_mask, settings, streaming=True).pieces()

    def call(self, requests: list[Request | SpecDecError], settings: Settings, *, record: bool = False) -> Call:
        """A run of requests made elsewhere; ``record`` keeps every row's logits and scores."""
        return Call(self, requests, settings, streaming=False, record=record)

    def controller(self, num_draft_tokens: int | str, *, greedy: bool) -> Controller:
        """What decides draft lengths; the one that measures is kept, apart for greedy calls and sampling."""
        if self.drafter is None:
            return FixedLength(0)
        if isinstance(num_draft_tokens, int):
            return FixedLength(num_draft_tokens)
        if not self._controllers:
            known = read_costs(self._costs_file) if self._costs_file is not None else {}
            self._controllers = {name: Adaptive(known.get(name) or Costs()) for name in _KINDS}
        return self._controllers["greedy" if greedy else "sampled"]

    def keep_costs(self) -> None:
        """Write down what was measured, for other programs; not after every short call."""
        now = time.monotonic()
        if self._costs_file is None or not self._controllers or now - self._costs_written < _WRITE_SECONDS:
            return
        self._costs_written = now
        try:
            write_costs(self._costs_file, {name: control.costs for name, control in self._controllers.items()})
        except OSError as error:  # a full or read-only disk costs what was measured, never a text
            warnings.warn(f"measured costs are not kept in {self._costs_file}: {error}", stacklevel=2)
            self._costs_file = None

    def _call(self, prompts: Prompts, attention_mask: Tensor | None, given: dict[str, Any], *, streaming: bool) -> Call:
        settings = Settings.of(given)
        self.target.check_weights()
        if self.target.encodes:
            requests = encoded_requests(prompts, attention_mask, settings, self.limits, self.tokenizer, self.target)
        else:
            requests = build_requests(prompts, attention_mask, settings, self.limits, self.tokenizer)
        errors = [request for request in requests if isinstance(request, SpecDecError)]
        if errors and settings.on_error == "raise":
            raise errors[0]
        return Call(self, requests, settings, streaming)


class Call:
    """One run of the loop: its rows, on their way in, live and finished, and what it counted."""

    def __init__(
        self,
        engine: Engine,
        requests: list[Request | SpecDecError],
        settings: Settings,
        streaming: bool,
        record: bool = False,
    ) -> None:
        self.engine, self.requests, self.settings = engine, requests, settings
        self.target, self.drafter = engine.target, engine.drafter
        greedy = all(request.greedy for request in requests if isinstance(request, Request))
        self.controller = engine.controller(settings.num_draft_tokens, greedy=greedy)
        self.rule = verify.RULES[settings.rule_name]
        self.stats = Stats()
        self.plain_next = False
        self.sequences = Sequences(
            vocab_size=engine.limits.vocab_size,
            context=engine.limits.context,
            device=self.target.device,
            coupled=settings.rule_name == "coupled",
            logprobs=settings.logprobs,
            record=record,
            trees=getattr(self.drafter, "drafts_trees", False) and self.target.reads_trees,
        )
        self.rows = {
            index: Row(request, index, self._text(request, streaming), self.target.device)
            for index, request in enumerate(requests)
            if isinstance(request, Request)
        }
        places = min(settings.max_batch_size, len(self.rows))
        self.admission = Admission(self.rows.values(), places, self.sequences, self.target, self.drafter)

    def steps(self) -> Iterator[Step]:
        """Run to the end, one step at a time. However it ends, the models' caches are left empty."""
        with occupied(self.target, self.drafter):
            yield from each_in_own_precision(self._steps()) if is_mixed() else self._steps()

    def _steps(self) -> Generator[Step]:
        self.controller.decisions = self.stats.control
        started, forward = time.perf_counter(), self.target.forward_seconds
        drafting = _model_seconds(self.drafter)
        try:
            self._reserve()
            while len(self.admission) or len(self.sequences):
                self._admit()
                if not len(self.sequences):
                    continue  # there is more to read before anything can decode
                for step in self._step():
                    self._release(step)
                    self.stats.total_seconds = time.perf_counter() - started
                    yield step
        finally:
            self._empty()
            self.engine.keep_costs()
            self.stats.total_seconds = time.perf_counter() - started
            self.stats.verify_seconds = self.target.forward_seconds - forward - self.stats.prefill_seconds
            self.stats.draft_seconds = _model_seconds(self.drafter) - drafting

    def _step(self) -> Iterator[Step]:
        """One round, or several where nobody has to look in between."""
        self.sequences.begin_step()
        lengths, rounds = self._choose()
        watch, before, prepared = Stopwatch(), _model_seconds(self.drafter), Graphs.preparations
        played = self.engine.ahead.play(self.sequences, self.drafter, lengths, rounds, self.settings.rule_name)
        if played is not None:
            yield from self._enter(played, any(lengths), Graphs.preparations > prepared, watch, before)
            return
        step, proposing = self._single(lengths)
        # A GPU drafts while the host goes on: what it took is known by now. Lookups count as part of the step.
        drafting = _model_seconds(self.drafter) - before
        step = replace(step, is_first=Graphs.preparations > prepared)
        tell(self.drafter, [step])
        self._observe([step], max(drafting, proposing) if drafting > 0 else 0.0, watch.lap())
        yield step

    def _enter(
        self, played: Played, drafts: bool, is_first: bool, watch: Stopwatch, drafted_before: float
    ) -> Iterator[Step]:
        """Enter rounds that were played, one after the other; those without drafts are one step of several passes.

        watch runs since before they were played; drafted_before: what the drafter had spent in a model by then.
        """
        passes = 1 if drafts else len(played.tokens)
        played = played if drafts else played.at_once()
        steps: list[Step] = []
        seconds = played.seconds - played.beginning  # without those of whoever takes the steps
        overhead, settled = watch.lap() - seconds, seconds / played.seconds
        for tokens, drafted, accepted in played.rounds():
            steps.append(self.sequences.enter(tokens, drafted, accepted, passes, is_first))
            if len(steps) == 1:  # all that was guessed in a text was guessed for this one
                tell(self.drafter, steps)
            elif len(steps) == len(played.tokens):
                tell(self.drafter, steps[1:])
            seconds += watch.lap()
            if len(steps) == len(played.tokens):
                self._observe(steps, settled * (_model_seconds(self.drafter) - drafted_before), seconds, overhead)
            yield steps[-1]
            watch.lap()

    def _choose(self) -> tuple[list[int], int]:
        """How much to draft for every row, and for how many rounds."""
        nothing = [0] * len(self.sequences)
        if self.plain_next:
            return nothing, 1
        if self.drafter is None:
            return nothing, self.controller.holds
        return self.controller.choose(self.sequences, self.drafter), self.controller.holds

    @torch.inference_mode()
    def _single(self, lengths: list[int]) -> tuple[Step, float]:
        """A round, and the seconds that making its draft took of the host."""
        sequences, watch = self.sequences, Stopwatch()
        if self.drafter is None or not any(lengths):
            draft = Draft.empty(len(sequences), sequences.device)
        else:
            draft = propose(self.drafter, sequences, lengths)
        proposing = watch.lap()
        step = self._read(draft)
        self.plain_next = bool(step.retried)
        return step, proposing

    def _observe(self, steps: list[Step], drafting: float, seconds: float, overhead: float = 0.0) -> None:
        """Count rounds that took so long in all, ``drafting`` included, and tell who decides about the next ones.

        ``overhead``: seconds beyond them that it took to begin, however many rounds there are.
        """
        for step in steps:
            self._count(step)
        if not steps[0].is_first:
            self.engine.ahead.observe(any(steps[0].drafted), seconds / sum(step.passes for step in steps))
        self.controller.observe(steps, drafting, seconds - drafting, overhead)

    def _read(self, draft: Draft) -> Step:
        """One pass over a draft, judged, and what it leaves entered."""
        sequences, is_plain = self.sequences, draft.tokens.shape[1] == 0
        tokens = sequences.last_tokens_here if is_plain else torch.cat([sequences.last_tokens, draft.tokens], dim=1)
        # Elsewhere asking for the lengths would be one more synchronisation; padding is then read as well.
        counts = (draft.lengths + 1).tolist() if draft.lengths.is_cpu else None
        logits = sequences.fit(self.target.append(tokens, counts, parents=tree.nodes_of(draft)))
        if draft.parents is None:
            verdict, is_sound = judge(sequences, self.rule, logits, draft, self.engine.graphs)
            step = sequences.commit(logits, is_sound, draft, verdict)
            self.target.keep([1 + accepted for accepted in step.accepted])
        else:
            step = self._commit_tree(logits, draft)
        for slot in step.retried:
            self.target.forget(slot)
        return step

    def _commit_tree(self, logits: Tensor, draft: Draft) -> Step:
        """What ``judge``, commit and keep are for a chain; logits [B, K + 1, V] by node."""
        sequences = self.sequences
        path, nodes, is_sound = judge_tree(sequences, logits, draft)
        followed, chain, verdict = tree.along(path, logits, draft)
        step = sequences.commit(followed, is_sound, chain, verdict)
        places = [own[:count] for own, count in zip(path.places.tolist(), step.accepted, strict=True)]
        counts = [1 + accepted for accepted in step.accepted]
        self.target.keep(counts, paths=[[0, *(place + 1 for place in own)] for own in places])
        return replace(step, paths=places, depths=nodes.depths.amax(1).tolist())

    @torch.inference_mode()
    def _admit(self) -> None:
        """Waiting rows take free places, a part of what they must read is read, and those that are done go live."""
        before = self.target.forward_seconds
        ready = self.admission.admit()
        self.stats.prefill_seconds += self.target.forward_seconds - before
        self.stats.num_requests += len(ready)
        self.stats.num_prompt_tokens += sum(len(row.request.prompt) for row in ready)

    def _release(self, step: Step) -> None:
        """Finished rows leave; the last live rows take their slots."""
        if not step.finished:
            return
        live = len(self.sequences)
        for slot in step.finished:
            if step.rows[slot].error is None:  # what broke must not be reused
                self.target.remember(slot, step.rows[slot].tokens)
        self.sequences.remove(step.finished, self._copy)
        for slot in range(len(self.sequences), live):
            self.target.forget(slot)
        if self.drafter is not None:
            self.drafter.free(len(self.sequences))  # of rows that are not live it has read nothing

    def _copy(self, source: int, target: int) -> None:
        self.target.copy(source, target)
        if self.drafter is not None:
            self.drafter.copy(source, target)

    def _empty(self) -> None:
        self.target.free(0)
        if self.drafter is not None:
            self.drafter.free(0)

    def _reserve(self) -> None:
        """Size the caches by what was asked for."""
        if not self.rows:
            return
        longest = max(row.request.max_length for row in self.rows.values())
        drafted = self.settings.most_draft_tokens + 1
        length = longest + drafted
        self.target.reserve(self.admission.places, min(length, self.target.context + drafted))
        if self.drafter is not None:
            self.drafter.reserve(self.admission.places, length)

    def _count(self, step: Step) -> None:
        self.stats.num_target_passes += step.passes
        depths = step.depths or step.drafted
        for counts in zip(step.drafted, step.accepted, step.committed, depths, strict=True):
            self.stats.count_row(*counts)

    def _text(self, request: Request, streaming: bool) -> TextStream | None:
        tokenizer = self.engine.tokenizer
        return TextStream(tokenizer, request.stop) if tokenizer is not None and (streaming or request.stop) else None

    def quietly(self) -> Iterator[Piece]:
        """Run to the end; nothing to show on the way."""
        for _ in self.steps():
            pass
        return iter(())

    def pieces(self) -> Iterator[Piece]:
        """Run to the end, giving out each row's text as soon as it is certain."""
        for index, request in enumerate(self.requests):
            if isinstance(request, SpecDecError):
                yield Piece(index, "", [], "error", request)
        for step in self.steps():
            for row, committed in zip(step.rows, step.committed, strict=True):
                text = row.text.take() if row.text is not None else ""
                yield Piece(row.index, text, row.tokens[len(row.tokens) - committed :], row.finish_reason, row.error)

    def output(self) -> Output:
        """The results, in the order of the prompts."""
        rows = [self.rows.get(index) for index in range(len(self.requests))]
        errors = [
            request if isinstance(request, SpecDecError) else (row.error if row else None)
            for request, row in zip(self.requests, rows, strict=True)
        ]
        return Output(
            token_ids=[row.new_tokens if row else [] for row in rows],
            texts=None if self.engine.tokenizer is None else [self._final_text(row) for row in rows],
            finish_reasons=[(row.finish_reason if row else None) or "error" for row in rows],
            logprobs=[row.logprobs if row else [] for row in rows] if self.settings.logprobs else None,
            from_draft=[row.from_draft if row else [] for row in rows],
            seeds=[row.request.seed if row else -1 for row in rows],
            errors=errors,
            stats=self.stats,
        )

    def _final_text(self, row: Row | None) -> str:
        if row is None or self.engine.tokenizer is None:
            return ""
        return row.text.text if row.text is not None else decode(self.engine.tokenizer, row.new_tokens)


def _model_seconds(drafter: Drafter | None) -> float:
    """What the drafter has spent in a model so far; 0 if it runs none."""
    return getattr(drafter, "forward_seconds", 0.0)
