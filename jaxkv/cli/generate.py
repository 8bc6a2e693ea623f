"""`jaxkv generate`: continues a text, or several at once."""

from __future__ import annotations

import argparse
import sys

from jaxkv.cache.cache import Cache
from jaxkv.cli.compare import compare
from jaxkv.cli.options import MIN_CAPACITY, Failure, UsageError
from jaxkv.cli.run import Run, check_capacity, choose_sampling, describe_size, sampling_options
from jaxkv.cli.source import Source, find, told
from jaxkv.cli.terminal import Text, clean, counted, note, printable, write

_MAX_NEW_TOKENS = 200


def run(args: argparse.Namespace) -> int:
    if args.compare and (args.samples > 1 or sampling_options(args)):
        raise UsageError("--compare decodes one text, greedily; leave out --samples and the options for sampling")
    source = find(args.model)
    chosen = choose_sampling(args, source.generation, source.said_in)
    check_capacity(args.capacity, source.context)
    given = _read_prompt(args.prompt)
    prompt = source.tokenizer.encode(given)
    if not prompt:
        raise UsageError("the prompt has no tokens; give some text to continue")
    if max(prompt) >= source.config.vocab_size:
        raise Failure(
            f"the tokenizer makes token {max(prompt):,} of this prompt, and the model knows "
            f"{source.config.vocab_size:,}; its tokenizer.json belongs to another model"
        )
    limit, shortened = _limit(args, source, len(prompt))
    capacity = _capacity(args, len(prompt), limit, source.context)
    model = source.load(args.dtype, len(prompt) + limit, quiet=args.quiet)
    if args.compare:
        return compare(args, model, prompt, limit, capacity)
    given = printable(given)
    one = args.samples == 1
    if one:
        write(given)
    decoding = Run([Text(source.tokenizer, prompt) for _ in range(args.samples)])
    try:
        with told():
            cache = Cache.init(model.specs, args.samples, capacity)
            rows = decoding.tokens(
                model,
                [prompt] * args.samples,
                cache,
                max_new_tokens=limit,
                sampler=chosen.sampler,
                stop_tokens=source.stop_tokens,
                seed=args.seed,
            )
            for texts in rows:
                if one:
                    write(texts[0])
    except KeyboardInterrupt:
        decoding.stop = True
    rests = [text.end() for text in decoding.texts]
    if one:
        write(rests[0] + "\n")
    else:
        for number, text in enumerate(decoding.texts, 1):
            write(f"--- {number} of {args.samples}\n{given}{text.text}\n")
    if not args.quiet:
        reasons = sorted({"running"} if decoding.result is None else set(decoding.result.reasons))
        ended = ", ".join(_reason(reason, source, shortened) for reason in reasons)
        note(f"{decoding.speed()}; read {counted(len(prompt), 'token')}, wrote {decoding.num_tokens:,} ({ended})")
        note(f"sampling: {chosen.text}")
        note(describe_size(model.specs, args.samples, capacity))
    return 130 if decoding.stop else 0


def _reason(reason: str, source: Source, shortened: bool) -> str:
    if reason == "length" and shortened:
        return f"up to the {source.context:,} tokens that the model was made for"
    return {
        "length": "as many as asked for",
        "stop": "up to an end of the text",
        "full": "until the cache was full; a larger --capacity holds more",
        "nan": "until the model's logits were NaN",
        "inf": "until the model's logits were infinite",
        "running": "until Ctrl-C",
    }[reason]


def _read_prompt(given: str) -> str:
    text = given
    if given == "-":
        if sys.stdin.isatty():
            note("write what is to be continued, then Ctrl-D")
        text = sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    if not text:
        raise UsageError('the prompt is empty; give some text to continue, for example: jaxkv generate "A list is"')
    return clean(text)


def _limit(args: argparse.Namespace, source: Source, num_tokens: int) -> tuple[int, bool]:
    """Returns how many tokens may come, and whether the model sets the limit and nobody else."""
    asked = args.max_new_tokens or source.generation.max_new_tokens or _MAX_NEW_TOKENS
    if source.context is None:
        return asked, False
    left = source.context - num_tokens
    if left < 1:
        raise UsageError(
            f"the prompt has {num_tokens:,} tokens, and the model was made for texts of {source.context:,} in all; "
            "give a shorter one"
        )
    if args.max_new_tokens is not None and asked > left:
        raise UsageError(
            f"{counted(num_tokens, 'token')} of prompt and {asked:,} new ones are more than the "
            f"{source.context:,} that the model was made for; give -n {left} or less"
        )
    return min(asked, left), asked > left


def _capacity(args: argparse.Namespace, num_tokens: int, limit: int, context: int | None) -> int:
    needed = num_tokens + limit
    if args.capacity is None:
        capacity = max(MIN_CAPACITY, 1 << (needed - 1).bit_length())
        return capacity if context is None else min(capacity, context)
    if num_tokens > args.capacity:
        raise UsageError(
            f"the prompt has {num_tokens:,} tokens and the cache holds {args.capacity:,}; give a shorter prompt, or "
            f"--capacity {needed} (without the option it is as large as needed)"
        )
    return args.capacity
