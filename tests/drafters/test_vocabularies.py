"""Drafts with another vocabulary: what is shared, text that is kept up in other tokens, and the target's law as ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import specdec
from specdec import CheckpointError, ConfigError, Draft, Engine, Output, VocabularyError
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tokenmap import NONE, TokenMap, Vocabulary, most_frequent
from specdec.drafters.vocabularies import (
    LOOKBEHIND,
    EncodedTranscript,
    MappedTranscript,
    VocabularyDrafter,
    mapped_drafter,
    translating_drafter,
)
from specdec.lm.base import CachedLM
from specdec.sequences import Sequences
from test_law import ALPHA, ONE, TARGET, UNEQUAL, VOCAB, alarm, sample
from toys import TableLM, native, random_table, tiny_gpt

SENTENCES = [
    "the quick brown fox jumps over the lazy dog. the lazy dog sleeps.\n",
    "naïve café — ünïcödé 😀🎉 emoji and 漢字 text.\n\n    indented\tcode(x, y) = 42;\n",
    "she sells sea shells by the sea shore; the shells she sells are sea shells for sure.\n",
]
TEXT = "".join(SENTENCES)
PROMPTS = ["the quick", "she sells sea", "😀 naïve", "x", "the sea shore; " * 5, "a b c", "ü", "漢字 text"]
LENGTHS = [7, 30, 25, 40, 11, 32, 8, 26]


@lru_cache
def byte_level(size: int) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have: every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@lru_cache
def metaspace(size: int) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have: spaces are "▁", characters that are no token are spelt as "<0xE2>"."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        SENTENCES[::2],
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=[*special, *spelt], unk_token="<unk>", show_progress=False
        ),
    )
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def letters(names: list[str], merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few tokens."""
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges or []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": partial(byte_level, 370),
    "fewer bytes": partial(byte_level, 300),
    "metaspace": partial(metaspace, 330),
}
every_pair = pytest.mark.parametrize(
    ("ours", "theirs"), [("bytes", "fewer bytes"), ("fewer bytes", "bytes"), ("bytes", "metaspace"), ("metaspace", "bytes")]
)  # fmt: skip


class KnowsText(CachedLM):
    """A language model that knows one text by heart, and after it the end of text.

    Any token that fits may come next, longer ones first. Whatever it does not know is followed by token 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str = TEXT) -> None:
        vocabulary = Vocabulary(tokenizer)
        super().__init__(len(tokenizer), 4096, torch.device("cpu"), torch.float32)
        self.pieces, self.eos, self.text = vocabulary.pieces, vocabulary.eos, text.encode()
        self.ids = vocabulary.ids
        self.rows: list[list[int]] = []

    def _reserve(self, rows: int, length: int) -> None:
        self.rows.extend([] for _ in range(rows - len(self.rows)))

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for b, (ids, length) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
            row = self.rows[first + b]
            row[length:] = ids
            for t in range(len(ids)):
                for i, width in self._next(row[: length + t + 1]):
                    logits[b, t, i] = 20.0 + 4.0 * width
        return logits

    def _next(self, ids: list[int]) -> list[tuple[int, int]]:
        """Tokens that fit, and their widths."""
        read = b"".join(self.pieces[i] or b"" for i in ids).lstrip(b" ")
        if not read or not self.text.startswith(read):
            return [(0, 0)]
        rest = self.text[len(read) :]
        return [(i, len(piece)) for piece, i in self.ids.items() if rest.startswith(piece)] or [(self.eos, 0)]

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _copy(self, source: int, target: int, length: int) -> None:
        self.rows[target] = self.rows[source][:length]

    def _wipe(self, first: int, last: int) -> None:
        self.rows[first:last] = [[] for _ in range(first, last)]


# --- Tokens as bytes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_bytes_they_decode_to(name: str) -> None:
    vocabulary = Vocabulary(TOKENIZERS[name]())
    for text in (TEXT, " a", "a  b", "漢", "\n\n"):
        ids, ends = vocabulary.encode(text.encode())
        joined = b"".join(vocabulary.pieces[i] or b"?" for i in ids)
        assert joined in (text.encode(), b" " + text.encode())
        assert ends == sorted(ends) and ends[-1] == len(text.encode())
        assert [joined[: len(joined) - len(text.encode()) + end] for end in ends][-1] == joined
    broken = b"ab\xf0\x9f cd\xff"
    ids, ends = vocabulary.encode(broken)
    assert b"".join(vocabulary.pieces[i] or b"?" for i in ids).replace(b" ", b"") == broken.replace(b" ", b"")


def test_what_a_tokenizer_was_told_last_does_not_cut_texts() -> None:
    tokenizer = letters(["a", "b"])
    tokenizer.pad_token = "a"
    tokenizer("ab", truncation=True, max_length=1, padding="max_length")
    assert Vocabulary(tokenizer).encode(b"abab")[0] == [0, 1, 0, 1]


def test_tokens_without_bytes_of_their_own_are_what_they_add_to_a_text() -> None:
    """Of a decoder that is neither byte-level nor SentencePiece's: here words, with a space between them."""
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<u>": 2}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<u>"))
    assert vocabulary.pieces == [b" one", b" two", None]


