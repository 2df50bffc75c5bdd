"""What the tokens of two vocabularies have in common: the bytes of text they stand for, and ids that mean the same.

Byte-level vocabularies write a space as "Ġ" and every byte as a letter, SentencePiece's write "▁" and "<0xE2>". Compared
as bytes, which is what they decode to, they share what they can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.errors import CheckpointError, VocabularyError

VOCABULARY_FILE = "vocabulary.safetensors"  # beside a draft with a vocabulary of its own
NONE = -1  # in maps: no such token

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
# GPT-2's letters for bytes (Radford et al. 2019): printable ones stand for themselves.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Vocabulary:
    """The tokens of a tokenizer as text, and text as its tokens.

    pieces[i] are the bytes that id i stands for, None for special tokens and ids that are none; ``ids`` is the way
    back; ``specials`` are special tokens by their names; ``begin`` is what the tokenizer puts before every text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos = tokenizer.eos_token_id
        names = {i: token for token, i in tokenizer.get_vocab().items()}
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.specials = {names[i]: i for i in sorted(special & names.keys())}
        self.pieces: list[bytes | None] = [None] * (max(names, default=NONE) + 1)
        for i, piece in _pieces(tokenizer, {i: name for i, name in names.items() if i not in special}):
            self.pieces[i] = piece
        # The first of several ids for the same bytes, and one that is only for want of a better only if it must be.
        order = sorted(names, key=lambda i: (_BYTE_FALLBACK.fullmatch(names[i]) is None, -i))
        self.ids = {piece: i for i in order if (piece := self.pieces[i])}
        self.begin = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
        self._widths = [
            len(piece if piece is not None else names.get(i, "").encode()) for i, piece in enumerate(self.pieces)
        ]
        self._tokenizer: Any = tokenizer
        if hasattr(tokenizer, "backend_tokenizer"):  # faster by half, and a copy has no truncation or padding
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def encode(self, text: bytes) -> tuple[list[int], list[int]]:
        """Ids of ``text``, no special ones added, and where in it each of them ends.

        Bytes that are no UTF-8 become the tokens of single bytes, or nothing where there are none. Ends are right for
        tokenizers that keep the text as it is, and close for those that do not.
        """
        ids: list[int] = []
        ends: list[int] = []
        begin = 0
        for run in _UNDECODABLE.split(text.decode("utf-8", "surrogateescape")):
            data = run.encode("utf-8", "surrogateescape")
            if run and _UNDECODABLE.match(run):
                known = [(self.ids[byte], begin + i) for i, byte in enumerate(_single(data), 1) if byte in self.ids]
                ids += [i for i, _ in known]
                ends += [end for _, end in known]
            elif run:
                found = self._encode(run)
                widths = [self._widths[i] for i in found]
                place = (
                    begin - 1 if sum(widths) == len(data) + 1 else begin
                )  # a space before the text, as if between words
                places = [min(place + so_far, begin + len(data)) for so_far in accumulate(widths)]
                ends += [*places[:-1], begin + len(data)][: len(found)]
                ids += found
            begin += len(data)
        return ids, ends

    def _encode(self, text: str) -> list[int]:
        found: Any = self._tokenizer.encode(text, add_special_tokens=False)
        return list(found if isinstance(found, list) else found.ids)


_UNDECODABLE = re.compile("([\udc80-\udcff]+)")  # as "surrogateescape" decodes bytes that are no UTF-8


