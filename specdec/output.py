"""What a call gives: whole texts, or pieces of them as they come."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.errors import SpecDecError
from specdec.stats import Stats


@dataclass(frozen=True)
class Output:
    """What a call gives, one entry per output: prompts in their order, the n samples of a prompt side by side.

    finish_reasons: "eos", "stop", "length" or "error". from_draft marks the new tokens that the drafter guessed.
    texts is None without a tokenizer, logprobs None unless asked for.
    """

    token_ids: list[list[int]]
    texts: list[str] | None
    finish_reasons: list[str]
    logprobs: list[list[float]] | None
    from_draft: list[list[bool]]
    seeds: list[int]
    errors: list[SpecDecError | None]
    stats: Stats


@dataclass(frozen=True)
class Piece:
    """New text of output ``index``; the pieces of an output, joined, are its text.

    The last one has a reason, as in ``Output.finish_reasons``, and the ``error`` if that is "error".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: SpecDecError | None = None
