"""What `jaxkv generate` is to continue: one text, or each line of a file; read and checked before weights are."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxkv.cli.options import MIN_CAPACITY, Failure, UsageError
from jaxkv.cli.source import Source, told
from jaxkv.cli.terminal import clean, counted, note

_MAX_NEW_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that is to be continued.

    Attributes:
      text: as it was given.
      tokens: of it.
      limit: how many tokens may come.
      shortened: whether the model sets that limit and nobody else.
      line: where it stands in the file of prompts, from 1; None if it doesn't.
    """

    text: str
    tokens: list[int]
    limit: int
    shortened: bool
    line: int | None = None


def read_prompts(args: argparse.Namespace, source: Source) -> list[Prompt]:
    """Returns what is to be continued.

    Raises:
      UsageError: if that is nothing, or too long; of a file, all lines that are wrong together.
      Failure: if the tokenizer and the model don't belong together.
      OSError: if the file can't be read.
    """
    if args.prompts is None:
        return [_prompt(args, source, _read_one("-" if args.prompt is None else args.prompt))]
    if args.prompt is not None:
        raise UsageError("--prompts takes the prompts from a file; leave out PROMPT")
    name = "standard input" if args.prompts == "-" else args.prompts
    prompts, wrong = [], []
    for number, data in enumerate(_lines(args.prompts), 1):
        try:
            text = data.decode().removesuffix("\n").removesuffix("\r")
            if text.strip():
                prompts.append(dataclasses.replace(_prompt(args, source, text), line=number))
        except UnicodeDecodeError:
            wrong.append(f"line {number:,}: not UTF-8")
        except (Failure, UsageError) as error:
            wrong.append(f"line {number:,}: {error}")
    if wrong:
        raise UsageError(
            f"{name} has {counted(len(wrong), 'line')} that the model can't continue:\n" + "\n".join(wrong)
        )
    if not prompts:
        raise UsageError(f"{name} has no prompts; write one per line")
    return prompts


def choose_capacity(args: argparse.Namespace, prompts: list[Prompt], context: int | None) -> int:
    """Returns how many tokens of each text the cache is to hold.

    Raises:
      UsageError: if a prompt does not fit what was asked for.
    """
    needed = max(len(prompt.tokens) + prompt.limit for prompt in prompts)
    if args.capacity is None:
        capacity = max(MIN_CAPACITY, 1 << (needed - 1).bit_length())
        return capacity if context is None else min(capacity, context)
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    if len(longest.tokens) > args.capacity:
        which = "the prompt" if longest.line is None else f"the prompt on line {longest.line:,}"
        raise UsageError(
            f"argument --capacity: {which} has {len(longest.tokens):,} tokens, and the cache has room for "
            f"{args.capacity:,}; give a shorter prompt, or --capacity {needed} (without the option it is as large as "
            "needed)"
        )
    return args.capacity


def _lines(path: str) -> Iterator[bytes]:
    if path == "-":
        yield from sys.stdin.buffer
        return
    with Path(path).expanduser().open("rb") as file:
        yield from file


def _read_one(given: str) -> str:
    text = given
    if given == "-":
        if sys.stdin.isatty():
            note("write a text to continue, then Ctrl-D")
        text = sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    if not text:
        raise UsageError('the prompt is empty; give some text to continue, for example: jaxkv generate "A list is"')
    return clean(text)


def _prompt(args: argparse.Namespace, source: Source, text: str) -> Prompt:
    with told():
        tokens = source.known(source.tokenizer.encode(text))
    if not tokens:
        raise UsageError("the prompt has no tokens; give some text to continue")
    asked = args.max_new_tokens or source.generation.max_new_tokens or _MAX_NEW_TOKENS
    if source.context is None:
        return Prompt(text, tokens, asked, False)
    left = source.context - len(tokens)
    if left < 1:
        raise UsageError(
            f"the prompt has {len(tokens):,} tokens, and the model's context is {source.context:,}; give a shorter one"
        )
    if args.max_new_tokens is not None and asked > left:
        raise UsageError(
            f"{counted(len(tokens), 'token')} of prompt and {asked:,} new ones are more than the "
            f"{source.context:,} of the model's context; give -n {left} or less"
        )
    return Prompt(text, tokens, min(asked, left), asked > left)
