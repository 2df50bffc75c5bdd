"""Names, paths and models become an engine."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from specdec.checkpoints import (
    ModelLike,
    TokenizerLike,
    checkpoint_directory,
    device_named,
    dtype_named,
    find_tokenizer,
    is_rounded,
    lm_of,
    load_module,
    tokenizer_of,
)
from specdec.controller import DEFAULT_DRAFT_TOKENS
from specdec.draft import Drafter
from specdec.drafters.model import ModelDrafter
from specdec.drafting import DEFAULT, DraftLike, Target, branching, make_drafter
from specdec.engine import Engine
from specdec.lm.base import CachedLM
from specdec.lm.native import native_lm
from specdec.machine import cache_directory, machine
from specdec.nn.lstm import Trainable
from specdec.precision import own_precision
from specdec.tuned import TunedEngine, tuned_for


@own_precision()
def load(
    target: ModelLike,
    *,
    draft: DraftLike = DEFAULT,
    tokenizer: TokenizerLike | None = None,
    draft_tokenizer: TokenizerLike | None = None,
    tree: bool = False,
    dtype: str = "auto",
    draft_dtype: str | None = None,
    device: str = "auto",
) -> Engine:
    """Load a target and a drafter into an ``Engine`` that keeps them.

    target: a directory, a Hugging Face hub id, a ``PreTrainedModel``, a ``GPT`` or a ``CachedLM``.
    draft: any of these, the name of a drafter that needs no model ("suffix", the default: what the text repeats), a
        ``Drafter``, or None for plain decoding; a model and "suffix" in a list: that where the text repeats itself, the
        model elsewhere; "tuned" or a .json file: what ``specdec tune`` found best, draft lengths too where a call leaves
        them open. See ``specdec.register_drafter`` for names of your own.
    tokenizer: the target's, or a directory or hub id that has it; by default the one next to its weights.
    draft_tokenizer: that of a draft model, if it is not the one next to its weights. A draft with another tokenizer than
        the target's guesses text, or the tokens that both have; see ``drafters/vocabularies.py``.
    tree: a draft model or feature head proposes trees of tokens, several where it is unsure; ``num_draft_tokens`` counts
        all of one.
    dtype: "float32", "bfloat16", "float16", "int8" (weights rounded to a byte each: another model, whose own law it
        then is that drafts never change), or "auto" for the checkpoint's own. draft_dtype: the same for the draft;
        ``dtype`` by default. device: "cpu", "cuda", or "auto". None of them applies to models that come as objects:
        those are run as they are.

    The engine of a model that came as an object keeps a packed copy of its weights: after changing them (training goes
    on, an adapter is merged) call ``load`` again. A call that notices a change raises ``ModelError``; writes through
    ``.data`` go unnoticed. ``specdec.plugin.generate`` takes the weights as they are in each call.

    Raises ``CheckpointError`` (missing or damaged), ``ModelError`` (weights not finite, cannot be run exactly),
    ``VocabularyError`` (target and draft share no token, or a tokenizer is missing), ``ConfigError`` (unknown dtype,
    device or drafter).
    """
    place, wanted = device_named(device), dtype_named(dtype)
    own = tokenizer_of(tokenizer)
    drafts_own = tokenizer_of(draft_tokenizer, "draft_tokenizer")
    tuned = tuned_for(draft, target, checkpoint_directory)
    if tuned is not None:
        draft = tuned.draft if len(tuned.draft) > 1 else next(iter(tuned.draft), None)
    if isinstance(target, CachedLM):
        model, target_lm = None, target
    else:
        model = load_module(target, dtype=wanted, device=place)
        target_lm = lm_of(model, in_bytes=is_rounded(target, wanted))
    own = own or find_tokenizer(target)
    vocab_size = _real_vocab_size(target_lm, own)
    drafts = dtype_named(dtype if draft_dtype is None else draft_dtype)
    drafter = make_drafter(draft, Target(target_lm, model, own, vocab_size, drafts, place), drafts_own)
    if tree:
        drafter = branching(drafter)
    make = Engine if tuned is None else partial(TunedEngine, tuned)
    return make(
        target_lm, drafter, tokenizer=own, eos_ids=_eos_ids(target, target_lm), vocab_size=vocab_size,
        costs_file=costs_file(target_lm, drafter),
    )  # fmt: skip


def costs_file(target: CachedLM, drafter: Drafter | None) -> Path:
    """Where measurements of these models on this machine are kept."""
    drafting = getattr(drafter, "model", drafter)
    found = [machine(), _description(target), type(drafter).__name__, _description(getattr(drafting, "lm", None))]
    name = hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()[:16]
    return cache_directory() / "costs" / f"{name}.json"


def _description(lm: CachedLM | None) -> list[Any]:
    """What the cost of a model's passes depends on."""
    if lm is None:
        return []
    model = getattr(lm, "model", lm)
    config = getattr(model, "config", None)
    shape = config.to_dict() if config is not None else None
    return [type(model).__name__, lm.mechanism, lm.vocab_size, str(lm.dtype), lm.in_bytes, str(lm.device), shape]


def accepted_length(target: Trainable, draft: Trainable, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per target pass when ``draft`` always proposes four: a greedy decode of all prompts as one batch."""
    device = target.embed_tokens.weight.device
    if draft.embed_tokens.weight.device != device:
        draft = copy.deepcopy(draft).to(device)
    engine = Engine(native_lm(target), ModelDrafter(native_lm(draft)))
    output = engine.generate(
        prompts, max_new_tokens=new_tokens, num_draft_tokens=DEFAULT_DRAFT_TOKENS, max_batch_size=len(prompts),
        eos_token_id=None,
    )  # fmt: skip
    return output.stats.mean_acceptance_length


def _real_vocab_size(lm: CachedLM, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Ids that may be generated: heads are often padded beyond the tokenizer's last id."""
    if tokenizer is None:
        return lm.vocab_size
    last = max(tokenizer.get_vocab().values())
    return min(lm.vocab_size, last + 1)


def _eos_ids(target: ModelLike, lm: CachedLM) -> frozenset[int]:
    """The target's end-of-text ids, from its generation config or its config."""
    config: Any = getattr(target, "generation_config", None)
    if isinstance(target, str | Path):
        directory = checkpoint_directory(str(target))
        if (directory / "generation_config.json").is_file():
            config = GenerationConfig.from_pretrained(directory)
        else:
            config = AutoConfig.from_pretrained(directory)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = getattr(getattr(target, "config", None), "eos_token_id", None)
    found = [ids] if isinstance(ids, int) else (ids or [])
    return frozenset(i for i in found if 0 <= i < lm.vocab_size)
