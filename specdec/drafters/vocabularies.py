"""Drafts whose vocabulary is not the target's (Timor et al. 2025, arXiv 2502.05202).

Sampling (token-level intersection): the draft's law over the tokens that both have, renormalised by the target's own
filters and written in the target's ids, is what tokens are drawn from, and so an exact law to report. Greedy
(string-level exact match): the draft's own text is encoded in the target's tokens, which are then certain proposals.
Either way a wrong encoding costs acceptance and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.draft import Draft
from specdec.drafters.model import ModelDrafter
from specdec.drafters.tokenmap import NONE, VOCABULARY_FILE, TokenMap, Vocabulary
from specdec.errors import VocabularyError
from specdec.lm.base import CachedLM
from specdec.sequences import Row, Sequences, Step

LOOKBEHIND = 16  # tokens before new text that are encoded once more with it, as it may change how they are split
_SETTLED = 4  # of these, tokens that only give the others what stands before them


class Transcript(Protocol):
    """The text of one row as ids of the draft model."""

    ids: list[int]

    def update(self, tokens: Sequence[int]) -> None:
        """The row's text is ``tokens`` now, of the target's ids; only what is new is looked at."""

    def continued(self, guessed: Sequence[int]) -> list[int]:
        """What the target's next tokens are if the draft's are ``guessed``."""


class MappedTranscript:
    """Of a draft whose tokens are the target's under other ids: id by id."""

    def __init__(self, token_map: TokenMap) -> None:
        self.ids: list[int] = []
        self._to_target, self._to_draft = token_map.lists

    def update(self, tokens: Sequence[int]) -> None:
        self.ids += [max(self._to_draft[token], 0) for token in tokens[len(self.ids) :]]

    def continued(self, guessed: Sequence[int]) -> list[int]:
        tokens = [self._to_target[i] for i in guessed]
        return tokens[: tokens.index(NONE)] if NONE in tokens else tokens


