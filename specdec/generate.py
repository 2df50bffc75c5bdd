"""``specdec.generate``: one call from a model and prompts to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from specdec.checkpoints import ModelLike, TokenizerLike
from specdec.drafting import DEFAULT, DraftLike
from specdec.load import load
from specdec.output import Output, Piece
from specdec.requests import Prompts, Settings


def generate(
    model: ModelLike,
    prompts: Prompts,
    *,
    draft: DraftLike = DEFAULT,
    tokenizer: TokenizerLike | None = None,
    draft_tokenizer: TokenizerLike | None = None,
    tree: bool = False,
    dtype: str = "auto",
    draft_dtype: str | None = None,
    device: str = "auto",
    attention_mask: Tensor | None = None,
    on_piece: Callable[[Piece], None] | None = None,
    **settings: Any,
) -> Output:
    """Generate text for every prompt, faster with a ``draft`` (None: plain decoding) and never different for it.

    ``model``, ``draft``, ``tokenizer``, ``draft_tokenizer``, ``tree``, ``dtype``, ``draft_dtype`` and ``device`` are those
    of ``specdec.load``, the others those of ``Engine.generate``; ``settings`` are the fields of ``specdec.Settings``. Use
    ``specdec.load`` to keep models between calls.
    """
    Settings.of(settings)  # what is wrong with the settings is said before a model is loaded
    engine = load(
        model, draft=draft, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, tree=tree, dtype=dtype,
        draft_dtype=draft_dtype, device=device,
    )  # fmt: skip
    return engine.generate(prompts, attention_mask=attention_mask, on_piece=on_piece, **settings)
