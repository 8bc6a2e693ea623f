"""Text in and out: standard output for text, standard error for notes, tokens into text as they come."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

# Control characters: a model may write what commands a terminal.
_UNPRINTABLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


_COLORS = {"own": "1;36", "note": "2"}  # bold cyan, dim
_PLAIN = "\033[0m"


def write(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    begin = color("note", sys.stderr)
    print(f"{begin}jaxkv: {text}{_PLAIN if begin else ''}", file=sys.stderr, flush=True)


def complain(text: str) -> None:
    print(f"jaxkv: error: {text}", file=sys.stderr, flush=True)


def said_of(error: Exception) -> str:
    """Returns what an error says; of a file, its name and what is wrong with it, without a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)


def color(what: str, stream: TextIO) -> str:
    """Returns what begins a color; nothing where no terminal shows colors, or where NO_COLOR asks for none."""
    shows = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return f"\033[{_COLORS[what]}m" if shows else ""


def ask(prompt: str) -> str | None:
    """Returns the line that is typed, or that comes from a pipe, without its end; None at the end of the input.

    Raises:
      KeyboardInterrupt: at Ctrl-C, unless something was typed, which it wipes away.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    editor: Any = None
    with contextlib.suppress(ImportError):
        import readline as editor  # input() edits lines by it
    begin = color("own", sys.stdout)
    if begin and editor is not None:
        prompt = f"\001{begin}\002{prompt}"  # between 1 and 2: takes no room on the line
    elif begin:
        prompt = begin + prompt
    while True:
        try:
            return input(prompt)
        except EOFError:
            write("\n")
            return None
        except KeyboardInterrupt:
            typed = editor is not None and editor.get_line_buffer()
            write("\n")
            if not typed:
                raise
        finally:
            if begin:
                write(_PLAIN)


@contextlib.contextmanager
def progress_bar(what: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told (bytes done, bytes in all), and shows them if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if not show:
        yield lambda done, total: None
        return
    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def clean(text: str) -> str:
    """Returns an argument or a line as valid text: what was not UTF-8 in it comes from Python as surrogates."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def printable(text: str) -> str:
    """Returns a text without what a terminal would obey."""
    return text.translate(_UNPRINTABLE)


class Text:
    """Tokens as they come, into text that can be printed: an unfinished character waits for its rest.

    Args:
      tokenizer: of the model.
      after: tokens of the text that is continued, which is not shown again.

    Attributes:
      tokens: what has come.
      text: what it says.
    """

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._stream = tokenizer.stream()
        self._stream.take(after)

    def take(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens complete."""
        self.tokens += tokens
        return self._show(self._stream.take(tokens))

    def end(self) -> str:
        """Returns what is left: what stands for a character that was never finished."""
        return self._show(self._stream.end())

    def _show(self, text: str) -> str:
        text = printable(text)
        self.text += text
        return text