def test_shared_tokens_are_those_of_the_same_bytes() -> None:
    ours, theirs = Vocabulary(byte_level(370)), Vocabulary(metaspace(330))
    found = TokenMap.between(ours, theirs, vocab_size=370, draft_size=400)
    assert found.to_target.shape == (400,) and found.to_draft.shape == (370,)
    pairs = [(i, target) for i, target in enumerate(found.to_target.tolist()) if target != NONE]
    assert len(pairs) > 200 and all(found.to_draft[target] == i for i, target in pairs)
    end = (metaspace(330).eos_token_id, byte_level(370).eos_token_id)
    assert end in pairs
    assert all(theirs.pieces[i] == ours.pieces[target] for i, target in pairs if (i, target) != end)
    names = {theirs.pieces[i] for i, _ in pairs}
    assert {b" s", b"\xc3", b"\n"} <= names and any(len(name) > 2 and name.startswith(b" ") for name in names if name)


def test_a_map_moves_laws_and_loses_nothing_that_is_shared() -> None:
    found = TokenMap.of(torch.tensor([3, NONE, 0, NONE, 4]), vocab_size=6)
    logits = torch.arange(5.0)
    assert found.scatter(logits).tolist() == [2, -torch.inf, -torch.inf, 0, 4, -torch.inf]
    assert found.gather(torch.arange(6.0)).tolist() == [3, -torch.inf, 0, -torch.inf, 4]
    assert found.to_draft.tolist() == [2, 1, 1, 0, 4, 1]  # the first id that means nothing stands for the unknown


def test_maps_that_are_none_are_refused(tmp_path: Path) -> None:
    for wrong, match in [([NONE, NONE], "some to the former"), ([0, 6], "from 0 to 5"), ([0, 0], "the same id")]:
        with pytest.raises(VocabularyError, match=match):
            TokenMap.of(torch.tensor(wrong), vocab_size=6)
    with pytest.raises(VocabularyError, match="share no token"):
        TokenMap.between(Vocabulary(letters(["a"])), Vocabulary(letters(["b"])), vocab_size=1, draft_size=1)
    file = tmp_path / "vocabulary.safetensors"
    TokenMap.of(torch.tensor([2, NONE, 1]), vocab_size=6).save(file)
    assert TokenMap.load(file, vocab_size=6, draft_size=3).to_target.tolist() == [2, NONE, 1]
    with pytest.raises(CheckpointError, match=r"d2t must be int64 \[4\]"):
        TokenMap.load(file, vocab_size=6, draft_size=4)
    with pytest.raises(CheckpointError, match="from 0 to 1"):
        TokenMap.load(file, vocab_size=2, draft_size=3)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="does not describe the draft's vocabulary"):
        TokenMap.load(file, vocab_size=6, draft_size=3)


