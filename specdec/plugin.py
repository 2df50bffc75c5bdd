"""The door into Hugging Face's ``generate``: speculation for a batch of any size, in a call that stays as it is.

    model.generate(**inputs, custom_generate=specdec.plugin.generate, assistant_model=draft)

``generate`` takes the place of ``GenerationMixin._sample`` (transformers/generation/utils.py): it is given the prepared
inputs, processors and criteria of the call, and returns what ``_sample`` returns.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from specdec.checkpoints import TokenizerLike, checkpoint_directory, find_tokenizer, load_lm, tokenizer_of
from specdec.controller import AUTO
from specdec.draft import Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.vocabularies import model_drafter
from specdec.drafting import NAMES, DraftLike, Target, check_encoder, make_drafter
from specdec.engine import Call, Engine
from specdec.errors import ConfigError, PromptError
from specdec.lm.base import CachedLM
from specdec.load import costs_file
from specdec.processors import Processing, split
from specdec.requests import Settings
from specdec.sampling import MAX_DRAFT_TOKENS, Filters
from specdec.sequences import Request, Row
from specdec.stats import Stats
from specdec.tuned import tuned_for

HF_DRAFT_TOKENS = 20  # transformers' default for ``num_assistant_tokens``, found in calls that do not set it
# Arguments of a model's forward pass that ``_sample`` is given and that rows of ours need not be told.
HANDLED = ("attention_mask", "position_ids", "cache_position", "logits_to_keep", "past_key_values", "use_cache")
ENCODER = ("encoder_outputs", "decoder_attention_mask")


class Door:
    """What to pass as ``custom_generate``. ``stats`` are those of the latest call."""

    def __init__(self) -> None:
        self.stats: Stats | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        _hand_on_dropped_arguments()
        return inspect.signature(type(self).__call__).replace(
            parameters=list(inspect.signature(type(self).__call__).parameters.values())[1:]
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        *,
        assistant_model: PreTrainedModel | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        call_streamer: BaseStreamer | None = None,
        inputs_tensor: Tensor | None = None,
        draft: DraftLike = None,
        draft_tokenizer: TokenizerLike | None = None,
        num_draft_tokens: int | str | None = None,
        rule: str = "coupled",
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
        """Generate for input_ids [B, T], left or right padded; see ``GenerationMixin.generate`` for what is returned.

        The drafter is ``draft`` or ``assistant_model`` (a model; with another vocabulary than the target's it takes
        ``tokenizer`` and ``draft_tokenizer`` or ``assistant_tokenizer``), or suffix decoding (with
        ``prompt_lookup_num_tokens``, and when neither is given). ``draft`` may be whatever ``specdec.load`` takes, tuned
        settings left out; what a path names is loaded in every call. It is also the way around transformers' own
        refusal of ``num_return_sequences`` with an assistant. ``seed`` of None draws one from torch's global generator,
        so that ``torch.manual_seed`` repeats a call. ``rule``: see ``specdec.Settings``.

        Raises ``ConfigError`` for what cannot be honoured exactly: beams, contrastive search, DoLa, attentions or
        hidden states as output, guidance, a cache that is not empty, other inputs of the model's forward pass.
        """
        config = generation_config
        _check(config, synced_gpus, input_ids, model_kwargs)
        target = load_lm(model)
        drafter = _drafter(
            draft if draft is not None else assistant_model,
            config,
            Target(target, model, tokenizer, target.vocab_size, None, target.device),
            draft_tokenizer if draft_tokenizer is not None else assistant_tokenizer,
        )
        count = num_draft_tokens if num_draft_tokens is not None else _count(config, assistant_model)
        sources = _sources(model, input_ids, inputs_tensor, model_kwargs)
        requests = _requests(
            input_ids, logits_processor, stopping_criteria, config, target, seed, model_kwargs, sources
        )
        settings = Settings(num_draft_tokens=count, rule=rule, max_batch_size=max(1, len(requests)))
        keep = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        call = Engine(target, drafter, costs_file=costs_file(target, drafter)).call(
            list(requests), settings, record=bool(keep)
        )
        rows = [call.rows[index] for index in range(len(requests))]
        pad = _pad_token(config)
        _Columns(streamer or call_streamer, rows, pad).follow(call)
        self.stats = call.stats
        return _result(model, input_ids, rows, config, pad, model_kwargs)


generate = Door()


def _hand_on_dropped_arguments() -> None:
    """Let a call's ``assistant_model``, ``tokenizer`` and ``streamer`` reach a callable.

    transformers (5.17 to 5.23 at least) collects these arguments of ``generate`` and then replaces the collection by
    those that it finds in ``kwargs`` under names of the callable's signature, so a callable can take everything but
    them. The signature is asked for in between: here they are put back into ``kwargs``.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_extract_generation_mode_kwargs":
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return
    collected, kwargs = frame.f_locals.get("generation_mode_kwargs", {}), frame.f_locals["kwargs"]
    for name in ("assistant_model", "assistant_tokenizer", "tokenizer"):
        if collected.get(name) is not None:
            kwargs.setdefault(name, collected[name])
    if collected.get("streamer") is not None:
        kwargs.setdefault("call_streamer", collected["streamer"])


