"""`--watch` and `--trace FILE`: the cache of one text while it is written, in the terminal or as a page."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from jaxkv.cli.options import UsageError
from jaxkv.cli.prompts import Prompt
from jaxkv.cli.terminal import Text, note, write
from jaxkv.cli.trace import Trace

_CLEAR = "\033[H\033[2J"


def check_view(args: argparse.Namespace) -> None:
    """Raises UsageError if the options ask to see something else than one text, token by token."""
    if not args.watch and args.trace is None:
        return
    name = "--watch" if args.watch else "--trace"
    others = {
        "--samples": args.samples > 1,
        "--prompts": args.prompts,
        "--json": args.json,
        "--compare": args.compare,
        "--beams": args.beams,
        "--best-of": args.best_of,
        "--speculate": args.speculate,
    }
    given = [option for option, value in others.items() if value]
    if given:
        raise UsageError(f"{name} shows one text, token by token; leave out {' and '.join(given)}")
    if args.watch and not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal, and standard output is not one; --trace FILE writes a page")
    if args.trace is not None:
        path = Path(args.trace)
        if path.is_dir():
            raise UsageError(f"argument --trace: {args.trace!r} does not name a file; give one such as run.html")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"argument --trace: {path.parent} is not a directory; make it first")


@dataclasses.dataclass
class View:
    """The cache of one text, as it is asked to be seen."""

    trace: Trace
    watch: bool
    path: str | None
    quiet: bool
    text: str = ""

    @classmethod
    def of(cls, args: argparse.Namespace, cache: Any, prompt: Prompt, tokenizer: Any) -> View | None:
        """Returns it, None if nobody wants to see the cache."""
        if not (args.watch or args.trace):
            return None
        pieces = Text(tokenizer)
        texts = [pieces.take([token]) for token in prompt.tokens]
        return cls(Trace(cache, [prompt.tokens], [texts]), args.watch, args.trace, args.quiet)

    def begin(self, text: str) -> None:
        """Shows the prompt."""
        self._show(text)

    def step(self, piece: str) -> None:
        """Shows one more token."""
        self.trace.step([piece])
        self._show(piece)

    def end(self) -> None:
        """Writes the page."""
        if self.path is not None:
            Path(self.path).write_text(self.trace.page(f"jaxkv: {self.text[:60]}"), "utf-8")
            if not self.quiet:
                note(f"the cache, step by step: {self.path}")

    def _show(self, piece: str) -> None:
        self.text += piece
        if self.watch:
            write(f"{_CLEAR}{self.trace.picture}\n\n{self.text}")
        else:
            write(piece)