# --- A row's text in other tokens


def transcript(ours: str, theirs: str) -> tuple[EncodedTranscript, Vocabulary, Vocabulary]:
    target, draft = (Vocabulary(TOKENIZERS[name]()) for name in (ours, theirs))
    sizes = {"vocab_size": len(target.pieces), "draft_size": len(draft.pieces)}
    return EncodedTranscript(target, draft, TokenMap.between(target, draft, **sizes)), target, draft


@every_pair
@pytest.mark.parametrize("step", [1, 3, 50])
def test_a_text_that_grows_is_encoded_as_if_it_came_at_once(ours: str, theirs: str, step: int) -> None:
    found, target, draft = transcript(ours, theirs)
    tokens = target.encode((TEXT * 3).encode())[0]
    for end in range(0, len(tokens) + step, step):
        found.update(tokens[:end])
    expected = [*draft.begin, *draft.encode(b"".join(target.pieces[i] or b"" for i in tokens))[0]]
    assert found.ids == expected


def test_new_tokens_cost_the_same_however_long_the_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found, target, draft = transcript("bytes", "metaspace")
    tokens = target.encode((TEXT * 20).encode())[0]
    found.update(tokens[:-20])
    widths: list[int] = []
    encode = draft.encode
    monkeypatch.setattr(draft, "encode", lambda text: (widths.append(len(text)), encode(text))[1])
    for end in range(len(tokens) - 20, len(tokens) + 1):
        found.update(tokens[:end])
    assert len(widths) == 20 and max(widths) < 10 * LOOKBEHIND < len(TEXT) * 20 / 10


def test_special_tokens_are_mapped_and_never_part_of_a_text() -> None:
    found, target, draft = transcript("metaspace", "bytes")
    text = target.encode(b"the dog")[0]
    assert target.begin == [1] and draft.begin == []
    found.update([1, *text, 2, *text])  # <s> is unknown to the draft, </s> is its end of text
    words = draft.encode(b" the dog")[0]
    assert found.ids == [*words, draft.eos, *words]
    backwards, target, draft = transcript("bytes", "metaspace")
    backwards.update([target.eos, *target.encode(b"the dog")[0]])
    assert backwards.ids == [1, 2, *draft.encode(b"the dog")[0]]  # the draft's own beginning comes first
    same, target, draft = transcript("metaspace", "metaspace")
    same.update([1, *text])
    assert same.ids == [1, *text]  # and only once


def test_a_continuation_is_the_targets_tokens_from_the_end_of_the_row_on() -> None:
    found, target, draft = transcript("fewer bytes", "bytes")
    for before, after in [("she sells sea", " shells by"), ("she sel", "ls sea"), ("naïve ", "😀🎉"), ("", "the fox")]:
        row = EncodedTranscript(target, draft, found_map(found))
        row.update(target.encode(before.encode())[0])
        tokens = row.continued(draft.encode(after.encode())[0])
        assert b"".join(target.pieces[i] or b"" for i in tokens) == after.encode(), before
    emoji = "😀".encode()
    row = EncodedTranscript(target, draft, found_map(found))
    row.update([*target.encode(b"a ")[0], *(target.ids[bytes([byte])] for byte in emoji[:2])])
    rest = [draft.ids[bytes([byte])] for byte in emoji[2:]]
    assert b"".join(target.pieces[i] or b"" for i in row.continued(rest)) == emoji[2:]
    assert row.continued([*rest, draft.eos, *rest])[-1] == target.eos