def _single(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def _pieces(tokenizer: PreTrainedTokenizerBase, names: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    """The bytes of every token, by what the tokenizer's decoder does with their names."""
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" in decoder:
        for i, name in names.items():
            known = all(letter in _BYTE_OF for letter in name)  # tokens added later are written as they are
            yield i, bytes(_BYTE_OF[letter] for letter in name) if known else name.encode()
    elif any(name.startswith(_SPACE) for name in names.values()):
        for i, name in names.items():
            fallback = _BYTE_FALLBACK.fullmatch(name)
            yield i, bytes([int(fallback[1], 16)]) if fallback else name.replace(_SPACE, " ").encode()
    elif names:
        before = min(names)
        width = len(tokenizer.decode([before]))
        for i in names:
            yield i, tokenizer.decode([before, i])[width:].encode()


@dataclass(frozen=True)
class TokenMap:
    """Ids of a draft model and of the target that mean the same.

    to_target [W] int64: the target's id of each of the draft's, -1 for none. to_draft [V] int64: what the draft reads
    for each of the target's; -1, or its token for everything unknown, where it has none.
    """

    to_target: Tensor
    to_draft: Tensor

    @classmethod
    def of(cls, to_target: Tensor, vocab_size: int) -> TokenMap:
        """From ``to_target`` [W]; ids that none of the ``vocab_size`` target's is mapped to: the first is for unknown.

        Raises ``VocabularyError`` where two ids mean the same, an id is none of the target's, or all are unknown.
        """
        known = (to_target != NONE).nonzero().flatten()
        targets = to_target[known]
        if not len(targets) or int(targets.min()) < 0 or int(targets.max()) >= vocab_size:
            raise VocabularyError(
                f"a draft's ids must be mapped to ids of the target, from 0 to {vocab_size - 1}, or -1, and some to the "
                f"former; got {to_target.tolist()[:8]}... for {len(to_target)} ids"
            )
        if len(targets.unique()) < len(targets):
            raise VocabularyError("two ids of the draft are mapped to the same id of the target; one must be -1")
        unknown = (to_target == NONE).nonzero().flatten()[:1]
        to_draft = torch.full((vocab_size,), int(unknown) if len(unknown) else NONE)
        to_draft[targets] = known
        return cls(to_target, to_draft)

    @classmethod
    def between(cls, target: Vocabulary, draft: Vocabulary, *, vocab_size: int, draft_size: int) -> TokenMap:
        """What two vocabularies share: tokens of the same bytes, special ones of the same name, the end of text.

        Raises ``VocabularyError`` where that is nothing.
        """
        pairs = {i: target.ids[piece] for piece, i in draft.ids.items() if piece in target.ids}
        pairs |= {i: target.specials[name] for name, i in draft.specials.items() if name in target.specials}
        if draft.eos is not None and target.eos is not None and target.eos not in pairs.values():
            pairs.setdefault(draft.eos, target.eos)
        pairs = {i: other for i, other in pairs.items() if i < draft_size and other < vocab_size}
        if not pairs:
            raise VocabularyError(
                f"target and draft share no token (of {len(target.ids)} and {len(draft.ids)}); use another draft"
            )
        to_target = torch.full((draft_size,), NONE)
        to_target[list(pairs)] = torch.tensor(list(pairs.values()))
        return cls.of(to_target, vocab_size)

    @classmethod
    def load(cls, file: Path, *, vocab_size: int, draft_size: int) -> TokenMap:
        """The map in a draft's ``vocabulary.safetensors``: ``d2t`` int64 [W]. Raises CheckpointError."""
        try:
            d2t = load_file(file)["d2t"]
            if d2t.dtype != torch.int64 or d2t.shape != (draft_size,):
                raise ValueError(f"d2t must be int64 [{draft_size}], got {d2t.dtype} {list(d2t.shape)}")
            return cls.of(d2t, vocab_size)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file} does not describe the draft's vocabulary: {error}") from error

    def save(self, file: Path) -> None:
        """Write ``to_target`` as ``d2t``."""
        save_file({"d2t": self.to_target.cpu()}, file)

    def to(self, device: torch.device) -> TokenMap:
        """The same map on ``device``."""
        return TokenMap(self.to_target.to(device), self.to_draft.to(device))

    def scatter(self, logits: Tensor) -> Tensor:
        """A draft's logits [..., W] in the target's ids, [..., V]; -inf for tokens that the draft does not have."""
        known, targets = self._known
        result = logits.new_full((*logits.shape[:-1], len(self.to_draft)), -torch.inf)
        return result.index_copy_(-1, targets, logits[..., known])

    def gather(self, logits: Tensor) -> Tensor:
        """A target's logits [..., V] in the draft's ids, [..., W]; -inf for ids that mean nothing to the target."""
        result = logits[..., self.to_target.clamp(min=0)]
        return result.masked_fill(self.to_target == NONE, -torch.inf)

    @cached_property
    def lists(self) -> tuple[list[int], list[int]]:
        """``to_target`` and ``to_draft`` as lists."""
        return self.to_target.tolist(), self.to_draft.tolist()

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """The draft's ids that have a counterpart, and what it is."""
        known = (self.to_target != NONE).nonzero().flatten()
        return known, self.to_target[known]


def most_frequent(tokens: Tensor, count: int, always: Sequence[int] = ()) -> Tensor:
    """``to_target`` [count] of a draft's vocabulary: the most frequent of ``tokens`` [N], ``always``, one for unknown."""
    counts = torch.bincount(tokens.long())
    counts = torch.nn.functional.pad(counts, (0, max([0, *(i + 1 - len(counts) for i in always)])))
    counts[list(always)] = len(tokens) + 1
    chosen = counts.argsort(descending=True, stable=True)[: count - 1].sort().values
    return torch.cat([chosen, torch.tensor([NONE])])
