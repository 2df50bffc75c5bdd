"""From logits to laws, and the random numbers that draw tokens from them.

A *law* is the distribution of the next token after every filter, in float32; temperature 0 is the one-hot law of the
largest logit. The filters are Hugging Face's own processors, in their order, so a law here is a law there.

Random numbers are counter-based: a number is a pure function of (request seed, position, purpose). Nothing is
consumed, so neighbours, batch order and the number of drafts cannot shift a row's stream. The generator is SplitMix64
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import draws
from specdec.errors import ConfigError

LEAST_TEMPERATURE = 1e-30  # below it logits / temperature can overflow float32, and the law would be NaN


@dataclass(frozen=True)
class SamplingParams:
    """How one row draws its tokens; names, meaning and order are those of Hugging Face's ``generate``.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        _require(
            _is_number(self.temperature)
            and (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf),
            "temperature",
            f"0 (greedy) or a finite number >= {LEAST_TEMPERATURE}",
            self.temperature,
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "an integer >= 0 (0 is off)", self.top_k)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1] (1 is off)", self.top_p)
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 is off)", self.min_p)
        _require(
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            "a finite number > 0 (1 is off)",
            self.repetition_penalty,
        )
        _require(
            _is_int(self.min_new_tokens) and self.min_new_tokens >= 0,
            "min_new_tokens",
            "an integer >= 0",
            self.min_new_tokens,
        )

    @property
    def greedy(self) -> bool:
        """Whether the law is one-hot. The only greedy threshold in the library."""
        return self.temperature == 0

    @property
    def reads_prefix(self) -> bool:
        """Whether the law depends on earlier tokens other than through the model."""
        return self.repetition_penalty != 1 or self.min_new_tokens > 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


GREEDY = SamplingParams()


_OURS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@lru_cache(maxsize=256)
def warpers(params: SamplingParams) -> LogitsProcessorList:
    """The filters that read logits alone, in Hugging Face's order: temperature, top-k, top-p, min-p."""
    found = LogitsProcessorList()
    if not params.greedy and params.temperature != 1:
        found.append(TemperatureLogitsWarper(float(params.temperature)))
    if not params.greedy and params.top_k > 0:
        found.append(TopKLogitsWarper(params.top_k))
    if not params.greedy and params.top_p < 1:
        found.append(TopPLogitsWarper(float(params.top_p)))
    if not params.greedy and params.min_p > 0:
        found.append(MinPLogitsWarper(float(params.min_p)))
    return found


@dataclass(frozen=True, eq=False)
class Filters:
    """How scores become a law: the largest alone (greedy), or a softmax after ``warpers``, which see no text."""

    greedy: bool
    warpers: LogitsProcessorList

    @cached_property
    def never_waits(self) -> bool:
        """Whether a GPU can go through ``warpers`` by itself; of a stranger's nobody knows."""
        return all(type(warper) in _OURS for warper in self.warpers)

    @cached_property
    def temperature(self) -> float | None:
        """What scores are divided by, if nothing else happens to them before the softmax."""
        if self.greedy or any(type(warper) is not TemperatureLogitsWarper for warper in self.warpers):
            return None
        return math.prod(warper.temperature for warper in self.warpers)


@lru_cache(maxsize=256)
def filters(params: SamplingParams) -> Filters:
    """Those of ``params``; the same object for equal ones, so that rows can be grouped by it."""
    return Filters(params.greedy, warpers(params))


def prefix_processors(
    params: SamplingParams, prompt_length: int, eos_ids: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """The processors that read a row's earlier tokens; they run before the warpers, as in Hugging Face."""
    found = LogitsProcessorList()
    if params.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.min_new_tokens > 0 and eos_ids:
        found.append(
            MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, list(eos_ids), device=device)
        )
    return found


def law(logits: Tensor, by: Filters) -> Tensor:
    """The float32 law of ``logits`` [..., V]; the same shape.

    Where no token can be drawn (a logit is NaN or +inf, or all are -inf) every entry is NaN; see ``is_law``.
    """
    if by.greedy:
        peak, token = logits.float().max(-1, keepdim=True)
        zero = peak - peak
        return zero.expand_as(logits).scatter(-1, token, zero + 1)
    return filtered(logits, by).softmax(-1, dtype=torch.float32)


def filtered(logits: Tensor, by: Filters) -> Tensor:
    """Scores [..., V]: ``logits`` after the warpers, in float32 if there are any."""
    if not by.warpers:
        return logits
    scores = logits.reshape(-1, logits.shape[-1]).float()
    for warper in by.warpers:  # one by one: their list asks for every signature, every time
        scores = warper(None, scores)
    return scores.view(logits.shape)


def laws(logits: Tensor, groups: dict[Filters, list[int]]) -> Tensor:
    """One law per position of ``logits`` [B, T, V], each row under its own filters; see ``same_filters``."""
    if len(groups) == 1:
        return law(logits, next(iter(groups)))
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for by, rows in groups.items():
        places = torch.tensor(rows).to(logits.device, non_blocking=True)
        result[places] = law(logits[places], by)
    return result


def same_filters(rules: Sequence[Filters]) -> dict[Filters, list[int]]:
    """Rows with the same filters go together through ``laws``."""
    groups: dict[Filters, list[int]] = {}
    for row, by in enumerate(rules):
        groups.setdefault(by, []).append(row)
    return groups


def largest(scores: Tensor) -> Tensor:
    """The tokens [B, T] that greedy laws of scores [B, T, V] give; -1 where no token can be drawn."""
    found = draws.largest(scores)
    if found is not None:
        return found
    peaks, tokens = scores.max(-1)
    return torch.where(peaks.isfinite(), tokens, -1)


