"""The door: a user's prompts and settings become validated requests, or errors that say what to do."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.controller import AUTO
from specdec.errors import ConfigError, PromptError, SpecDecError
from specdec.experience import MOST_DRAFT_TOKENS
from specdec.sampling import MAX_DRAFT_TOKENS, SamplingParams
from specdec.sequences import Request
from specdec.verify import RULES

_PER_PROMPT = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
_OF_LOAD = ("draft", "draft_dtype", "draft_tokenizer", "tokenizer", "tree", "dtype", "device")

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Everything a call to ``generate`` may set besides models and prompts; the only place of its defaults.

    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens and seed are one value for
    all prompts or a list with one per prompt.

    max_new_tokens: the most tokens to generate per row.
    temperature: 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1: off. As in Hugging Face.
    min_new_tokens: no end-of-text before that many.
    seed: output number j draws from its own stream, seed + j (a list: prompt i, sample j: seeds[i] + j). None: new
        every call. ``Output.seeds`` reports what was used.
    n: samples per prompt, next to each other in the results.
    stop: strings that end a row; the text ends before the string, the token ids with the token that completed it.
    eos_token_id: one or several ids; "model" takes the model's own, None has none.
    logprobs: also return the target's log-probability (before filters) of every new token.
    num_draft_tokens: how many tokens to draft per step; 0 is plain decoding, "auto" what measurements of this machine,
        these models and this text promise most of.
    rule: "block" (accepts most), "rejection", "coupled" (the text of a seed equals plain sampling with it, whatever was
        drafted), or "auto": "coupled" with a seed, "block" without.
    max_batch_size: rows decoded at a time; others wait and join as rows finish.
    context: what happens to a row that outgrows the model's context: "stop" ends it (reason "length"), "slide" keeps
        its most recent tokens.
    on_error: "raise", or "return": a bad request fails alone, its error in ``Output.errors``.
    """

    max_new_tokens: int | Sequence[int] = 128
    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    min_new_tokens: int | Sequence[int] = 0
    seed: int | Sequence[int] | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    eos_token_id: int | Sequence[int] | str | None = "model"
    logprobs: bool = False
    num_draft_tokens: int | str = AUTO
    rule: str = AUTO
    max_batch_size: int = 32
    context: str = "stop"
    on_error: str = "raise"

    def __post_init__(self) -> None:
        _choice("rule", self.rule, [AUTO, *RULES])
        _choice("context", self.context, ["stop", "slide"])
        _choice("on_error", self.on_error, ["raise", "return"])
        _count("n", self.n, 1)
        _count("max_batch_size", self.max_batch_size, 1)
        if isinstance(self.num_draft_tokens, str):
            if self.num_draft_tokens != AUTO:
                raise ConfigError(
                    f'num_draft_tokens must be an integer from 0 to {MAX_DRAFT_TOKENS} or "auto", '
                    f"got {self.num_draft_tokens!r}"
                )
        else:
            _count("num_draft_tokens", self.num_draft_tokens, 0, MAX_DRAFT_TOKENS)
        if self.on_error == "raise":  # else what is wrong for all prompts is the error of each
            self._check_shared()
        if not isinstance(self.logprobs, bool):
            raise ConfigError(f"logprobs must be True or False, got {self.logprobs!r}")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ConfigError(f"stop must be a non-empty string or several, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stops))

    def _check_shared(self) -> None:
        """What is one value for all prompts can be checked before there are any."""
        given = {name: getattr(self, name) for name in _PER_PROMPT}
        shared = {name: value for name, value in given.items() if not isinstance(value, Sequence)}
        if "max_new_tokens" in shared:
            _count("max_new_tokens", shared.pop("max_new_tokens"), 1)
        SamplingParams(**shared)

    @property
    def most_draft_tokens(self) -> int:
        """The longest draft there may be."""
        return self.num_draft_tokens if isinstance(self.num_draft_tokens, int) else MOST_DRAFT_TOKENS

    @property
    def rule_name(self) -> str:
        """The acceptance rule, chosen if it was left open."""
        if self.rule != AUTO:
            return self.rule
        return "block" if self.seed is None else "coupled"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from keyword arguments; an unknown one is an error that names the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
                hint = "give it to specdec.load" if name in _OF_LOAD else hint
                raise ConfigError(f"unknown argument {name!r}; {hint}")
        return cls(**given)


@dataclass(frozen=True)
class Limits:
    """What the loaded models allow: ids below ``vocab_size``, at most ``context`` tokens, the model's own EOS ids."""

    vocab_size: int
    context: int
    eos_ids: frozenset[int]


def build_requests(
    prompts: Prompts,
    attention_mask: Tensor | None,
    settings: Settings,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Request | SpecDecError]:
    """One request per output, in order; a prompt that cannot run gives its error instead."""
    texts = token_lists(prompts, attention_mask, tokenizer)
    if settings.stop and tokenizer is None:
        raise ConfigError("stop strings need a tokenizer, and this model came without one; pass tokenizer=")
    eos_ids = _eos_ids(settings.eos_token_id, limits)
    seeds = _seeds(settings, len(texts))
    columns = {name: _per_prompt(name, getattr(settings, name), len(texts)) for name in _PER_PROMPT}
    found: list[Request | SpecDecError] = []
    for i, tokens in enumerate(texts):
        values = {name: column[i] for name, column in columns.items()}
        request: Request | SpecDecError
        try:
            request = tokens if isinstance(tokens, PromptError) else _request(i, tokens, values, settings, limits)
        except SpecDecError as error:
            request = error
        for j in range(settings.n):
            sample = replace(request, seed=seeds[i] + j, eos_ids=eos_ids) if isinstance(request, Request) else request
            found.append(sample)
    return found


def _request(index: int, tokens: list[int], values: dict[str, Any], settings: Settings, limits: Limits) -> Request:
    """The request of prompt ``index``, its seed and EOS ids still to be set."""
    slide = settings.context == "slide"
    check_prompt(index, tokens, limits, slide=slide)
    max_new_tokens = values.pop("max_new_tokens")
    _count("max_new_tokens", max_new_tokens, 1)
    length = len(tokens) + max_new_tokens
    return Request(
        prompt=tuple(tokens),
        max_length=length if slide else min(length, limits.context),
        params=SamplingParams(**values),
        stop=tuple(settings.stop),
        sample_of=index,
    )


def check_prompt(index: int, tokens: Sequence[int], limits: Limits, *, slide: bool) -> None:
    """Raise ``PromptError`` for a prompt that no model may see."""
    if not tokens:
        raise PromptError(f"prompt {index} is empty; give it at least one token (for example the end-of-text token)")
    wrong = next((token for token in tokens if not 0 <= token < limits.vocab_size), None)
    if wrong is not None:
        raise PromptError(
            f"prompt {index} has token id {wrong}; the model knows 0 to {limits.vocab_size - 1}. "
            "Was it made by another tokenizer?"
        )
    if len(tokens) >= limits.context and not slide:
        raise PromptError(
            f"prompt {index} has {len(tokens)} tokens; the model reads {limits.context} and needs room for a new one. "
            'Shorten it, or pass context="slide" to keep its most recent tokens'
        )


def token_lists(
    prompts: Prompts, attention_mask: Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int] | PromptError]:
    """Every accepted form of prompts as lists of token ids; padding is dropped here and nowhere else.

    A prompt of a list that is neither text nor ids gives its error in its place.
    """
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise PromptError(f"a mapping of prompts needs 'input_ids', got {', '.join(map(repr, prompts))}")
        if attention_mask is not None and "attention_mask" in prompts:
            raise ConfigError(
                "attention_mask was given twice, in the mapping of prompts and beside it; give one of them"
            )
        return token_lists(*_of_mapping(prompts["input_ids"], prompts.get("attention_mask", attention_mask)), tokenizer)
    if isinstance(prompts, np.ndarray):
        prompts = torch.as_tensor(prompts)
    if isinstance(prompts, Tensor):
        return list(_unpad(prompts, attention_mask))
    if attention_mask is not None:
        raise ConfigError("attention_mask goes with a tensor of token ids; prompts of other kinds have no padding")
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise PromptError(f"prompts must be text, lists of token ids or a tensor, got {type(prompts).__name__}")
    if len(prompts) == 0:
        raise PromptError("no prompts given; pass at least one")
    rows: Sequence[Any] = [prompts] if all(_is_id(token) for token in prompts) else prompts
    return [_tokens_of(prompt, tokenizer) for prompt in rows]


