"""Plain bytes as tokens."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ByteTokenizer:
    """Bytes as tokens, for models that read UTF-8; it has the methods of `Tokenizer`.

    Args:
      special: tokens without a text, such as a byte 0 between documents.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é!")
    [195, 169, 33]
    >>> tokenizer.decode([195, 169, 33, 0, -1])
    'é!'
    """

    vocab_size = 256
    chat_template = None

    def __init__(self, special: Iterable[int] = (0,)) -> None:
        self._special = frozenset(special)

    def __repr__(self) -> str:
        return f"ByteTokenizer({sorted(self._special)})"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: those without a text of their own."""
        return tuple(sorted(self._special))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the bytes of a text; `special` makes no difference: nothing frames it."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Returns the text of tokens, with a replacement character for bytes that are not UTF-8.

        Args:
          tokens: ints or an integer array [T]; anything outside [0, 256) is left out, as EMPTY after a text's end.
          special: whether special tokens are kept, as the characters that they are.

        Raises:
          TypeError: if tokens are not integers.
        """
        return self._bytes(tokens, special).decode(errors="replace")

    def stream(self) -> ByteStream:
        """Returns a decoder for tokens as they come."""
        return ByteStream(self)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Raises ValueError: there is no chat template."""
        raise ValueError("a model that reads bytes has no chat template; encode plain text")

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Raises ValueError: there is no chat template."""
        return self.encode(self.render(messages, **variables))

    def _bytes(self, tokens: Iterable[int], special: bool) -> bytes:
        kept = (token for token in map(operator.index, tokens) if 0 <= token < 256)
        return bytes(token for token in kept if special or token not in self._special)


class ByteStream:
    """Bytes into text as they come; together it is what `decode` gives for all of them."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete. A character waits for its last byte."""
        return self._decoder.decode(self._tokenizer._bytes(tokens, special=False))

    def end(self) -> str:
        """Returns the rest: what stands for a character that was never finished."""
        return self._decoder.decode(b"", final=True)
