"""`jaxkv chat`: a conversation, or a text written in turns, which stays in the cache between them."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxkv.cache.cache import Cache
from jaxkv.cache.snapshot import Snapshot
from jaxkv.cache.spec import Recurrent
from jaxkv.cli.conversation import Conversation, Writing, read_messages
from jaxkv.cli.devices import describe_devices, mesh_of, place_of
from jaxkv.cli.options import COMMANDS, MIN_CAPACITY, Failure, UsageError, describe_commands
from jaxkv.cli.run import Run, check_capacity, choose_sampling, describe_size
from jaxkv.cli.source import find, told
from jaxkv.cli.terminal import ask, clean, complain, counted, note, said_of, write

_SLACK = 512  # as long as the blocks of a cache, so that it costs nothing


def run(args: argparse.Namespace) -> int:
    source = find(args.model)
    stops = source.ends_of_turn
    chosen = choose_sampling(args, source.generation, stops, source.said_in)
    check_capacity(args.capacity, source.context)
    taught = source.tokenizer.chat_template is not None
    if args.system is not None and not taught:
        raise UsageError(f"{source.name} has no chat template, so it takes no system message; leave out --system")
    capacity = args.capacity or _within(source.context, 4096 if taught else MIN_CAPACITY)
    longest = args.max_new_tokens or source.generation.max_new_tokens or (1024 if taught else 120)
    if args.max_new_tokens is None:
        longest = min(longest, max(capacity // 4, 1))
    elif 2 * longest > capacity:
        raise UsageError(
            f"argument --max-new-tokens: answers of {longest:,} tokens leave too little room in a cache for "
            f"{capacity:,}; give {capacity // 2:,} or less" + _larger(4 * longest, source.context)
        )
    session = None if args.session is None else _session(args.session, args.system)
    model = source.load(args.dtype, capacity, storage=args.storage, quiet=args.quiet, mesh=mesh_of(args.devices))
    interrupts = Interrupts()

    def decode(decoding: Run, history: list[int], cache: Cache) -> None:
        with told():
            steps = decoding.tokens(
                model,
                [history],
                cache,
                max_new_tokens=longest,
                sampler=chosen.sampler,
                stop_tokens=stops,
                key=jax.random.key(args.seed),
            )
            for (text,) in steps:
                write(text)
                decoding.stop = interrupts.held
        write(decoding.texts[0].end() + "\n")

    with told():
        # Of rings slack costs nothing, of recurrent layers a state for each token: these go back to checkpoints.
        states = any(isinstance(spec.reach, Recurrent) for spec in model.specs)
        slack = 0 if states else min(_SLACK, capacity)
        cache = Cache.init(model.specs, 1, capacity, slack=slack, sharding=place_of(model))
    say = (lambda text: None) if args.quiet else note
    chat = (Conversation if taught else Writing)(source, cache, longest, decode, say)
    if args.system is not None:
        chat.messages = [{"role": "system", "content": clean(args.system)}]
    if session is not None and session.exists():
        chat.load(session)
    say(f"sampling: {chosen.text}")
    if where := describe_devices(model):
        say(where)
    say(describe_size(model.specs, 1, capacity))
    say(f"write a line, and the model {'answers' if taught else 'continues it'}; /help shows more, /quit ends")
    talk(chat, interrupts, session)
    return 0


def talk(chat: Conversation, interrupts: Interrupts, session: Path | None = None) -> None:
    """Obeys line after line, until the input ends; what has been said stays in the file of a session after each."""
    files: set[Path] = set()  # that this conversation may overwrite
    interrupted = False
    while True:
        try:
            line = ask("> ")
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            note("Ctrl-C once more ends the chat")
            continue
        interrupted = False
        if line is None or line.strip() == "/quit":
            return
        before = list(chat.messages)
        try:
            with interrupts.holding():
                if line.startswith("/"):
                    _obey(chat, line, files)
                elif line.strip():
                    chat.turn(clean(line))
                if session is not None and chat.messages != before:
                    _keep(chat, session)
        except (Failure, OSError) as error:
            complain(" ".join(said_of(error).split()))


def _obey(chat: Conversation, line: str, files: set[Path]) -> None:
    """Does what a line says that begins with a slash.

    Raises:
      Failure: if it can't be done.
      OSError: if a file can't be read or written.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    usage = next((command for command, _ in COMMANDS if command.split()[0] == name), None)
    if usage is None:
        raise Failure(f"{name} is not a command; /help lists them")
    if (" " in usage) != bool(rest):
        raise Failure(f"{name} needs a file name: {usage}" if " " in usage else f"{name} takes nothing after it")
    path = Path(clean(rest)).expanduser()
    if name == "/help":
        note(f"at your turn:\n{describe_commands()}")
    elif name == "/undo":
        chat.undo()
    elif name == "/reset":
        chat.reset()
        chat.say("forgot everything")
    elif name == "/save":
        _save(chat, path, files)
    else:
        chat.load(path)


def _save(chat: Conversation, path: Path, files: set[Path]) -> None:
    if path.exists() and path.resolve() not in files:
        raise Failure(f"{path} exists; give another name, or remove it first")
    chat.save(path)
    chat.say(f"{counted(len(chat.messages), 'message')} written to {path}")
    files.add(path.resolve())


def _keep(chat: Conversation, session: Path) -> None:
    """Makes the file of a session what has been said; there is none of a conversation that is forgotten."""
    if chat.said:
        chat.save(session)
    else:
        session.unlink(missing_ok=True)


def _session(given: str, system: str | None) -> Path:
    """Returns the file of a session.

    Raises:
      UsageError: if it can't be gone on with.
      Failure: if it is damaged, or something else.
    """
    path = Path(given).expanduser()
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"argument --session: {path.parent} is not a directory; make it first")
        return path
    with told():
        messages = read_messages(Snapshot(path))
    told_first = messages[0]["content"] if messages[0]["role"] == "system" else None
    if system is not None and clean(system) != told_first:
        raise UsageError(f"{path} goes on with what its model was told first; leave out --system")
    return path


def _within(context: int | None, capacity: int) -> int:
    return capacity if context is None else min(capacity, context)


def _larger(capacity: int, context: int | None) -> str:
    return "" if context is not None and capacity > context else f", or --capacity {capacity}"


class Interrupts:
    """Holds Ctrl-C back while a line is obeyed, so that text and cache stay in order; a second one ends everything."""

    def __init__(self) -> None:
        self.held = False  # the model's turn ends after its next token

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        def hold(*_: Any) -> None:
            if self.held:
                raise KeyboardInterrupt
            self.held = True

        self.held = False
        before = signal.signal(signal.SIGINT, hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
