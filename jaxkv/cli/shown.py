"""How texts that have ended are shown."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxkv.cli.prompts import Prompt
from jaxkv.cli.source import Source
from jaxkv.cli.terminal import Text, printable, write


def show(args: argparse.Namespace, prompt: Prompt, text: Text, facts: dict[str, Any], number: int) -> None:
    """Prints a text that has ended, so that it can be told from the next one.

    Args:
      args: of the command.
      prompt: what it continues.
      text: what came.
      facts: more about it, for --json.
      number: of it, among `args.samples` of each prompt.
    """
    sample = number % args.samples + 1
    if args.json:
        place: dict[str, Any] = {} if prompt.line is None else {"line": prompt.line}
        place |= {"sample": sample} if args.samples > 1 else {}
        said = {"prompt": prompt.text, "text": text.text, "tokens": text.tokens, **facts}
        write(json.dumps(place | said, ensure_ascii=False) + "\n")
        return
    where = "" if prompt.line is None else f"line {prompt.line}"
    which = f"{sample} of {args.samples}" if args.samples > 1 or not where else ""
    write(f"--- {', '.join(filter(None, (where, which)))}\n{printable(prompt.text)}{text.text}\n")


def reason_of(reason: str, prompt: Prompt, source: Source) -> str:
    """Returns why a text ended, as it is told at the end."""
    if reason == "length" and prompt.shortened:
        return f"up to the {source.context:,} tokens of the model's context"
    return {
        "length": "as many tokens as asked for",
        "stop": "up to a stop token",
        "full": "until the cache was full; give a larger --capacity for more",
        "nan": "until the model's logits were NaN",
        "inf": "until the model's logits were infinite",
        "none": "as many different texts as there are",
        "running": "until Ctrl-C",
    }.get(reason, reason)
