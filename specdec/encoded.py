"""Requests of encoder-decoder models: prompts are what the encoder reads; the decoder begins with its start token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
)

from specdec.errors import ConfigError, PromptError, SpecDecError
from specdec.lm.base import CachedLM
from specdec.lm.encdec import EncoderDecoderLM
from specdec.processors import Processing
from specdec.requests import Limits, Prompts, Settings, build_requests, check_prompt, token_lists
from specdec.sequences import Request, processing_of

Source = Mapping[str, Any]


def encoded_requests(
    prompts: Prompts | Source | Sequence[Source],
    attention_mask: Tensor | None,
    settings: Settings,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase | None,
    lm: CachedLM,
) -> list[Request | SpecDecError]:
    """One request per output, in order; its prompt is the decoder's start token, its ``source`` is the user's prompt.

    What is not made of token ids is encoded here and now, as nobody else can say whether it is sound.

    prompts: whatever ``build_requests`` takes, for the encoder; or a mapping of tensors [rows, ...] by the names of the
    encoder's arguments (input_features, pixel_values, ...), or a list of such mappings of one row each. A mapping may
    have "decoder_input_ids" [rows, T], with which the decoder then begins.
    """
    assert isinstance(lm, EncoderDecoderLM), "of what encodes, only this says how its decoder begins"
    sources = _sources(prompts, attention_mask, limits, tokenizer, lm)
    begins = [_decoder_begin(source, lm) for source in sources]
    found = build_requests(begins, None, settings, limits, tokenizer)
    result: list[Request | SpecDecError] = []
    for i, request in enumerate(found):
        source = sources[i // settings.n]
        if isinstance(request, SpecDecError):
            result.append(request)
        elif isinstance(source, SpecDecError):
            result.append(source)
        else:
            result.append(_forced(replace(request, source=_without_decoder(source)), lm))
    return result


def _sources(
    prompts: Any, attention_mask: Tensor | None, limits: Limits, tokenizer: Any, lm: EncoderDecoderLM
) -> list[Source | SpecDecError]:
    """What the encoder reads for each row, or the row's error."""
    size = lm.model.get_input_embeddings().num_embeddings
    encoder_limits = replace(limits, vocab_size=size, context=1 << 62)
    if isinstance(prompts, Mapping) and "input_ids" not in prompts:
        if attention_mask is not None:
            prompts = {**prompts, "attention_mask": attention_mask}
        return [_checked(i, row, encoder_limits, lm) for i, row in enumerate(_rows_of(prompts))]
    if isinstance(prompts, Sequence) and prompts and all(isinstance(prompt, Mapping) for prompt in prompts):
        return [_checked(i, row, encoder_limits, lm) for i, row in enumerate(prompts)]
    result: list[Source | SpecDecError] = []
    for i, tokens in enumerate(token_lists(prompts, attention_mask, tokenizer)):
        try:
            if isinstance(tokens, PromptError):
                raise tokens
            check_prompt(i, tokens, encoder_limits, slide=False)
            ids = torch.tensor([tokens])
            result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        except PromptError as error:
            result.append(error)
    begins = prompts.get("decoder_input_ids") if isinstance(prompts, Mapping) else None
    if begins is not None:
        result = [
            source if isinstance(source, SpecDecError) else {**source, "decoder_input_ids": begins[i : i + 1]}
            for i, source in enumerate(result)
        ]
    return result


def _rows_of(batch: Source) -> list[Source]:
    counts = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor)}
    if len(counts) != len(batch) or len(set(counts.values())) != 1:
        given = ", ".join(f"{name}: {counts.get(name, type(batch[name]).__name__)}" for name in batch)
        raise PromptError(
            f"a mapping of prompts needs tensors with one entry per row, all alike; got {given or 'none'}"
        )
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(next(iter(counts.values())))]


def _checked(index: int, source: Source, limits: Limits, lm: EncoderDecoderLM) -> Source | SpecDecError:
    """What the encoder reads for prompt ``index``, or what is wrong with it."""
    shapes = {name: list(value.shape) for name, value in source.items() if isinstance(value, Tensor)}
    if wrong := next((name for name, shape in shapes.items() if shape[:1] != [1]), None):
        return PromptError(
            f"prompt {index} is a mapping of one row, so its tensors are [1, ...]; {wrong} is {shapes[wrong]}"
        )
    try:
        if "input_ids" in source:
            check_prompt(index, torch.as_tensor(source["input_ids"])[0].tolist(), limits, slide=False)
            return source
        return source if "encoder_outputs" in source else {**source, "encoder_outputs": lm.encode(source)}
    except PromptError as error:
        return error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        given = ", ".join(f"{name}: {shapes.get(name, type(source[name]).__name__)}" for name in source)
        return PromptError(f"prompt {index}: {type(lm.model).__name__} cannot encode {given}: {error}")


def _decoder_begin(source: Source | SpecDecError, lm: EncoderDecoderLM) -> list[int]:
    given = None if isinstance(source, SpecDecError) else source.get("decoder_input_ids")
    if given is not None:
        return [int(token) for token in given[0]]
    for config in (lm.model.generation_config, lm.model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            start = getattr(config, name, None)
            if isinstance(start, int):
                return [start]
    raise ConfigError(
        f"{type(lm.model).__name__} names no decoder_start_token_id, with which its decoder would begin; set it in the "
        'generation config, or give "decoder_input_ids" with the prompts'
    )


def _without_decoder(source: Source) -> Source:
    return {name: value for name, value in source.items() if not name.startswith("decoder_")}


def _forced(request: Request, lm: EncoderDecoderLM) -> Request:
    """With the first and last token that the model's generation config forces, as ``generate`` does."""
    config = lm.model.generation_config
    forced = LogitsProcessorList()
    if config.forced_bos_token_id is not None:
        forced.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        forced.append(ForcedEOSTokenLogitsProcessor(request.max_length, config.forced_eos_token_id, device=lm.device))
    if not forced:
        return request
    own = processing_of(request, lm.device)
    processors = LogitsProcessorList([*own.processors, *forced])
    return replace(request, processing=Processing(own.head, processors, own.filters))