def _tokens_of(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int] | PromptError:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("a text prompt needs a tokenizer, and this model came without one; pass tokenizer=")
        try:
            return list(tokenizer(prompt)["input_ids"])
        except (TypeError, ValueError) as error:  # half of a surrogate pair, say
            return PromptError(f"the tokenizer cannot read the prompt {prompt[:80]!r}: {error}")
    if isinstance(prompt, Tensor | np.ndarray):
        prompt = prompt.tolist()
    if (
        not isinstance(prompt, Sequence)
        or isinstance(prompt, bytes | bytearray)
        or not all(_is_id(token) for token in prompt)
    ):
        return PromptError(f"a prompt must be text or integer token ids, got {repr(prompt)[:80]}")
    return [int(token) for token in prompt]


def _of_mapping(tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Tokens without what the mask hides where a tokenizer made lists of both; tensors stay what they are."""
    if isinstance(tokens, Tensor | np.ndarray) or isinstance(mask, Tensor | np.ndarray) or mask is None:
        return tokens, None if mask is None else torch.as_tensor(mask)
    rows, masks = ([tokens], [mask]) if all(_is_id(token) for token in tokens) else (tokens, mask)
    if list(map(len, rows)) != list(map(len, masks)):
        raise PromptError(f"attention_mask must have as many numbers as input_ids, got {mask!r:.80} for {tokens!r:.80}")
    return [[token for token, kept in zip(*pair, strict=True) if kept] for pair in zip(rows, masks, strict=True)], None


def _unpad(tokens: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if tokens.dim() == 1:
        tokens = tokens.unsqueeze(0)
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise PromptError(f"a prompt tensor must be integers [rows, tokens], got {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) == 0:
        raise PromptError("no prompts given; pass at least one")
    if attention_mask is None:
        return [list(map(int, row)) for row in tokens.tolist()]
    if not isinstance(attention_mask, Tensor):
        raise PromptError(
            f"attention_mask must be a tensor [rows, tokens] {list(tokens.shape)}, got {type(attention_mask).__name__}"
        )
    mask = attention_mask.unsqueeze(0) if attention_mask.dim() == 1 else attention_mask
    if mask.shape != tokens.shape:
        raise PromptError(
            f"attention_mask must have the shape of the tokens, got {list(mask.shape)} for {list(tokens.shape)}"
        )
    if ((mask != 0) & (mask != 1)).any():
        raise PromptError(
            "attention_mask must hold 1 for tokens and 0 for padding; numbers to be added to scores are others"
        )
    return [row[keep.bool()].tolist() for row, keep in zip(tokens, mask.to(tokens.device), strict=True)]


def _eos_ids(given: int | Sequence[int] | str | None, limits: Limits) -> frozenset[int]:
    given = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if given == "model":
        return limits.eos_ids
    if given is None:
        return frozenset()
    ids = given if isinstance(given, Sequence) else [given]
    if isinstance(ids, str) or not all(_is_id(i) and 0 <= i < limits.vocab_size for i in ids):
        raise ConfigError(
            f'eos_token_id must be token ids from 0 to {limits.vocab_size - 1}, None or "model", got {given!r}'
        )
    return frozenset(int(i) for i in ids)


def _seeds(settings: Settings, count: int) -> list[int]:
    """The first seed of each prompt; its further samples count up from there."""
    if settings.seed is None:
        return [secrets.randbits(48) for _ in range(count)]
    if isinstance(settings.seed, Sequence) and not isinstance(settings.seed, str):
        return [_seed(value) for value in _per_prompt("seed", settings.seed, count)]
    return [_seed(settings.seed) + i * settings.n for i in range(count)]


def _seed(value: Any) -> int:
    if not _is_id(value) or not 0 <= value < 2**60:
        raise ConfigError(f"seed must be an integer from 0 to 2**60 - 1, or None, got {value!r}")
    return int(value)


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ConfigError(f"{name} must be one value or one per prompt ({count}), got {len(value)} values")
    return list(value)


def _is_id(value: object) -> bool:
    """Whether it is one integer, of whatever library."""
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor) and not getattr(value, "ndim", 0)


def _count(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f">= {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be an integer {allowed}, got {value!r}")


def _choice(name: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
