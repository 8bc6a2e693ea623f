"""What has been said in a chat, and the cache that holds its tokens: one turn, undone, saved and loaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.cache import Cache
from jaxkv.cache.snapshot import Snapshot
from jaxkv.cli.options import Failure
from jaxkv.cli.run import Run
from jaxkv.cli.source import Source, told
from jaxkv.cli.terminal import Text, counted
from jaxkv.errors import NotSupportedError

BETWEEN_TURNS = "\n\n"
_ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class Conversation:
    """Messages, and the cache that holds all of their tokens but the last.

    Args:
      source: whose tokenizer and vocabulary are used.
      cache: of one row, empty.
      longest: tokens of an answer.
      decode: `decode(run, history, cache)` lets the model answer, and shows it.
      say: shows a note.
    """

    in_turns = False  # whether `begins` says where each exchange began

    def __init__(
        self,
        source: Source,
        cache: Cache,
        longest: int,
        decode: Callable[[Run, list[int], Cache], None],
        say: Callable[[str], None],
    ) -> None:
        self.source, self.tokenizer, self.cache, self.longest = source, source.tokenizer, cache, longest
        self.decode, self.say = decode, say
        self.messages: list[Message] = []
        self.history: list[int] = []
        self.begins: list[int] = []  # of a text in turns: how much history there was before each exchange

    @property
    def said(self) -> bool:
        """Whether there is an exchange that can be saved."""
        return _last_of_user(self.messages) is not None

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._adopt([message for message in self.messages if message["role"] == "system"])

    def undo(self) -> None:
        """Forgets the last exchange.

        Raises:
          Failure: if there is none.
        """
        begin = _last_of_user(self.messages)
        if begin is None:
            raise Failure("there is nothing to undo")
        said = " ".join(self.messages[begin]["content"].split())
        with told():
            self._back_to(begin)
        self.say(f"forgot: {said[:40]}{'...' if len(said) > 40 else ''}")

    def save(self, path: Path) -> None:
        """Writes the messages and what the cache holds, by `Cache.save`.

        Raises:
          Failure: if nothing was said.
          OSError: if the file can't be written.
        """
        if not self.said:
            raise Failure("the conversation is empty")
        said = {"messages": self.messages, "history": self.history, "begins": self.begins}
        with told():
            self.cache.save(
                path,
                fingerprint=self.source.fingerprint,
                metadata={name: json.dumps(value, ensure_ascii=False) for name, value in said.items()},
            )

    def load(self, path: Path) -> None:
        """Goes on with what `save` wrote; where another model wrote it, or a larger cache, with its messages alone.

        Raises:
          Failure: if the file holds anything else, or what this model can't go on with; nothing has changed then.
          OSError: if it can't be read.
        """
        with told():
            saved = Snapshot(path)
            messages = read_messages(saved)
            history, begins = (_numbers(saved, name) for name in ("history", "begins"))
            held = int(saved.lengths[0])
            if saved.fingerprint != self.source.fingerprint:
                why = "another model wrote it"
            elif saved.capacity > self.cache.capacity:
                why = f"it has {saved.capacity:,} tokens, and the cache holds {self.cache.capacity:,}"
            else:
                said = [message["role"] for message in messages].count("user")
                alike = held <= len(history) and all(0 <= token < self.source.config.vocab_size for token in history)
                if not alike or len(begins) != (said if self.in_turns else 0):
                    raise ValueError(f"{path} has other tokens than its messages; give a file that /save wrote")
                self.cache = self.cache.load(saved, [0], saved=[0])
                self.messages, self.history, self.begins = messages, history, begins
                self.say(f"{counted(len(messages), 'message')} read from {path}, {counted(held, 'token')} in the cache")
                return
            self._adopt(messages)
        self.say(f"{counted(len(messages), 'message')} read from {path}; prefilled again: {why}")

    def turn(self, line: str) -> None:
        """Lets the model answer a line.

        Raises:
          Failure: if it doesn't fit, or the template refuses it; nothing has changed then.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            with told():
                self._go_to(self._fitting())
        except Failure:
            self.messages = before
            raise
        self._answer(Text(self.tokenizer))

    def _tokens(self, messages: Sequence[Message], *, answer: bool) -> list[int]:
        """Returns the tokens of messages, and of the beginning of an answer if one is to follow."""
        if not messages:
            return []
        return self.source.known(self.tokenizer.chat(messages, add_generation_prompt=answer))

    def _adopt(self, messages: list[Message]) -> None:
        """Takes messages for what has been said; of the cache stays what is the same. ValueError: nothing changed."""
        said = any(message["role"] != "system" for message in messages)  # templates may refuse a system message alone
        tokens = self._tokens(messages, answer=False) if said else []
        self.messages = list(messages)
        self._go_to(tokens)

    def _back_to(self, number: int) -> None:
        """Keeps the first messages."""
        self._adopt(self.messages[:number])

    def _go_to(self, tokens: list[int]) -> None:
        """Makes `tokens` the history. A template may write an answer in another way than the model did."""
        # The last token is read again even if it is held: the answer begins with what follows it.
        same = _num_equal(self.history[: int(self.cache.lengths[0])], tokens[:-1])
        self.cache = _rewind(self.cache, same)
        self.history = tokens

    def _answer(self, text: Text) -> None:
        """Lets the model go on after `history`, of which the cache holds a part."""
        held = int(self.cache.lengths[0])
        decoding = Run([text])
        self.decode(decoding, self.history, self.cache)
        result = decoding.result
        self.cache = result.cache
        new = len(self.history) - held
        self.history = self.history + result.tokens[0, : result.lengths[0]].tolist()
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(text.tokens)})
        wrote = f"wrote {len(text.tokens):,} in {decoding.seconds:.1f} s"
        said = f"reused {counted(held, 'token')}, prefilled {new:,}, {wrote}"
        preparing = f"{decoding.preparing:.1f}"
        self.say(said if preparing == "0.0" else f"{said} ({preparing} s compiling)")

    def _refusal(self, num_tokens: int) -> Failure:
        return Failure(
            f"{num_tokens:,} tokens and up to {self.longest:,} new ones don't fit into a cache for "
            f"{self.cache.capacity:,}; write less, or start again with a larger --capacity"
        )

    def _fitting(self) -> list[int]:
        """Returns the tokens of the conversation, after forgetting what must be."""
        room = self.cache.capacity - self.longest
        tokens = self._tokens(self.messages, answer=True)
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
            tokens = self._tokens(self.messages, answer=True)
        if len(tokens) > room:
            raise self._refusal(len(tokens))
        if forgotten:
            self.say(f"the cache was full: forgot the oldest {forgotten:,} messages")
        return tokens


