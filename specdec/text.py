"""From token ids to text, piece by piece: UTF-8 safe, and aware of stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what decoders print for the first bytes of a character whose rest has not come yet


class TextStream:
    """The growing text of one row. The pieces it gives out, joined, are the final text.

    A piece is held back while it may be half a character, or the beginning of a stop string. Decoding looks at a
    short window of ids and not at the whole row, as transformers' ``TextStreamer`` does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # first id of the decoding window
        self._decoded = 0  # first id whose characters are not in ``_text`` yet
        self._text = ""
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> bool:
        """Add a token; whether its text completes a stop string (then nothing further may be pushed)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._decoded])
        after = self._decode(self._ids[self._window :])
        piece = after[len(before) :]
        if piece.endswith(_INCOMPLETE):
            whole = piece.rstrip(_INCOMPLETE)
            return any(stop in self._tail() + whole for stop in self._stop) and self._extend(whole)
        if piece:
            self._window, self._decoded = self._decoded, len(self._ids)
            self._extend(piece)
        return self.stopped

    def finish(self) -> None:
        """No token follows: an incomplete character is part of the text now."""
        if not self.stopped:
            before = self._decode(self._ids[self._window : self._decoded])
            self._extend(self._decode(self._ids[self._window :])[len(before) :])
        self._stop = ()

    def take(self) -> str:
        """The text that has become certain since the last call."""
        certain = len(self._text) - self._held_back()
        piece = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    @property
    def text(self) -> str:
        """All text so far, without the stop string that ended it."""
        return self._text

    def _extend(self, piece: str) -> bool:
        """Add certain text; whether it completes a stop string, before which the text then ends."""
        search_from = len(self._text) - len(self._tail())
        self._text += piece
        places = [place for stop in self._stop if (place := self._text.find(stop, search_from)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True
        return self.stopped

    def _tail(self) -> str:
        """The end of the text in which a stop string may have begun."""
        longest = max(map(len, self._stop), default=0)
        return self._text[-longest:] if longest else ""

    def _held_back(self) -> int:
        """How many characters at the end may turn out to be the beginning of a stop string."""
        if self.stopped:
            return 0
        lengths = (n for stop in self._stop for n in range(min(len(stop) - 1, len(self._text)), 0, -1)
                   if self._text.endswith(stop[:n]))  # fmt: skip
        return max(lengths, default=0)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ``ids``: no special tokens, no cosmetic changes to spaces."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