class EncodedTranscript:
    """Of a draft with another tokenizer: new text is encoded together with the latest tokens before it.

    The two encodings are joined at the first place past those tokens' beginning where both end a token. Special tokens
    are boundaries: they are mapped where the draft has their like, and left out where it has not.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary, token_map: TokenMap) -> None:
        self._target, self._draft = target, draft
        self._to_target, self._to_draft = token_map.lists
        self.ids: list[int] = list(draft.begin)
        self._ends = [0] * len(self.ids)  # where in the text each token ends
        self._text = bytearray()
        self._tail: list[int] = []  # the latest of the row's tokens, as far back as the latest special one
        self._floor = len(self.ids)  # the first token that may be encoded anew
        self._done = 0

    def update(self, tokens: Sequence[int]) -> None:
        text = bytearray()
        for token in tokens[self._done :]:
            piece = self._target.pieces[token] if token < len(self._target.pieces) else None
            if piece is not None:
                text += piece
                self._tail = [*self._tail[1 - LOOKBEHIND :], token]
                continue
            self._extend(text)
            text.clear()
            self._pass_special(token)
        self._extend(text)
        self._done = len(tokens)

    def continued(self, guessed: Sequence[int]) -> list[int]:
        text, last = bytearray(), NONE
        for i in guessed:
            piece = self._draft.pieces[i] if i < len(self._draft.pieces) else None
            if piece is None:
                last = self._to_target[i]
                break
            text += piece
        missing = self._text[self._ends[-1] if self._ends else 0 :]  # the draft has no token for these bytes
        if not text.startswith(missing):
            return []
        found = self._encoded(bytes(text[len(missing) :]))
        return [*found, last] if last != NONE else found

    def _extend(self, text: bytearray) -> None:
        if not text:
            return
        self._text += text
        begin = max(len(self.ids) - LOOKBEHIND, self._floor)
        start = self._ends[begin - 1] if begin else 0
        ids, ends = self._draft.encode(bytes(self._text[start:]))
        ends = [start + end for end in ends]
        old, new = self._joint(begin, ends) if begin > self._floor else (begin, 0)
        self.ids[old:], self._ends[old:] = ids[new:], ends[new:]

    def _joint(self, begin: int, ends: list[int]) -> tuple[int, int]:
        """How many tokens of the old encoding stay, and the first of the new one, which began at token ``begin``."""
        old = {self._ends[i]: i + 1 for i in range(begin + _SETTLED, len(self.ids))}
        return next(((old[end], i + 1) for i, end in enumerate(ends) if end in old), (begin, 0))

    def _pass_special(self, token: int) -> None:
        mapped = self._to_draft[token]
        is_known = mapped != NONE and self._to_target[mapped] == token
        if is_known and self.ids != [mapped]:  # a begin that the draft's tokenizer has put there already
            self.ids.append(mapped)
            self._ends.append(len(self._text))
        self._tail, self._floor = [], len(self.ids)

    def _encoded(self, text: bytes) -> list[int]:
        """The target's tokens for ``text`` that follows the row's, whose last character may be incomplete."""
        before = b"".join(piece for token in self._tail if (piece := self._target.pieces[token]))
        ids, ends = self._target.encode(before + text)
        if not before:
            return ids
        if len(before) in ends:  # what is there stays what it is
            return ids[len(ends) - ends[::-1].index(len(before)) :]
        ids, ends = self._target.encode(text)
        if ends[:1] == [0]:
            return ids[1:]  # without the space that some put before every text, here a token,
        first = self._target.ids.get(text[: ends[0]]) if ends else None
        return [] if first is None else [first, *ids[1:]]  # and here part of one


class VocabularyDrafter(ModelDrafter):
    """Drafts with a model that has a vocabulary of its own; ``transcript`` makes the text of a new row in its ids.

    What the model has read and the text does not begin with any more, because its end is split into other tokens now,
    is forgotten and read anew.
    """

    draws_itself = False

    def __init__(self, lm: CachedLM, token_map: TokenMap, transcript: Callable[[], Transcript]) -> None:
        super().__init__(lm)
        self.token_map = token_map.to(lm.device)
        self._new_transcript = transcript
        self._transcripts: dict[int, Transcript] = {}
        self._read: list[list[int]] = []  # what the cache of each slot holds
        self._pending: list[list[int]] = []  # what each row has read in the step under way
        self._room = 0

    def reserve(self, rows: int, length: int) -> None:
        super().reserve(rows, length)
        self._read.extend([] for _ in range(rows - len(self._read)))
        self._room = max(self._room, length)

    def observe(self, step: Step) -> None:
        if self._pending:
            kept = []
            for slot, (row, pending) in enumerate(zip(step.rows, self._pending, strict=True)):
                before = self.lm.lengths[slot]
                read = self._read[slot] + pending
                same = _common(read, self._text(row)[self.lm.starts[slot] : -1])
                kept.append(max(same - before, 0))
                self._read[slot] = read[: before + kept[-1]]
            self.lm.keep(kept)
            self._pending, self._unread = [], []
        for slot in step.finished:
            self.lm.remember(slot, self._read[slot])
            self._transcripts.pop(step.rows[slot].id, None)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.lm.copy(source, target)  # what the row's text does not begin with is forgotten in its first step
        self._read[target] = list(self._read[source])

    def free(self, rows: int) -> None:
        super().free(rows)
        self._read[rows:] = [[] for _ in self._read[rows:]]
        if rows == 0:
            self._transcripts.clear()
            self._pending, self._unread = [], []

    def _texts(self, sequences: Sequences) -> list[list[int]]:
        texts = [self._text(row) for row in sequences.rows]
        for slot, text in enumerate(texts):
            same = _common(self._read[slot], text[self.lm.starts[slot] : -1])
            if same < self.lm.lengths[slot]:
                self.lm.copy(slot, slot, same)
        longest = max(map(len, texts))
        if longest > self._room:  # in ids of the draft's a text may be longer
            self.reserve(len(self._read), 2 * longest)
        return texts

    def _new_tokens(self, sequences: Sequences, count: int) -> tuple[Tensor, list[int]]:
        padded_tokens, counts = super()._new_tokens(sequences, count)
        self._pending = []
        for slot, row in enumerate(sequences.rows):
            text, start, length = self._text(row), self.lm.starts[slot], self.lm.lengths[slot]
            self._read[slot] = text[start : start + length]
            self._pending.append(text[start + length :])
        return padded_tokens, counts

    def _text(self, row: Row) -> list[int]:
        if row.id not in self._transcripts:
            self._transcripts[row.id] = self._new_transcript()
        transcript = self._transcripts[row.id]
        transcript.update(row.tokens)
        return transcript.ids or [0]  # nothing of it can be written in the draft's tokens, and it must read something

    def _guess(self, sequences: Sequences, unread: Tensor, count: int, lengths: list[int]) -> Draft:
        guessed = self.lm.guess(unread, self._unread, count, self.lm.vocab_size).tolist()
        found = []
        for row, pending, ids, length in zip(sequences.rows, self._pending, guessed, lengths, strict=True):
            pending += ids[:-1]
            tokens = self._transcripts[row.id].continued(ids)[:length]
            unknown = (place for place, token in enumerate(tokens) if token >= sequences.vocab_size)
            found.append(tokens[: next(unknown, len(tokens))])
        return Draft.certain(found, sequences.device)

    def _law(self, sequences: Sequences, logits: Tensor, tokens: Tensor) -> Tensor:
        return super()._law(sequences, self.token_map.scatter(logits), tokens)

    def _own(self, tokens: Tensor) -> Tensor:
        own = self.token_map.to_draft[tokens.to(self.lm.device)].clamp(min=0)
        for pending, (i,) in zip(self._pending, own.tolist(), strict=True):
            pending.append(i)
        return own


def mapped_drafter(lm: CachedLM, token_map: TokenMap) -> VocabularyDrafter:
    """Of a model whose tokens are tokens of the target under ids of its own."""
    return VocabularyDrafter(lm, token_map, partial(MappedTranscript, token_map))


def model_drafter(
    lm: CachedLM,
    target: CachedLM,
    target_tokenizer: PreTrainedTokenizerBase | None,
    draft_tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    folder: str | Path = "",
) -> ModelDrafter:
    """Of a model whose weights lie in ``folder``, for a target of which ``vocab_size`` ids may be generated.

    Ids are taken as they are where both tokenizers have the same, and where one is missing and logits are equally wide.
    Raises ``VocabularyError`` where they are not, ``CheckpointError`` for a damaged ``vocabulary.safetensors``.
    """
    if folder and (file := Path(folder) / VOCABULARY_FILE).is_file():
        return mapped_drafter(lm, TokenMap.load(file, vocab_size=vocab_size, draft_size=lm.vocab_size))
    if target_tokenizer is not None and draft_tokenizer is not None:
        if target_tokenizer.get_vocab() == draft_tokenizer.get_vocab():
            return ModelDrafter(lm)
        return translating_drafter(lm, target_tokenizer, draft_tokenizer, vocab_size)
    if target.vocab_size != lm.vocab_size:
        raise VocabularyError(
            f"the target's logits have {target.vocab_size} entries and the draft's {lm.vocab_size}, and without both "
            "tokenizers it cannot be told what they share. Save the tokenizers next to the models, or pass tokenizer= and "
            "draft_tokenizer="
        )
    return ModelDrafter(lm)


def translating_drafter(
    lm: CachedLM, target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, vocab_size: int
) -> VocabularyDrafter:
    """Of a model with the tokenizer ``draft``, for a target with the tokenizer ``target`` and ``vocab_size`` ids.

    Where the two have the same tokens, they are taken to split text alike. Raises ``VocabularyError`` where they share
    none, or the model is an encoder-decoder.
    """
    if lm.encodes:
        raise VocabularyError(
            "a draft that is an encoder-decoder must share the target's vocabulary: both encoders read the same source"
        )
    ours, theirs, token_map = _shared(target, draft, vocab_size, lm.vocab_size)
    if ours.ids.keys() == theirs.ids.keys():
        return mapped_drafter(lm, token_map)
    return VocabularyDrafter(lm, token_map, partial(EncodedTranscript, ours, theirs, token_map))


@lru_cache(maxsize=4)  # Hugging Face's ``generate`` brings the same tokenizers with every call
def _shared(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, vocab_size: int, draft_size: int
) -> tuple[Vocabulary, Vocabulary, TokenMap]:
    ours, theirs = Vocabulary(target), Vocabulary(draft)
    return ours, theirs, TokenMap.between(ours, theirs, vocab_size=vocab_size, draft_size=draft_size)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