class Writing(Conversation):
    """A text that both write in turns: of models without a chat template."""

    in_turns = True

    def _adopt(self, messages: list[Message]) -> None:
        if any(message["role"] == "system" for message in messages):
            raise ValueError(f"{self.source.name} has no chat template, so it takes no system message")
        tokens: list[int] = []
        begins = []
        for message in messages:
            begins += [len(tokens)] * (message["role"] == "user")
            tokens += self._encode(message["content"], tokens, answer=message["role"] == "assistant")
        self.messages, self.begins = list(messages), begins
        self._go_to(tokens)

    def _back_to(self, number: int) -> None:
        # Not anew from the messages: what the model wrote may be other tokens than a tokenizer makes of its text.
        self.messages = self.messages[:number]
        self._go_to(self.history[: self.begins.pop()])

    def _encode(self, text: str, before: list[int], *, answer: bool = False) -> list[int]:
        between = BETWEEN_TURNS if before and not answer else ""
        # What frames a text comes once, at its beginning.
        return self.source.known(self.tokenizer.encode(between + text, special=not before))

    def turn(self, line: str) -> None:
        with told():
            new = self._encode(line, self.history)
        self._make_room(len(new) + self.longest, len(new))
        self.begins.append(len(self.history))
        self.history = self.history + new
        self.messages.append({"role": "user", "content": line})
        self._answer(Text(self.tokenizer, self.history))

    def _make_room(self, num_tokens: int, num_new: int) -> None:
        """Forgets the oldest part of the text if so many more tokens would not fit."""
        capacity = self.cache.capacity
        if num_tokens > capacity:
            raise self._refusal(num_new)
        surplus = len(self.history) + num_tokens - capacity
        if surplus <= 0:
            return
        # A quarter at least, so that not every turn moves the rest.
        num_dropped = min(max(surplus, capacity // 4), len(self.history))
        try:
            self.cache = _forget_first(self.cache, min(num_dropped, int(self.cache.lengths[0])))
        except NotSupportedError:  # keys that can't be re-rotated
            num_dropped = len(self.history)
            self.cache = _rewind(self.cache, 0)
        self.history = self.history[num_dropped:]
        self.begins = [max(begin - num_dropped, 0) for begin in self.begins]
        self.say(f"the cache was full: forgot {num_dropped:,} tokens, kept {len(self.history):,}")


def read_messages(saved: Snapshot) -> list[Message]:
    """Returns what a file says, if it is a conversation that can go on: an answer to each message of the user.

    Raises:
      ValueError: if it isn't.
    """
    path = saved.path
    try:
        messages = json.loads(saved.metadata.get("messages", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has messages that are not JSON: {error}; give a file that /save wrote") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{path} has no list of messages; give a file that /save wrote")
    expected = "user"
    for number, message in enumerate(messages, 1):
        where = f"{path}, message {number}"
        if not isinstance(message, dict) or {"role", "content"} != message.keys():
            raise ValueError(f'{where} is not {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f'{where}: "role" must be one of {", ".join(_ROLES)}, and "content" a text')
        if role == "system" and number == 1:
            continue
        if role != expected:
            raise ValueError(f"{where} is from {role}; here it must be from {expected}")
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant":
        raise ValueError(f"{path} ends with a user message, without an answer")
    return messages


def _numbers(saved: Snapshot, name: str) -> list[int]:
    """Returns whole numbers that a file has beside its messages."""
    try:
        numbers = json.loads(saved.metadata[name])
    except (KeyError, ValueError, RecursionError):
        numbers = None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"{saved.path} has no {name} that are numbers; give a file that /save wrote")
    return numbers


def _last_of_user(messages: Sequence[Message]) -> int | None:
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)


def _num_equal(a: list[int], b: list[int]) -> int:
    """Returns how many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@functools.partial(jax.jit, donate_argnums=0)
def _forget_first(cache: Cache, num_tokens: Any) -> Cache:
    return cache.remove(0, 0, num_tokens)


@functools.partial(jax.jit, donate_argnums=0)
def _rewind(cache: Cache, length: Any) -> Cache:
    return cache.rewind(jnp.asarray(length, jnp.int32)[None])
