"""Pieces of text joined are the whole text, in every script and at every split, and stop strings never leak."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec import Engine, Piece
from specdec.drafters.model import ModelDrafter
from specdec.text import TextStream, decode
from toys import native, noisy, tiny_gpt

# Two-, three- and four-byte characters, combining marks, joined emoji, flags, right-to-left, and a real U+FFFD.
TEXTS = [
    "plain words, with  two spaces\n and a tab\t.",
    "你好,世界。日本語のテキスト 한국어 텍스트",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽 end",
    "cafe\u0301 n\u0303o Z\u0351\u036b\u0343 अनुच्छेद ไทย",
    "שלום עולם مرحبا بالعالم",
    "a\ufffdb \ufffd\ufffd c",
    "mixed: aé中😀" * 3,
]


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts; 257 tokens: every byte is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


BYTES, MERGED = byte_level(257), byte_level(340)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(stream: TextStream, ids: list[int], every: int = 1) -> list[str]:
    """What a reader gets who looks after every ``every`` tokens."""
    pieces = []
    for i, token in enumerate(ids):
        if stream.push(token):
            break
        if i % every == 0:
            pieces.append(stream.take())
    stream.finish()
    return [*pieces, stream.take()]


@TOKENIZERS
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text_at_every_split(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    # CASES 79, 80, 81
    ids = ids_of(tokenizer, text)
    for every in range(1, len(ids) + 1):
        pieces = pieces_of(TextStream(tokenizer), ids, every)
        assert "".join(pieces) == text == decode(tokenizer, ids)
        for piece in pieces:  # no piece shows half a character
            assert piece.count("\ufffd") <= text.count("\ufffd")
    for length in range(len(ids)):  # a row that the length cuts anywhere, also inside a character
        stream = TextStream(tokenizer)
        assert "".join(pieces_of(stream, ids[:length])) == decode(tokenizer, ids[:length]) == stream.text


@TOKENIZERS
def test_any_tokens_at_all_stream_to_what_they_decode_to(tokenizer: PreTrainedTokenizerFast) -> None:
    # Invalid UTF-8 in every arrangement, as an untrained model writes it; special tokens are no text.
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 40))]
        assert "".join(pieces_of(TextStream(tokenizer), ids)) == decode(tokenizer, ids)


@TOKENIZERS
@pytest.mark.parametrize("text", TEXTS)
def test_stop_strings_never_leak_and_held_back_text_comes_out(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = ids_of(tokenizer, text)
    for begin, length in itertools.product(range(0, len(text), 3), (1, 2, 5)):
        stops = (text[begin : begin + length], text[begin : begin + length + 3] + "!", "never")
        expected = text[: min(place for stop in stops if (place := text.find(stop)) >= 0)]
        stream = TextStream(tokenizer, stops)
        seen = ""
        for piece in pieces_of(stream, ids):
            seen += piece
            assert expected.startswith(seen)
        assert seen == expected == stream.text and stream.stopped
    for length in range(1, 6):  # text that only looks like the beginning of a stop string
        stream = TextStream(tokenizer, (text[-length:] + "!", "never"))
        assert "".join(pieces_of(stream, ids)) == text and not stream.stopped


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    stream = TextStream(BYTES, ("xyz",))
    given = []
    for token in ids_of(BYTES, "é xyxy中"):
        stream.push(token)
        given.append(stream.take())
    assert given == ["", "é", " ", "", "", "xy", "", "", "", "xy中"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A target that knows nothing: its text is bytes in any order, mostly broken characters."""
    target = tiny_gpt(3, vocab_size=len(MERGED))
    return Engine(native(target), ModelDrafter(native(noisy(target, 0.02))), tokenizer=MERGED)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_streams_callbacks_and_outputs_agree(engine: Engine, k: int) -> None:
    settings = {"max_new_tokens": [60, 7, 33, 1, 60, 20, 5], "num_draft_tokens": k, "max_batch_size": 3}
    settings |= {"temperature": 0.8, "rule": "coupled", "seed": 1}
    output = engine.generate(TEXTS, **settings)
    assert output.texts == [decode(MERGED, ids) for ids in output.token_ids]
    called: list[Piece] = []
    again = engine.generate(TEXTS, on_piece=called.append, **settings)
    assert (again.texts, again.token_ids) == (output.texts, output.token_ids)
    for pieces in (called, list(engine.stream(TEXTS, **settings))):
        for index in range(len(TEXTS)):
            own = [piece for piece in pieces if piece.index == index]
            assert "".join(piece.text for piece in own) == output.texts[index]
            assert [token for piece in own for token in piece.token_ids] == output.token_ids[index]
            assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [output.finish_reasons[index]]


def test_stop_strings_in_streams_end_the_text_before_them(engine: Engine) -> None:
    whole = engine.generate(TEXTS[0], max_new_tokens=60, num_draft_tokens=0)
    assert whole.texts is not None
    text = whole.texts[0]
    for begin, k in itertools.product(range(1, len(text) - 3, 7), (0, 5)):
        stop = text[begin : begin + 3]
        if "\ufffd" in stop:
            continue  # what an incomplete character will be is not known yet
        settings = {"max_new_tokens": 60, "num_draft_tokens": k, "stop": [stop, "zzzz"]}
        output = engine.generate(TEXTS[0], **settings)
        assert output.texts == [text[: text.find(stop)]] and output.finish_reasons == ["stop"]
        assert output.token_ids[0] == whole.token_ids[0][: len(output.token_ids[0])]
        assert stop in decode(MERGED, output.token_ids[0])
        assert stop not in decode(MERGED, output.token_ids[0][:-1])
        pieces = list(engine.stream(TEXTS[0], **settings))
        assert "".join(piece.text for piece in pieces) == output.texts[0]
        assert all(text.startswith("".join(piece.text for piece in pieces[:i])) for i in range(len(pieces)))


def test_without_a_tokenizer_pieces_carry_token_ids_only(engine: Engine) -> None:
    bare = Engine(engine.target, engine.drafter)
    pieces = list(bare.stream([[1, 2], [3]], max_new_tokens=9))
    assert all(piece.text == "" for piece in pieces)
    ids = [[token for piece in pieces if piece.index == i for token in piece.token_ids] for i in range(2)]
    output = bare.generate([[1, 2], [3]], max_new_tokens=9)
    assert ids == output.token_ids and output.texts is None
