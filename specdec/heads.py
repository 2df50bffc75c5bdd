"""Feature heads for a target that exists: which kinds there are, and training one for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.checkpoints import load_lm, load_model
from specdec.distill import evaluating
from specdec.draft import Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.tokenmap import most_frequent
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.nn.block import BlockHead
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.nn.heads import FeatureHead
from specdec.places import check_apart, check_folder
from specdec.training import data
from specdec.training.checkpoint import refuse_others
from specdec.training.head_trainer import REPORT, HeadReport, HeadSettings, Model, train_head


@dataclass(frozen=True)
class Kind:
    """new: an untrained head for a target, of a width, that guesses these ids only; drafter: what drafts with a head."""

    new: Callable[..., FeatureHead]
    drafter: Callable[[Any, CachedLM], Drafter]


def _block_head(target: Model, draft_ids: Tensor | None, width: int = 0) -> BlockHead:
    if draft_ids is not None:
        raise ConfigError("a block drafter guesses every token; leave draft_vocab_size at 0")
    if width:
        raise ConfigError("a block drafter is as wide as its target, whose output it shares; leave width at 0")
    return BlockHead.for_target(target)


def _eagle3_head(target: Model, draft_ids: Tensor | None, width: int = 0) -> Eagle3Head:
    return Eagle3Head.for_target(target, draft_ids, width=width)


HEADS = {"eagle3": Kind(_eagle3_head, Eagle3Drafter), "block": Kind(_block_head, BlockDrafter)}


def train_checkpoint(
    target: str,
    kind: str,
    out: Path | None,
    text: str,
    settings: HeadSettings,
    *,
    draft_vocab_size: int = 0,
    width: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    fresh: bool = False,
) -> HeadReport:
    """Train a head of ``kind`` for a directory or hub id, on "stdlib" or the text below a path, into ``out``.

    draft_vocab_size: guess only so many of the text's most frequent tokens, 0 for all. width: of an EAGLE-3 head's hidden
    state, 0 for the target's; a narrower one drafts faster. Raises what ``load`` and ``train_head`` raise, and
    ``ConfigError`` when ``out`` is in use and not to be replaced (``fresh``), or holds anything but a head.
    """
    if kind not in HEADS:
        raise ConfigError(f"drafter must be one of {', '.join(HEADS)}, got {kind!r}")
    if out is None:
        raise ConfigError("a head needs a folder to be kept in; name it with out (--out)")
    check_apart(target, out)
    refuse_others(check_folder(out), lambda folder: (folder / REPORT).is_file())
    if (out / "config.json").exists() and not fresh:
        raise ConfigError(f"{out} exists; choose another folder, or replace what is there with fresh=True (--fresh)")
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    if not isinstance(model, GPT | PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"{target} must be a causal language model with a fast tokenizer (tokenizer.json)")
    corpus = data.gather("stdlib") if text == "stdlib" else data.gather("path", Path(text))
    lm = load_lm(model)
    if draft_vocab_size < 0 or draft_vocab_size > lm.vocab_size:
        raise ConfigError(f"draft_vocab_size must be from 0 to {lm.vocab_size}, got {draft_vocab_size}")
    trimmed = 0 < draft_vocab_size < lm.vocab_size
    ids = most_frequent(data.encode(tokenizer, corpus.training), draft_vocab_size + 1)[:-1] if trimmed else None

    def engine(head: FeatureHead) -> Engine:
        return Engine(lm, HEADS[kind].drafter(head, lm))

    with evaluating(model):
        torch.manual_seed(settings.seed)
        head = HEADS[kind].new(model.requires_grad_(False), ids, width)
        return train_head(model, head, tokenizer, corpus, out, settings, engine=engine)
