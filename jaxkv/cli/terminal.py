"""Text in and out: standard output for text, standard error for notes, bytes into characters as they come."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence

_UNPRINTABLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127) if chr(code) not in "\n\t"}


def write(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    print(f"jaxkv: {text}", file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Returns an argument or a line as valid text: what was not UTF-8 in it comes from Python as surrogates."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


class Text:
    """Tokens that are bytes, into text: an unfinished character waits for its rest."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens complete."""
        self.tokens += tokens
        return self._decoder.decode(bytes(tokens)).translate(_UNPRINTABLE)

    def end(self) -> str:
        """Returns what stands for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


def text_of(tokens: Sequence[int]) -> str:
    text = Text()
    return text.take(tokens) + text.end()