def _check(config: GenerationConfig, synced_gpus: bool, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for what cannot be honoured exactly."""
    refused = {
        "num_beams > 1": (config.num_beams or 1) > 1,
        "output_attentions": bool(config.return_dict_in_generate and config.output_attentions),
        "output_hidden_states": bool(config.return_dict_in_generate and config.output_hidden_states),
        "guidance_scale": config.guidance_scale not in (None, 1.0),
        "penalty_alpha with top_k (contrastive search)": _is_contrastive(config),
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "synced_gpus": synced_gpus,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "inputs_embeds without input_ids": input_ids.shape[1] == 0,
    }
    cache = model_kwargs.get("past_key_values")
    refused["past_key_values that is not empty"] = cache is not None and cache.get_seq_length() > 0
    refused["position_ids of your own"] = not _are_usual_positions(input_ids, model_kwargs)
    for name, value in model_kwargs.items():
        if name not in HANDLED + ENCODER and value is not None and not _is_zero(value):
            refused[f"the model input {name!r}"] = True
    wrong = [name for name, given in refused.items() if given]
    if wrong:
        raise ConfigError(
            f"specdec.plugin.generate cannot honour {', '.join(wrong)}; leave it out, or leave custom_generate out "
            "to run transformers' own generate"
        )


def _is_contrastive(config: GenerationConfig) -> bool:
    """Whether transformers takes the call for contrastive search."""
    alpha = getattr(config, "penalty_alpha", None) or 0
    return not config.do_sample and alpha > 0 and (config.top_k or 0) > 1


def _are_usual_positions(input_ids: Tensor, model_kwargs: dict[str, Any]) -> bool:
    """Whether positions are those that transformers derives from the mask."""
    given = model_kwargs.get("position_ids")
    if given is None:
        return True
    mask = _mask(input_ids, model_kwargs.get("attention_mask"))
    usual = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return given.shape == usual.shape and bool((given.to(mask.device) == usual)[mask].all())


def _is_zero(value: Any) -> bool:
    """Token types of tokenizers that always return some, and flags that are off."""
    return value is False or (isinstance(value, Tensor) and not bool(value.any()))


def _drafter(
    draft: DraftLike, config: GenerationConfig, target: Target, draft_tokenizer: TokenizerLike | None
) -> Drafter:
    """What ``draft`` is or names, and suffix decoding beside it where the call asks for prompt lookup."""
    if draft is None:
        return SuffixDrafter()
    drafter = _named_drafter(draft, target, tokenizer_of(draft_tokenizer, "draft_tokenizer"))
    looks_up = isinstance(drafter, SuffixDrafter | HybridDrafter)
    return drafter if config.prompt_lookup_num_tokens is None or looks_up else HybridDrafter(drafter, SuffixDrafter())


def _named_drafter(draft: DraftLike, target: Target, draft_tokenizer: PreTrainedTokenizerBase | None) -> Drafter:
    """As ``load`` makes it; for a model, which may come with every call, no tokenizers are looked for."""
    if isinstance(draft, torch.nn.Module):
        lm = load_lm(draft)
        check_encoder(lm, target.lm)
        folder = getattr(draft, "name_or_path", "")
        return model_drafter(lm, target.lm, target.tokenizer, draft_tokenizer, target.vocab_size, folder)
    tuned_for(draft, target.model, checkpoint_directory)  # refuses these: they are a checkpoint's, and this is a model
    parts = draft if isinstance(draft, list | tuple) else [draft]
    if target.tokenizer is None and any(isinstance(part, str | Path) and part not in NAMES for part in parts):
        target = replace(target, tokenizer=find_tokenizer(target.model))
    drafter = make_drafter(draft, target, draft_tokenizer)
    assert drafter is not None, "only None stands for no drafter"
    return drafter


def _count(config: GenerationConfig, assistant: PreTrainedModel | None) -> int | str:
    """How many tokens to draft: what the call or the assistant names, as far as it differs from the library default."""
    if config.prompt_lookup_num_tokens is not None:
        return min(int(config.prompt_lookup_num_tokens), MAX_DRAFT_TOKENS)
    own = getattr(getattr(assistant, "generation_config", None), "num_assistant_tokens", None)
    for count in (config.num_assistant_tokens, own):
        if count is not None and count != HF_DRAFT_TOKENS:
            return min(int(count), MAX_DRAFT_TOKENS)
    return AUTO


def _requests(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    target: CachedLM,
    seed: int | None,
    model_kwargs: dict[str, Any],
    sources: list[dict[str, Any]] | None,
) -> list[Request]:
    """One request per row: padding taken off, length and end-of-text read from the criteria, the rest kept."""
    rows, width = input_ids.shape
    limits = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    new_tokens = min(limits, default=config.max_length) - width
    eos = [i for one in criteria if type(one) is EosTokenCriteria for i in one.eos_token_id.flatten().tolist()]
    others = StoppingCriteriaList(one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria))
    readers, warpers = split(processors)
    filters = Filters(not config.do_sample, warpers)
    mask = _mask(input_ids, model_kwargs.get("attention_mask" if sources is None else "decoder_attention_mask"))
    prompts = [tuple(ids[keep].tolist()) for ids, keep in zip(input_ids, mask, strict=True)]
    seeds = _seeds(seed, rows, config)
    if others and rows > 1 and _pad_token(config) is None:
        raise ConfigError("rows may end at different places, and there is no token to pad them with; set pad_token_id")
    requests = []
    for b, prompt in enumerate(prompts):
        _check_prompt(b, prompt, new_tokens, target)
        requests.append(
            Request(
                prompt=prompt,
                max_length=len(prompt) + new_tokens,
                seed=seeds[b],
                eos_ids=frozenset(eos),
                sample_of=prompts.index(prompt) if sources is None else b,
                source=None if sources is None else sources[b],
                processing=Processing(tuple(input_ids[b].tolist()), readers, filters, others, (b, rows)),
            )
        )
    return requests


def _sources(
    model: PreTrainedModel, input_ids: Tensor, inputs: Tensor | None, model_kwargs: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """What each row's encoder reads, and what the target's has made of it already; None without an encoder."""
    outputs = model_kwargs.get("encoder_outputs")
    if outputs is None:
        return None
    states = outputs[0]
    batched = {"encoder_outputs": states, "attention_mask": model_kwargs.get("attention_mask")}
    if inputs is not None:
        batched[model.main_input_name] = inputs
    rows = len(input_ids)
    found: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, tensor in batched.items():
        if tensor is not None:
            for b, part in enumerate(tensor.repeat_interleave(rows // len(tensor), dim=0).split(1)):
                found[b][name] = part
    return found


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.to(input_ids.device).bool()


def _check_prompt(index: int, prompt: Sequence[int], new_tokens: int, target: CachedLM) -> None:
    if not prompt:
        raise PromptError(f"prompt {index} is empty: its attention_mask hides every token")
    if len(prompt) + new_tokens > target.context:
        raise PromptError(
            f"prompt {index} has {len(prompt)} tokens and {new_tokens} are to follow; the model reads {target.context}. "
            "Lower max_new_tokens, or shorten the prompt"
        )
    if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
        raise PromptError(f"prompt {index} has a token id outside of 0 to {target.vocab_size - 1}")


def _seeds(seed: int | None, rows: int, config: GenerationConfig) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**48, ())) if config.do_sample else 0
    return [seed + b for b in range(rows)]


def _pad_token(config: GenerationConfig) -> int | None:
    pad: Tensor | None = getattr(config, "_pad_token_tensor", None)
    return None if pad is None else int(pad)


class _Columns:
    """Gives a streamer what ``_sample`` would give it: one token of every row at a time, padding after a row's end."""

    def __init__(self, streamer: BaseStreamer | None, rows: Sequence[Row], pad: int | None) -> None:
        self.streamer, self.rows, self.pad, self.given = streamer, rows, pad, 0

    def follow(self, call: Call) -> None:
        """Run the call to its end, handing over as it goes. Raises the first error of a row."""
        for _ in call.steps():
            self.put()
        if self.streamer is not None:
            self.streamer.end()
        for row in self.rows:
            if row.error is not None:
                raise row.error

    def put(self) -> None:
        """Hand over the columns that every row has reached."""
        if self.streamer is None:
            return
        texts = [row.new_tokens for row in self.rows]
        open_rows = [len(text) for text, row in zip(texts, self.rows, strict=True) if row.finish_reason is None]
        for place in range(self.given, min(open_rows, default=max(map(len, texts)))):
            column = [text[place] if place < len(text) else self.pad or 0 for text in texts]
            self.streamer.put(torch.tensor(column))
            self.given = place + 1


def _result(
    model: PreTrainedModel,
    input_ids: Tensor,
    rows: Sequence[Row],
    config: GenerationConfig,
    pad: int | None,
    model_kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
    """Prompts and new tokens [B, T], padded on the right; with scores and logits if the call asks for a dictionary."""
    width = max(len(row.new_tokens) for row in rows)
    new = [[*row.new_tokens, *[pad or 0] * (width - len(row.new_tokens))] for row in rows]
    sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    given: dict[str, Any] = {"sequences": sequences}
    if config.output_scores:
        given["scores"] = _by_column([row.scores for row in rows], width, pad)
    if config.output_logits:
        given["logits"] = _by_column([row.raw_logits for row in rows], width, pad)
    if model.config.is_encoder_decoder:
        return GenerateEncoderDecoderOutput(**given)
    return GenerateDecoderOnlyOutput(**given)


def _by_column(rows: Sequence[Sequence[Tensor]], width: int, pad: int | None) -> tuple[Tensor, ...]:
    """A tensor [B, V] per new token; rows that had ended are certain of padding."""
    found = []
    for row in rows:
        scores = torch.cat(list(row))
        rest = torch.full((width - len(scores), scores.shape[1]), float("-inf"), device=scores.device)
        rest[:, pad or 0] = 0
        found.append(torch.cat([scores, rest]))
    return tuple(torch.stack(found, dim=1).unbind(0))
