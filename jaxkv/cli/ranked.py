"""`jaxkv generate --beams N` and `--best-of N`: several texts of each prompt at once, which is prefilled once."""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxkv.cache.cache import Cache
from jaxkv.cli.devices import describe_devices, place_of
from jaxkv.cli.options import DRAWING, UsageError, option
from jaxkv.cli.prompts import Prompt
from jaxkv.cli.run import Sampling, describe_size
from jaxkv.cli.sharing import describe_prefill, layout_of
from jaxkv.cli.shown import reason_of, show
from jaxkv.cli.source import Source, told
from jaxkv.cli.terminal import Text, counted, note, printable, write
from jaxkv.generate import Candidates, beam_search, best_of
from jaxkv.models import Model

_ROWS = 8  # decoded at once, where that is enough for a prompt


def check_ranked(args: argparse.Namespace, generation: Any) -> None:
    """Lets the options be right for a search: beams draw nothing, and the best of several must be drawn."""
    if args.beams and args.best_of:
        raise UsageError("--beams searches and --best-of samples; leave out one of them")
    given = [option(name) for name in DRAWING if getattr(args, name) is not None]
    if args.beams and given:
        raise UsageError(f"--beams does not sample; leave out {' and '.join(given)}")
    if args.best_of and args.greedy:
        raise UsageError("--greedy gives the same text each time; leave it out, or --best-of")
    n = args.beams or args.best_of
    if n and args.speculate:
        raise UsageError("--speculate does not go with --beams or --best-of; leave out one of them")
    if n and args.samples > n:
        name = "--beams" if args.beams else "--best-of"
        raise UsageError(f"--samples {args.samples} is more than {name} {n} gives; give at most {n}")
    if n and args.rows is not None and args.rows < n:
        raise UsageError(f"--rows {args.rows} is fewer than the {n} texts of one prompt; give {n} or more")
    if args.beams:
        args.greedy = True
    if args.best_of and generation.greedy and not given:
        args.temperature = 1.0


def find_best(
    args: argparse.Namespace, source: Source, model: Model, prompts: list[Prompt], capacity: int, chosen: Sampling
) -> int:
    """Prints the best texts of each prompt, and reports what was shared."""
    n = args.beams or args.best_of
    at_once = min(max((args.rows or _ROWS) // n, 1), len(prompts))
    batches = [[(prompt, n) for prompt in prompts[i : i + at_once]] for i in range(0, len(prompts), at_once)]
    layout = layout_of(args.layout, model.specs, batches, capacity)
    begun, wrote, reasons = time.perf_counter(), 0, set()
    for begin in range(0, len(prompts), at_once):
        batch = prompts[begin : begin + at_once]
        padding = [None] * (at_once - len(batch))  # so that the last batch runs the same program
        key = jax.random.fold_in(jax.random.key(args.seed), begin)
        search: Callable[..., Candidates] = functools.partial(best_of, n=n, key=key)
        if args.beams:
            search = functools.partial(beam_search, num_beams=n, num_return=args.samples)
        with told():
            found = search(
                model.forward,
                model.params,
                [*(prompt.tokens for prompt in batch), *padding],
                Cache.init(model.specs, at_once * n, capacity, layout=layout, sharding=place_of(model)),
                max_new_tokens=[*(prompt.limit for prompt in batch), *(1 for _ in padding)],
                sampler=chosen.sampler,
                stop_tokens=source.stop_tokens,
            )
        for i, prompt in enumerate(batch):
            for j in range(args.samples):
                tokens, reason = found.tokens[i, j][: found.lengths[i, j]].tolist(), found.reasons[i][j]
                text = Text(source.tokenizer, prompt.tokens)
                text.take([token for token in tokens if token not in source.stop_tokens])
                text.end()
                reasons.add(reason_of(reason, prompt, source))
                wrote += len(text.tokens)
                score = float(found.scores[i, j])
                facts = {"reason": reason, "score": score if math.isfinite(score) else None}
                if len(prompts) == args.samples == 1 and not args.json:
                    write(f"{printable(prompt.text)}{text.text}\n")
                else:
                    show(args, prompt, text, facts, (begin + i) * args.samples + j)
    if not args.quiet:
        seconds, ended = time.perf_counter() - begun, ", ".join(sorted(reasons))
        note(f"{describe_prefill(batches, layout)}; wrote {wrote:,} in {seconds:.1f} s: {ended}")
        note(f"beam search: {counted(n, 'beam')}" if args.beams else f"sampling: {chosen.text}; the best of {n}")
        if where := describe_devices(model):
            note(where)
        note(describe_size(model.specs, at_once * n, capacity, layout))
    return 0
