"""`jaxkv chat`: a text written in turns, which stays in the cache between them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax

from jaxkv.cache.cache import Cache
from jaxkv.cli.options import MIN_CAPACITY, UsageError
from jaxkv.cli.run import Model, Run, describe_size, load_model, make_sampler
from jaxkv.cli.terminal import clean, note, write
from jaxkv.errors import NotSupportedError
from jaxkv.models import tiny

_BETWEEN_TURNS = "\n\n"


def run(args: argparse.Namespace) -> int:
    sampler = make_sampler(args)
    capacity = args.capacity or MIN_CAPACITY
    if 2 * args.max_new_tokens > capacity:
        raise UsageError(
            f"turns of {args.max_new_tokens:,} tokens leave too little of a cache that holds {capacity:,}; give "
            f"--capacity {4 * args.max_new_tokens}, or a smaller --max-new-tokens"
        )
    model = load_model()
    chat = _Chat(model, args, sampler, capacity)
    chat.note(f"{describe_size(model, 1, capacity)}. Write a line and the model goes on; /reset forgets, /quit ends")
    while (line := _read_line()) is not None and line != "/quit":
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            note(f"error: {line.split()[0]} is not known; there are /reset and /quit")
        elif line.strip():
            chat.turn(line)
    return 0


def _read_line() -> str | None:
    """Returns the next line without its end, or None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines)
    try:
        return input("> ")
    except EOFError:
        write("\n")
        return None


class _Chat:
    """The text so far, and the cache that holds it but for its last token."""

    def __init__(self, model: Model, args: argparse.Namespace, sampler: Any, capacity: int) -> None:
        self.model, self.args, self.sampler = model, args, sampler
        self.cache = Cache.init(model.specs, 1, capacity)
        self.history: list[int] = []

    def note(self, text: str) -> None:
        if not self.args.quiet:
            note(text)

    def reset(self) -> None:
        self.cache = Cache.init(self.model.specs, 1, self.cache.capacity)
        self.history = []
        self.note("everything is forgotten")

    def turn(self, line: str) -> None:
        new = tiny.encode((_BETWEEN_TURNS if self.history else "") + clean(line))
        if not self._make_room(len(new) + self.args.max_new_tokens):
            note(
                f"error: {len(new):,} tokens and up to {self.args.max_new_tokens:,} new ones don't fit a cache that "
                f"holds {self.cache.capacity:,}; write less, or start again with a larger --capacity"
            )
            return
        self.history += new
        held = int(self.cache.lengths[0])
        decoding = Run(1)
        with _stopped_by_interrupt(decoding):
            for (text,) in decoding.tokens(self.model, [self.history], self.cache, self.args, self.sampler):
                write(text)
        write(decoding.texts[0].end() + "\n")
        result = decoding.result
        self.cache = result.cache
        self.history += result.tokens[0, : result.lengths[0]].tolist()
        self.note(
            f"{held:,} tokens did not have to be read again, {len(self.history) - held:,} are new; {decoding.speed()}"
        )

    def _make_room(self, num_tokens: int) -> bool:
        """Forgets the oldest part of the text if so many more tokens would not fit. False: they never will."""
        capacity = self.cache.capacity
        surplus = len(self.history) + num_tokens - capacity
        if surplus <= 0 or num_tokens > capacity:
            return num_tokens <= capacity
        # A quarter at least, so that not every turn moves the rest.
        num_dropped = min(max(surplus, capacity // 4), int(self.cache.lengths[0]))
        try:
            self.cache = _forget_first(self.cache, num_dropped)
        except NotSupportedError:  # keys that can't be turned back
            self.reset()
            return True
        self.history = self.history[num_dropped:]
        self.note(f"the cache was full: the oldest {num_dropped:,} tokens are forgotten, {len(self.history):,} stay")
        return True


@functools.partial(jax.jit, donate_argnums=0)
def _forget_first(cache: Cache, num_tokens: Any) -> Cache:
    return cache.remove(0, 0, num_tokens)


@contextlib.contextmanager
def _stopped_by_interrupt(decoding: Run) -> Iterator[None]:
    """Lets Ctrl-C stop a run after its next token, so that its cache is in order; a second one ends everything."""

    def stop(*_: Any) -> None:
        if decoding.stop:
            raise KeyboardInterrupt
        decoding.stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
