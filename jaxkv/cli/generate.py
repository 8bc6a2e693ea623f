"""`jaxkv generate`: continues a text, or several at once."""

from __future__ import annotations

import argparse
import sys

from jaxkv.cache.cache import Cache
from jaxkv.cli.compare import compare
from jaxkv.cli.options import MIN_CAPACITY, UsageError
from jaxkv.cli.run import Run, describe_size, load_model, make_sampler, sampling_options
from jaxkv.cli.terminal import clean, note, text_of, write
from jaxkv.models import tiny

_REASONS = {
    "length": "as many as asked for",
    "stop": "up to an end of the text",
    "full": "until the cache was full; a larger --capacity holds more",
    "running": "until Ctrl-C",
}


def run(args: argparse.Namespace) -> int:
    if args.compare and (args.samples > 1 or sampling_options(args)):
        raise UsageError("--compare decodes one text, greedily; leave out --samples and the options for sampling")
    sampler = make_sampler(args)
    prompt = _read_prompt(args.prompt)
    capacity = _capacity(args, len(prompt))
    if args.compare:
        return compare(args, prompt, capacity)
    one = args.samples == 1
    if one:
        write(text_of(prompt))
    model = load_model()
    cache = Cache.init(model.specs, args.samples, capacity)
    decoding = Run(args.samples)
    try:
        for texts in decoding.tokens(model, [prompt] * args.samples, cache, args, sampler):
            if one:
                write(texts[0])
    except KeyboardInterrupt:
        decoding.stop = True
    if one:
        write(decoding.texts[0].end() + "\n")
    else:
        for number, text in enumerate(decoding.texts, 1):
            write(f"--- {number} of {args.samples}\n{text_of(prompt + text.tokens)}\n")
    if not args.quiet:
        reasons = sorted({"running"} if decoding.result is None else set(decoding.result.reasons))
        ended = ", ".join(_REASONS[reason] for reason in reasons)
        note(f"{decoding.speed()}; read {len(prompt):,} tokens, wrote {decoding.num_tokens:,} ({ended})")
        note(describe_size(model, args.samples, capacity))
    return 130 if decoding.stop else 0


def _read_prompt(given: str) -> list[int]:
    text = given
    if given == "-":
        if sys.stdin.isatty():
            note("write what is to be continued, then Ctrl-D")
        text = sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    prompt = tiny.encode(clean(text))
    if not prompt:
        raise UsageError('the prompt is empty; give some text to continue, for example: jaxkv generate "A list is"')
    return prompt


def _capacity(args: argparse.Namespace, num_tokens: int) -> int:
    needed = num_tokens + args.max_new_tokens
    if args.capacity is None:
        return max(MIN_CAPACITY, 1 << (needed - 1).bit_length())
    if num_tokens > args.capacity:
        raise UsageError(
            f"the prompt has {num_tokens:,} tokens and the cache holds {args.capacity:,}; give a shorter prompt, or "
            f"--capacity {needed} (without the option it is as large as needed)"
        )
    return args.capacity
