"""Names, paths and models become drafters; the only file that knows every one.

A name (``NAMES``) stands for a drafter that needs no files. A folder says in its config.json which kind it holds
(``KINDS``); one that says nothing is a draft model. Whatever comes here may be as unknown as a user's own drafter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from specdec.checkpoints import ModelLike, checkpoint_directory, find_tokenizer, load_lm
from specdec.draft import Drafter
from specdec.drafters.block import BlockDrafter, BlockTreeDrafter
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3TreeDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.own import SelfDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.drafters.vocabularies import model_drafter
from specdec.errors import CheckpointError, ConfigError
from specdec.lm.base import CachedLM
from specdec.nn.block import BlockHead
from specdec.nn.eagle3 import Eagle3Head

DraftLike = ModelLike | Drafter | Sequence[ModelLike | Drafter] | None
METHODS = ("reserve", "propose", "observe", "copy", "free")  # of a ``Drafter``
DEFAULT = "suffix"  # where no drafter is named: it costs nothing where it finds nothing


@dataclass(frozen=True)
class Target:
    """What a drafter is made for.

    model: the target's weights, for drafters that share some of them; None where it came as a ``CachedLM``.
    vocab_size: ids that may be generated. dtype (None: each checkpoint's own) and device are those that were asked for.
    """

    lm: CachedLM
    model: nn.Module | None
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    dtype: torch.dtype | None
    device: torch.device


NAMES: dict[str, Callable[[Target], Drafter]] = {
    "suffix": lambda target: SuffixDrafter(),
    "self": lambda target: SelfDrafter(target.lm),
}
# By config.json's "specdec_drafter", or by "speculators_model_type", as the speculators library writes it.
KINDS: dict[str, Callable[[Path, Target], Drafter]] = {
    "eagle3": lambda folder, target: Eagle3Drafter(Eagle3Head.load(folder), target.lm),
    "block": lambda folder, target: BlockDrafter(BlockHead.load(folder), target.lm),
}

_OWN_NAMES = frozenset(NAMES) | {"tuned"}


def register_drafter(name: str, factory: Callable[[CachedLM], Drafter]) -> None:
    """From now on ``draft=name`` is what ``factory`` makes for a target.

    The library's own names are taken; others may be given anew. Raises ``ConfigError``.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ConfigError(f"a drafter's name must be lower-case letters, digits, - and _, got {name!r}")
    if name in _OWN_NAMES:
        raise ConfigError(f"{name!r} is the name of specdec's own drafter; take another (not {_known()})")
    if not callable(factory):
        raise ConfigError(f"the factory of {name!r} must be callable with a target and give a Drafter, got {factory!r}")
    NAMES[name] = lambda target: factory(target.lm)


def make_drafter(draft: DraftLike, target: Target, tokenizer: PreTrainedTokenizerBase | None = None) -> Drafter | None:
    """The drafter that ``draft`` names or is, for ``target``; None for None. Errors are those of ``load``.

    tokenizer: that of a draft model, where it is not the one next to its weights.
    """
    if tokenizer is not None and not any(map(_is_model, draft if isinstance(draft, list | tuple) else [draft])):
        raise ConfigError(f"draft_tokenizer goes with a draft model, and draft is {draft!r}; leave it out")
    if draft is None:
        return None
    if isinstance(draft, Sequence) and not isinstance(draft, str):
        return _hybrid([make_drafter(part, target, tokenizer if _is_model(part) else None) for part in draft])
    if isinstance(draft, str) and draft in NAMES:
        return _whole(NAMES[draft](target), f"what {draft!r} stands for")
    if isinstance(draft, str | Path):
        return _from_folder(draft, target, tokenizer)
    if isinstance(draft, nn.Module | CachedLM):
        return _model_drafter(draft, target, tokenizer)
    if hasattr(draft, "propose") or hasattr(draft, "observe"):
        return _whole(draft)
    raise ConfigError(f"draft must be a path, a hub id, a model, a Drafter, None or one of {_known()}, got {draft!r}")


def _whole(drafter: Drafter, what: str = "draft") -> Drafter:
    """``drafter``, if it is one whole: an object with every method of the protocol. Raises ``ConfigError``."""
    if isinstance(drafter, type):
        raise ConfigError(
            f"{what} must be a drafter, got the class {drafter.__name__}; pass an object of it: {drafter.__name__}(...)"
        )
    missing = [name for name in METHODS if not callable(getattr(drafter, name, None))]
    if missing:
        raise ConfigError(
            f"{what} must have the methods {', '.join(METHODS)} of a specdec.Drafter, and {type(drafter).__name__} lacks "
            f"{', '.join(missing)}; add what is missing (its body may be ...), see CONTRIBUTING.md"
        )
    return drafter


def check_encoder(draft: CachedLM, target: CachedLM) -> None:
    """Raise ``ConfigError`` for a draft model with an encoder where the target has none."""
    if draft.encodes and not target.encodes:
        raise ConfigError(
            "the draft is an encoder-decoder and the target is not, so there is no source for its encoder to read; "
            "take a decoder-only draft, or 'suffix'"
        )


def branching(drafter: Drafter | None) -> Drafter:
    """``drafter``, proposing trees of tokens in place of chains; ``ConfigError`` for one that cannot."""
    if type(drafter) is ModelDrafter and drafter.lm.reads_trees:
        return TreeDrafter(drafter.lm)
    if type(drafter) is Eagle3Drafter:
        return Eagle3TreeDrafter.of(drafter)
    if type(drafter) is BlockDrafter:
        return BlockTreeDrafter.of(drafter)
    if getattr(drafter, "drafts_trees", False):
        assert drafter is not None
        return drafter
    raise ConfigError(
        "tree=True goes with an EAGLE-3 or block head, or a draft model that has the target's tokenizer and reads trees in "
        f"one pass, and draft is {type(drafter).__name__ if drafter is not None else None}; leave it out"
    )


def _is_model(draft: object) -> bool:
    return isinstance(draft, str | Path | nn.Module | CachedLM) and not (isinstance(draft, str) and draft in NAMES)


def _from_folder(name: str | Path, target: Target, tokenizer: PreTrainedTokenizerBase | None) -> Drafter:
    """The drafter of the kind that the folder's config.json names; a draft model where it names none."""
    try:
        folder = checkpoint_directory(str(name))
    except CheckpointError as error:
        if "/" in str(name):
            raise
        raise CheckpointError(f"{error}. Drafters that go by a name: {_known()}") from error
    kind = _kind(folder)
    if kind is None:
        return _model_drafter(name, target, tokenizer)
    if kind not in KINDS:
        raise CheckpointError(
            f"{folder}/config.json names a drafter of kind {kind!r}; known are {', '.join(sorted(KINDS)) or 'none'}"
        )
    return KINDS[kind](folder, target)


def _kind(folder: Path) -> str | None:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("specdec_drafter") or config.get("speculators_model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}; restore it from its source") from error


def _model_drafter(draft: ModelLike, target: Target, tokenizer: PreTrainedTokenizerBase | None) -> Drafter:
    lm = load_lm(draft, dtype=target.dtype, device=target.device)
    if lm is target.lm:
        raise ConfigError("target and draft are the same CachedLM object, and so the same cache; make a second one")
    check_encoder(lm, target.lm)
    named = isinstance(draft, str | Path)
    folder = checkpoint_directory(str(draft)) if named else getattr(draft, "name_or_path", "")
    return model_drafter(lm, target.lm, target.tokenizer, tokenizer or find_tokenizer(draft), target.vocab_size, folder)


def _hybrid(parts: list[Drafter | None]) -> Drafter:
    lookups = [part for part in parts if isinstance(part, SuffixDrafter)]
    others = [part for part in parts if part is not None and not isinstance(part, SuffixDrafter)]
    if len(parts) != 2 or len(lookups) != 1 or len(others) != 1:
        raise ConfigError('a list of drafters must be one model and "suffix", for example draft=["./draft", "suffix"]')
    return HybridDrafter(others[0], lookups[0])


def _known() -> str:
    return ", ".join(sorted(NAMES))