def unigram(pieces: dict[str, float]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces.items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def continuation(target: Vocabulary, draft: Vocabulary, before: bytes, guessed: bytes) -> bytes:
    """What follows the target's tokens of single characters ``before`` if the draft goes on with ``guessed``."""
    row = EncodedTranscript(target, draft, TokenMap.between(target, draft, vocab_size=300, draft_size=300))
    row.update([target.ids[bytes([byte])] for byte in before])
    tokens = row.continued([draft.ids[piece] for piece in guessed.split(b"|")])
    return b"|".join(target.pieces[i] or b"" for i in tokens)


def test_a_continuation_is_split_as_behind_the_text_and_not_as_at_a_beginning() -> None:
    """SentencePiece puts a space before every text, which is not there in the middle of a word."""
    pieces = {
        "▁": -9.0,
        "▁s": -2.0,
        "s": -4.0,
        "ells": -1.0,
        "▁e": -3.0,
        "e": -6.0,
        "lls": -3.0,
        "t": -2.0,
        "sta": -0.1,
    }
    target, draft = Vocabulary(unigram({**pieces, "a": -5.0})), Vocabulary(byte_level(257))
    assert continuation(target, draft, b"s", b"e|l|l|s") == b"ells"  # and not " e|lls"
    # Behind "s" there is no place for "ta" but in "sta", which the row does not have.
    assert continuation(target, draft, b"s", b"t|a") == b"t|a"
    assert continuation(target, draft, b"t", b"s|t|a") == b"sta"


def test_a_continuation_begins_with_the_bytes_that_the_draft_has_no_token_for() -> None:
    emoji = "😀".encode()
    as_bytes = Vocabulary(byte_level(257))
    whole = Vocabulary(letters(["a", "".join(pre_tokenizers.ByteLevel.alphabet())[:1], "ðŁĺĢ"]))
    assert whole.pieces[2] == emoji
    halves = b"|".join(emoji[i : i + 1] for i in (2, 3))
    assert continuation(as_bytes, whole, b"a" + emoji[:2], emoji + b"|a") == halves + b"|a"
    assert continuation(as_bytes, whole, b"a" + emoji[:2], b"a|a|a") == b""


def found_map(row: EncodedTranscript) -> TokenMap:
    return TokenMap(torch.tensor(row._to_target), torch.tensor(row._to_draft))


# --- Drafting


class Checked(VocabularyDrafter):
    """Compares what the draft's cache holds with the rows' texts in its tokens, before every draft."""

    def _new_tokens(self, sequences: Sequences, count: int) -> tuple[Tensor, list[int]]:
        found = super()._new_tokens(sequences, count)
        assert isinstance(self.lm, KnowsText)
        for slot, row in enumerate(sequences.rows):
            read = self.lm.lengths[slot]
            assert self.lm.rows[slot][:read] == self._text(row)[:read] and found[1][slot] == len(self._text(row)) - read
        return found


def engines(ours: str, theirs: str, context: int = 256) -> tuple[Engine, Engine]:
    """A target with a draft that speaks otherwise, and the target alone; random models."""
    target, draft = TOKENIZERS[ours](), TOKENIZERS[theirs]()
    model = native(tiny_gpt(0, vocab_size=len(target)))
    drafter = translating_drafter(
        native(tiny_gpt(1, vocab_size=len(draft), context=context)), target, draft, len(target)
    )
    return Engine(model, drafter, tokenizer=target), Engine(model, tokenizer=target)


@every_pair
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "top_k": 50}, {"repetition_penalty": 1.3}])
def test_texts_are_the_targets_whatever_the_batch(ours: str, theirs: str, settings: dict[str, Any]) -> None:
    fast, plain = engines(ours, theirs)
    given = {"max_new_tokens": LENGTHS, "seed": 3, "rule": "coupled", "eos_token_id": None, **settings}
    expected = plain.generate(PROMPTS, **given).token_ids
    for size in (1, 3, 8):
        output = fast.generate(PROMPTS, max_batch_size=size, num_draft_tokens=4, **given)
        assert output.token_ids == expected and output.stats.num_draft_tokens > 100
        assert isinstance(fast.drafter, VocabularyDrafter)
        assert not any(fast.drafter.lm.lengths) and not any(fast.drafter._read) and not fast.drafter._transcripts