def is_law(probs: Tensor) -> Tensor:
    """Which of the results [..., V] of ``law`` are laws, [...] bool."""
    return probs[..., 0] >= 0  # False for NaN


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """The law that gives ``tokens`` [...] with certainty, [..., V]."""
    zeros = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return zeros.scatter_(-1, tokens.unsqueeze(-1), 1.0)


def race(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw a token of each law ``probs`` [..., V]: the winner of an exponential race, argmin noise / probs.

    With Exp(1) noise the winner is distributed as ``probs`` and its runner-up structure makes two laws that race on
    the same noise agree as often as possible up to a constant (Daliri, Musco, Suresh 2024, arXiv 2408.07978).
    """
    return (probs / noise).argmax(-1)


def quantile(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each law ``probs`` [..., V] by inverting its distribution function at ``uniforms`` [..., 1]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True).squeeze(-1)
    return places.clamp_(max=probs.shape[-1] - 1)


MAX_DRAFT_TOKENS = 64  # far beyond what pays; lets a step draw its random numbers at once

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's increment, as a signed 64-bit integer
_BRANCH, _TARGET, _ACCEPT, _DRAFT = range(4)  # purposes: which stream of a row a number belongs to


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (torch shifts are arithmetic, so the sign bits are masked away)."""
    x = (x >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(x).mul_(-0x40A7B892E31B1A47)
    x = (x >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(x).mul_(-0x6B2FB644ECCEEE15)
    return (x >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(x)


def _uniforms(key: Tensor, count: int) -> Tensor:
    """``count`` numbers in the open interval (0, 1) for each key [...], float64 [..., count]."""
    counter = torch.arange(1, count + 1, device=key.device) * _GOLDEN
    bits = (_mix(key.unsqueeze(-1) + counter) >> 12).bitwise_and_(0xFFFFFFFFFFFFF)
    return bits.double().add_(0.5).mul_(2.0**-52)  # 52 bits: with 53 the largest would round to 1


@dataclass(frozen=True)
class Randomness:
    """The random numbers of B rows in one step, on ``device``.

    seeds [B] and text_lengths [B] (the rows' lengths before the step) are int64. ``coupled`` drafters draw with the
    target's own noise. ``constant`` says that every law is one-hot, so no number can matter and none is computed.

    Acceptance and draft numbers are keyed by the step's start and not by the position they speak of: a position may
    be drafted again after a rejection, and block verification looks at numbers beyond the place it stops at, so reuse
    would bias the text. A target draw happens once per position and is keyed by it, which makes the text of a seed
    the same with and without coupled speculation.
    """

    seeds: Tensor
    text_lengths: Tensor
    coupled: bool = False
    constant: bool = False

    def accept(self, count: int) -> Tensor:
        """Uniforms [B, count] for accept decisions, float64."""
        if self.constant:
            return torch.full((len(self.seeds), count), 0.5, dtype=torch.float64, device=self.seeds.device)
        return self._accept_and_draft[0, :, :count]

    def target(self, offsets: Tensor, vocab_size: int) -> Tensor:
        """Exp(1) noise [..., V] for the target's draws at ``text_lengths + offsets``; offsets [B] or [B, n]."""
        if self.constant:
            return torch.ones(1, device=self.seeds.device)
        keys = self._key(_TARGET, self.text_lengths.view(-1, *[1] * (offsets.dim() - 1)) + offsets)
        return _uniforms(keys, vocab_size).log_().neg_().float()

    def branches(self, level: int, count: int, vocab_size: int) -> Tensor:
        """Exp(1) noise [B, count, V] for the children of ``count`` nodes of a drafted tree, drawn at ``level``."""
        if self.constant:
            return torch.ones(1, device=self.seeds.device)
        nodes = 1 + level * MAX_DRAFT_TOKENS + torch.arange(count, device=self.seeds.device)
        keys = _mix(self._key(_BRANCH, self.text_lengths).unsqueeze(1) + nodes * _GOLDEN)
        return _uniforms(keys, vocab_size).log_().neg_().float()

    def draft(self, offset: int, draft_law: Tensor) -> Tensor:
        """The drafter's token number ``offset`` of this step, [B, 1], drawn from its law [B, 1, V].

        Coupled drafters race on the target's noise; for the others one uniform per row is cheaper than a race.
        """
        if self.constant:
            return draft_law.argmax(-1)
        drawn = draws.draw(draft_law, self.seeds, self.text_lengths, offset, coupled=self.coupled)
        if drawn is not None:
            return drawn
        if self.coupled:
            offsets = torch.full((len(self.seeds), 1), offset, device=self.seeds.device)
            return race(draft_law, self.target(offsets, draft_law.shape[-1]))
        return quantile(draft_law, self._accept_and_draft[1].narrow(1, offset, 1).unsqueeze(-1))

    @cached_property
    def _accept_and_draft(self) -> Tensor:
        """Uniforms [2, B, MAX_DRAFT_TOKENS]; made together, because launching tiny operations is what they cost."""
        made = draws.uniforms(self.seeds, self.text_lengths, MAX_DRAFT_TOKENS)
        if made is not None:
            return made
        keys = torch.stack([self._key(_ACCEPT, self.text_lengths), self._key(_DRAFT, self.text_lengths)])
        return _uniforms(keys, MAX_DRAFT_TOKENS)

    def _key(self, purpose: int, positions: Tensor) -> Tensor:
        """Keys of ``positions`` [B] or [B, n]."""
        keys = self._row_keys[purpose].view(-1, *[1] * (positions.dim() - 1))
        return _mix(keys + positions * _GOLDEN)

    @cached_property
    def _row_keys(self) -> Tensor:
        """A key per purpose and row, [4, B]."""
        return _mix(self.seeds * 4 + torch.arange(4, device=self.seeds.device).unsqueeze(1))
