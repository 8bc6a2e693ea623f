"""`jaxkv chat`: a conversation, or a text written in turns, which stays in the cache between them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.cache import Cache
from jaxkv.cli.options import MIN_CAPACITY, UsageError
from jaxkv.cli.run import Run, check_capacity, choose_sampling, describe_size
from jaxkv.cli.source import find, told
from jaxkv.cli.terminal import Text, clean, note, write
from jaxkv.errors import NotSupportedError

_BETWEEN_TURNS = "\n\n"
_SLACK = 512  # as long as the blocks of a cache, so that it costs nothing


def run(args: argparse.Namespace) -> int:
    source = find(args.model)
    chosen = choose_sampling(args, source.generation, source.said_in)
    check_capacity(args.capacity, source.context)
    taught = source.tokenizer.chat_template is not None
    if args.system is not None and not taught:
        raise UsageError(f"{source.name} has no chat template, so nobody can tell it anything; leave out --system")
    capacity = args.capacity or _within(source.context, 4096 if taught else MIN_CAPACITY)
    longest = args.max_new_tokens or source.generation.max_new_tokens or (1024 if taught else 120)
    if args.max_new_tokens is None:
        longest = min(longest, max(capacity // 4, 1))
    elif 2 * longest > capacity:
        raise UsageError(
            f"turns of {longest:,} tokens leave too little of a cache that holds {capacity:,}; give a smaller "
            "--max-new-tokens" + _larger(4 * longest, source.context)
        )
    model = source.load(args.dtype, capacity, quiet=args.quiet)
    with told():
        cache = Cache.init(model.specs, 1, capacity, slack=min(_SLACK, capacity))
    decode = functools.partial(
        _decode,
        model,
        max_new_tokens=longest,
        sampler=chosen.sampler,
        stop_tokens=source.stop_tokens,
        seed=args.seed,
    )
    say = (lambda text: None) if args.quiet else note
    chat: Any = (_Conversation if taught else _Text)(source.tokenizer, cache, longest, decode, say)
    if args.system is not None:
        chat.begin_with(clean(args.system))
    what = "Write a line and the model answers" if taught else "Write a line and the model goes on"
    say(f"sampling: {chosen.text}")
    say(f"{describe_size(model.specs, 1, capacity)}. {what}; /reset forgets, /quit ends")
    while (line := _read_line()) is not None and line != "/quit":
        if line == "/reset":
            chat.reset()
            say("everything is forgotten")
        elif line.startswith("/"):
            note(f"error: {line.split()[0]} is not known; there are /reset and /quit")
        elif line.strip():
            chat.turn(clean(line))
    return 0


def _within(context: int | None, capacity: int) -> int:
    return capacity if context is None else min(capacity, context)


def _num_equal(a: list[int], b: list[int]) -> int:
    """Returns how many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _larger(capacity: int, context: int | None) -> str:
    return "" if context is not None and capacity > context else f", or --capacity {capacity}"


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


def _decode(model: Any, decoding: Run, history: list[int], cache: Cache, **options: Any) -> None:
    with told(), _stopped_by_interrupt(decoding):
        for (text,) in decoding.tokens(model, [history], cache, **options):
            write(text)
    write(decoding.texts[0].end() + "\n")


class _Chat:
    """What has been said, and the cache that holds its tokens but for the last."""

    def __init__(self, tokenizer: Any, cache: Cache, longest: int, decode: Any, say: Any) -> None:
        self.tokenizer, self.cache, self.longest, self.decode, self.say = tokenizer, cache, longest, decode, say
        self.history: list[int] = []

    def reset(self) -> None:
        self.cache = _rewind(self.cache, 0)
        self.history = []

    def answer(self, text: Text) -> None:
        """Lets the model go on after `history`, of which the cache holds a part."""
        held = int(self.cache.lengths[0])
        decoding = Run([text])
        self.decode(decoding, self.history, self.cache)
        result = decoding.result
        self.cache = result.cache
        self.history = self.history + result.tokens[0, : result.lengths[0]].tolist()
        new = len(self.history) - held
        self.say(f"{held:,} tokens did not have to be read again, {new:,} are new; {decoding.speed()}")

    def refuse(self, num_tokens: int) -> None:
        note(
            f"error: {num_tokens:,} tokens and up to {self.longest:,} new ones don't fit a cache that holds "
            f"{self.cache.capacity:,}; write less, or start again with a larger --capacity"
        )


class _Text(_Chat):
    """A text that both write."""

    def turn(self, line: str) -> None:
        # What frames a text comes once, at its beginning.
        new = self.tokenizer.encode((_BETWEEN_TURNS if self.history else "") + line, special=not self.history)
        if not self._make_room(len(new) + self.longest):
            self.refuse(len(new))
            return
        self.history = self.history + new
        self.answer(Text(self.tokenizer, self.history))

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
            self.say("the cache was full: everything is forgotten")
            return True
        self.history = self.history[num_dropped:]
        self.say(f"the cache was full: the oldest {num_dropped:,} tokens are forgotten, {len(self.history):,} stay")
        return True


class _Conversation(_Chat):
    """Messages, as the chat template of the model writes them down."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.messages: list[dict[str, str]] = []

    def begin_with(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}]

    def reset(self) -> None:
        super().reset()
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def turn(self, line: str) -> None:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            tokens = self._fitting()
        except ValueError as error:  # a template that refuses
            note(f"error: {' '.join(str(error).split())}")
            tokens = None
        if tokens is None:
            self.messages = before
            return
        # A template may write what was said in another way than the model did: what is the same stays. The last token
        # is read again even if it is held: the answer begins with what follows it.
        same = _num_equal(self.history[: int(self.cache.lengths[0])], tokens[:-1])
        self.cache = _rewind(self.cache, same)
        self.history = tokens
        text = Text(self.tokenizer)
        self.answer(text)
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(text.tokens)})

    def _fitting(self) -> list[int] | None:
        """Returns the tokens of the conversation, after forgetting what must be; None if the last message won't fit."""
        room = self.cache.capacity - self.longest
        tokens = self.tokenizer.chat(self.messages)
        if len(tokens) <= room:
            return tokens
        forgotten = 0
        while len(tokens) > room * 3 // 4:  # a quarter at least, so that not every turn reads the rest again
            first = next(i for i, message in enumerate(self.messages) if message["role"] != "system")
            after = [i for i, message in enumerate(self.messages) if message["role"] == "user" and i > first]
            if not after:
                break
            forgotten += after[0] - first
            del self.messages[first : after[0]]
            tokens = self.tokenizer.chat(self.messages)
        if len(tokens) > room:
            self.refuse(len(tokens))
            return None
        if forgotten:
            self.say(f"the cache was full: the oldest {forgotten:,} messages are forgotten")
        return tokens


@functools.partial(jax.jit, donate_argnums=0)
def _forget_first(cache: Cache, num_tokens: Any) -> Cache:
    return cache.remove(0, 0, num_tokens)


@functools.partial(jax.jit, donate_argnums=0)
def _rewind(cache: Cache, length: Any) -> Cache:
    return cache.rewind(jnp.asarray(length, jnp.int32)[None])


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