@every_pair
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_knows_the_text_is_accepted(ours: str, theirs: str, temperature: float) -> None:
    """Greedy and sampled, with emoji and other characters of several bytes, up to the end of text."""
    target, draft = TOKENIZERS[ours](), TOKENIZERS[theirs]()
    found = translating_drafter(KnowsText(draft), target, draft, len(target))
    found.__class__ = Checked
    engine = Engine(KnowsText(target), found, tokenizer=target, eos_ids=frozenset([target.eos_token_id]))
    prompts = [TEXT[:n] for n in (3, 20, 21, 90)]
    output = engine.generate(prompts, max_new_tokens=300, num_draft_tokens=4, temperature=temperature, seed=0)
    assert output.texts is not None and output.finish_reasons == ["eos"] * 4
    assert [prompt + text for prompt, text in zip(prompts, output.texts, strict=True)] == [TEXT] * 4
    assert output.stats.mean_acceptance_length > (2.0 if temperature == 0 else 1.4)
    assert any(flags[-1] for flags in output.from_draft)  # the end of text was drafted


def test_half_a_character_is_no_obstacle() -> None:
    """A target that ends a token inside of an emoji, and a draft that has it as one."""
    found = translating_drafter(KnowsText(byte_level(370), "a 😀🎉 b" * 9), byte_level(257), byte_level(370), 257)
    engine = Engine(KnowsText(byte_level(257), "a 😀🎉 b" * 9), found, tokenizer=byte_level(257))
    output = engine.generate(["a 😀", "a 😀🎉 ba "], max_new_tokens=60, num_draft_tokens=4, eos_token_id=None)
    assert output.texts is not None and output.texts[1].startswith("😀🎉 ba 😀🎉 ba")
    assert output.stats.mean_acceptance_length > 2.5


def test_what_was_refused_is_dropped_and_what_was_accepted_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Id by id no text is ever split otherwise, so that nothing that was kept has to be forgotten."""
    table, identity = random_table(7, 1), TokenMap.of(torch.arange(7), vocab_size=7)
    for target, kept in ((table, 1.0), (table + random_table(7, 2), None)):
        drafter = mapped_drafter(TableLM(table, context=256), identity)
        copies: list[Any] = []
        monkeypatch.setattr(drafter.lm, "copy", lambda *slots, copies=copies: copies.append(slots))
        for temperature in (0.0, 1.0):
            output = Engine(TableLM(target, context=256), drafter).generate(
                [[1, 2, 3]], max_new_tokens=41, num_draft_tokens=4, temperature=temperature, rule="rejection", seed=0
            )
            assert not copies and (output.stats.acceptance_rate == kept or kept is None)


def test_samples_and_lookups_go_with_it() -> None:
    """Rows that join others' prompts, and steps in which the model is not asked."""
    fast, plain = engines("bytes", "metaspace")
    assert fast.drafter is not None
    hybrid = Engine(plain.target, HybridDrafter(fast.drafter, SuffixDrafter()), tokenizer=plain.tokenizer)
    given = {"n": 3, "max_new_tokens": 24, "seed": 1, "temperature": 0.7, "eos_token_id": None, "max_batch_size": 4}
    expected = plain.generate(PROMPTS[:3], **given).token_ids
    for engine in (fast, hybrid):
        assert engine.generate(PROMPTS[:3], num_draft_tokens=3, **given).token_ids == expected


def test_a_draft_with_a_shorter_context_reads_a_window() -> None:
    fast, plain = engines("bytes", "fewer bytes", context=24)
    given = {"max_new_tokens": 60, "eos_token_id": None}
    assert fast.generate(PROMPTS, **given).token_ids == plain.generate(PROMPTS, **given).token_ids


def test_the_same_tokens_under_other_ids_are_mapped_one_by_one() -> None:
    names = ["a", "b", "ab", "c"]
    mixed = letters(["c", "ab", "b", "a"], [("a", "b")])
    table = random_table(VOCAB, 3)
    order = torch.tensor([names.index(name) for name in ["c", "ab", "b", "a"]])
    own = table[order][:, order][:, :, order]
    drafter = translating_drafter(TableLM(own), letters(names, [("a", "b")]), mixed, VOCAB)
    assert isinstance(drafter._new_transcript(), MappedTranscript)
    for temperature in (0.0, 1.0):
        output = Engine(TableLM(table), drafter).generate(
            [[0, 1], [2, 3]], max_new_tokens=40, num_draft_tokens=4, temperature=temperature, rule="rejection", seed=0
        )
        assert output.stats.acceptance_rate > 0.999


def test_where_no_shared_token_is_allowed_nothing_is_proposed() -> None:
    """Only the end of text is shared, and it must not come yet."""
    token_map = TokenMap.of(torch.tensor([NONE, 2]), vocab_size=VOCAB)
    drafter = mapped_drafter(TableLM(random_table(2, 1)), token_map)
    engine = Engine(TableLM(TARGET), drafter, eos_ids=frozenset([2]))
    output = engine.generate([[0]], min_new_tokens=12, max_new_tokens=12, temperature=1.0, seed=0)
    assert output.stats.num_draft_tokens == 0 and output.finish_reasons == ["length"]


# --- The law, at temperature 1 and with filters. Odds as in test_law.py.

SAMPLES = 2500

OURS = letters(["a", "b", "ab", "c"], [("a", "b")])
THEIRS = letters(["c", "b", "a", "bc", "ca"], [("b", "c"), ("c", "a")])  # shares a, b and c


class Reporting(VocabularyDrafter):
    """Draws as it should, and reports what ``report`` makes of the law."""

    report: Callable[[VocabularyDrafter, Tensor], Tensor]

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        assert draft.probs is not None
        return Draft(draft.tokens, draft.lengths, self.report(self, draft.probs))


def translating(report: Callable[[VocabularyDrafter, Tensor], Tensor] | None = None) -> VocabularyDrafter:
    drafter = translating_drafter(TableLM(random_table(5, seed=5, spread=0.7)), OURS, THEIRS, VOCAB)
    if report is not None:
        drafter.__class__ = Reporting
        drafter.report = report  # type: ignore[attr-defined]
    return drafter


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_samples_follow_the_targets_law(rule: str) -> None:
    output = sample(translating(), ONE, SAMPLES, rule=rule, num_draft_tokens=3)
    assert 0.05 < output.stats.acceptance_rate < 0.95
    assert alarm(output, ONE, SAMPLES) > ALPHA


def test_unequal_rows_follow_their_own_laws() -> None:
    output = sample(translating(), UNEQUAL, SAMPLES, rule="block", num_draft_tokens=3, max_batch_size=500)
    assert alarm(output, UNEQUAL, SAMPLES) > ALPHA and output.stats.acceptance_rate > 0.05


WRONG: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "not renormalised": lambda drafter, probs: probs * 0.6,
    "scattered to other ids": lambda drafter, probs: probs.roll(1, -1),
}


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_test_notices_a_law_that_was_moved_wrongly(wrong: str, rule: str) -> None:
    output = sample(translating(WRONG[wrong]), ONE, SAMPLES, rule=rule, num_draft_tokens=3)
    assert alarm(output, ONE, SAMPLES) < ALPHA


def test_a_trimmed_vocabulary_keeps_the_law() -> None:
    """The draft knows two of four tokens, and one that stands for the others."""
    token_map = TokenMap.of(torch.tensor([1, 2, NONE]), vocab_size=VOCAB)
    output = sample(
        mapped_drafter(TableLM(random_table(3, 2)), token_map), ONE, SAMPLES, rule="block", num_draft_tokens=3
    )
    assert alarm(output, ONE, SAMPLES) > ALPHA and output.stats.acceptance_rate > 0.05
    assert {token for row in output.token_ids for token in row} == set(range(VOCAB))


# --- Loading


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast | None, size: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape, eos_token_id=None)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    sizes = {"bytes": 400, "fewer bytes": 300, "metaspace": 336}
    made = {name: saved(root / name, TOKENIZERS[name](), sizes[name]) for name in TOKENIZERS}
    return made | {"bare": saved(root / "bare", None, 300), "trimmed": saved(root / "trimmed", None, 64)}


def generated(output: Output) -> list[list[int]]:
    assert output.stats.num_draft_tokens > 0
    return output.token_ids


def test_folders_with_other_tokenizers_speculate(folders: dict[str, Path]) -> None:
    target = folders["bytes"]
    given = {"max_new_tokens": 24, "num_draft_tokens": 3}
    plain = specdec.generate(target, PROMPTS, max_new_tokens=24).token_ids
    for draft in (folders["metaspace"], str(folders["fewer bytes"])):
        engine = specdec.load(target, draft=draft)
        assert isinstance(engine.drafter, VocabularyDrafter)
        assert generated(engine.generate(PROMPTS, **given)) == plain
    other = byte_level(300)
    assert generated(specdec.generate(target, PROMPTS, draft=folders["bare"], draft_tokenizer=other, **given)) == plain
    pair = [folders["bare"], "suffix"]
    assert specdec.generate(target, PROMPTS, draft=pair, draft_tokenizer=other, **given).token_ids == plain
    assert type(specdec.load(target, draft=target).drafter) is ModelDrafter


def test_a_folder_with_a_vocabulary_file_is_mapped(folders: dict[str, Path]) -> None:
    token_map = TokenMap.of(torch.cat([torch.arange(100, 163), torch.tensor([NONE])]), vocab_size=370)
    token_map.save(folders["trimmed"] / "vocabulary.safetensors")
    engine = specdec.load(folders["bytes"], draft=folders["trimmed"])
    assert isinstance(engine.drafter, VocabularyDrafter) and engine.drafter.lm.vocab_size == 64
    found = engine.generate(PROMPTS, max_new_tokens=24, num_draft_tokens=3)
    assert generated(found) == specdec.generate(folders["bytes"], PROMPTS, max_new_tokens=24).token_ids
    draft = LlamaForCausalLM.from_pretrained(folders["trimmed"])
    assert isinstance(specdec.load(folders["bytes"], draft=draft).drafter, VocabularyDrafter)


def test_what_cannot_be_translated_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(VocabularyError, match=r"400 entries and the draft's 300.*pass tokenizer= and draft_tokenizer="):
        specdec.load(folders["bytes"], draft=folders["bare"])
    for draft in (None, "suffix", SuffixDrafter()):
        with pytest.raises(ConfigError, match="draft_tokenizer goes with a draft model, and draft is"):
            specdec.load(folders["bytes"], draft=draft, draft_tokenizer=byte_level(300))


def test_hugging_faces_generate_takes_an_assistant_with_its_tokenizer(folders: dict[str, Path]) -> None:
    target, draft = (LlamaForCausalLM.from_pretrained(folders[name]) for name in ("bytes", "metaspace"))
    tokenizer = byte_level(370)
    inputs = torch.tensor([tokenizer.encode("she sells sea shells")])
    given = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(inputs, **given)
    pair = {"tokenizer": tokenizer, "assistant_tokenizer": metaspace(330)}
    door = specdec.plugin.Door()
    assert torch.equal(target.generate(inputs, **given, custom_generate=door, assistant_model=draft, **pair), plain)
    assert door.stats is not None and door.stats.num_draft_tokens > 0
    ours = {"tokenizer": tokenizer, "draft_tokenizer": metaspace(330)}
    assert torch.equal(target.generate(inputs, **given, custom_generate=door, draft=draft, **ours), plain)


def test_the_most_frequent_tokens_and_some_always_make_a_vocabulary() -> None:
    tokens = torch.tensor([5, 5, 5, 2, 2, 9, 1], dtype=torch.int32)
    assert most_frequent(tokens, 4, always=[0]).tolist() == [0, 2, 5, NONE]
    assert most_frequent(tokens, 3, always=[12]).tolist() == [5, 12, NONE]
