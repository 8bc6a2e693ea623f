"""`jaxkv generate`: continues a text, several at once, or each line of a file."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from jaxkv.cache.cache import Cache
from jaxkv.cli.compare import compare
from jaxkv.cli.devices import describe_devices, mesh_of, place_of
from jaxkv.cli.drafting import Drafting, describe_drafts
from jaxkv.cli.options import UsageError
from jaxkv.cli.prompts import choose_capacity, read_prompts
from jaxkv.cli.ranked import check_ranked, find_best
from jaxkv.cli.run import Run, check_capacity, choose_sampling, describe_size, sampling_options
from jaxkv.cli.sharing import Batch, describe_prefill, layout_of
from jaxkv.cli.shown import reason_of, show
from jaxkv.cli.source import find, told
from jaxkv.cli.terminal import Text, note, printable, write
from jaxkv.cli.view import View, check_view

_ROWS = 8  # of many prompts


def run(args: argparse.Namespace) -> int:
    more = (args.samples > 1, args.prompts, args.json, args.beams, args.best_of, args.layout, args.speculate)
    if args.compare and (any(more) or sampling_options(args)):
        raise UsageError(
            "--compare decodes one text, greedily; leave out --samples, --prompts, --json, --beams, --best-of, "
            "--layout, --speculate and the options for sampling"
        )
    check_view(args)
    mesh = mesh_of(args.devices)
    source = find(args.model)
    check_ranked(args, source.generation)
    chosen = choose_sampling(args, source.generation, source.stop_tokens, source.said_in)
    check_capacity(args.capacity, source.context)
    if args.speculate and args.capacity == 1:
        raise UsageError("argument --capacity: --speculate checks a token and a draft at once; give 2 or more")
    drafting = None if args.speculate is None else Drafting.find(args.speculate, source)
    prompts = read_prompts(args, source)
    capacity = choose_capacity(args, prompts, source.context)
    longest = max(len(prompt.tokens) + prompt.limit for prompt in prompts)
    model = source.load(args.dtype, longest, storage=args.storage, quiet=args.quiet, mesh=mesh)
    if drafting is not None:
        drafting = drafting.load(args.dtype, longest, quiet=args.quiet, mesh=mesh)
    if args.compare:
        return compare(args, model, prompts[0].tokens, prompts[0].limit, capacity)
    if args.beams or args.best_of:
        return find_best(args, source, model, prompts, capacity, chosen)
    texts = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(args.samples)]
    num_rows = min(args.rows or (_ROWS if args.prompts else args.samples), len(texts))
    slack = 0 if drafting is None else drafting.slack(capacity)
    numbered = [texts[begin : begin + num_rows] for begin in range(0, len(texts), num_rows)]
    batches = [
        [(prompts[number], count) for number, count in Counter(n for n, _ in batch).items()] for batch in numbered
    ]
    layout = layout_of(args.layout or "rows", model.specs, batches, capacity, ahead=slack)
    live = len(texts) == 1 and not args.json  # shown as it comes
    runs: list[Run] = []
    reasons: set[str] = set()
    for begin, prefilled in zip(range(0, len(texts), num_rows), batches, strict=True):
        batch = [prompt for _, prompt in texts[begin : begin + num_rows]]
        decoding = Run([Text(source.tokenizer, prompt.tokens) for prompt in batch])
        runs.append(decoding)
        padding = [None] * (num_rows - len(batch))  # so that the last batch runs the same program
        key = jax.random.fold_in(jax.random.key(args.seed), begin) if begin else jax.random.key(args.seed)
        cache = Cache.init(model.specs, num_rows, capacity, layout=layout, slack=slack, sharding=place_of(model))
        view = View.of(args, cache, batch[0], source.tokenizer)
        if live:
            (write if view is None else view.begin)(printable(batch[0].text))
        try:
            with told():
                steps = decoding.tokens(
                    model,
                    [*(prompt.tokens for prompt, _ in prefilled), *padding],
                    cache,
                    max_new_tokens=[*(prompt.limit for prompt, _ in prefilled), *(1 for _ in padding)],
                    num_samples=[*(copies for _, copies in prefilled), *(1 for _ in padding)],
                    sampler=chosen.sampler,
                    stop_tokens=source.stop_tokens,
                    key=key,
                    drafting=None if drafting is None else drafting.options(cache),
                )
                for new in steps:
                    if live:
                        (write if view is None else view.step)(new[0])
        except KeyboardInterrupt:
            decoding.stop = True
        ended = ["running"] * len(batch) if decoding.result is None else decoding.result.reasons
        told_reasons = [reason_of(*pair, source) for pair in zip(ended, batch, strict=False)]
        reasons |= set(told_reasons)
        for number, (prompt, text, reason) in enumerate(zip(batch, decoding.texts, ended, strict=False), begin):
            rest = text.end()
            if live:
                write(f"{rest}\n")
                if view is not None:
                    view.end()
            else:
                show(args, prompt, text, {"reason": reason}, number)
        if decoding.stop:
            break
    if not args.quiet:
        _report(runs, batches[: len(runs)], layout, reasons)
        if drafting is not None:
            note(describe_drafts([run.result for run in runs if run.result is not None]))
        note(f"sampling: {chosen.text}")
        if where := describe_devices(model):
            note(where)
        note(describe_size(model.specs, num_rows, capacity, layout, slack))
    return 130 if runs[-1].stop else 0


def _report(runs: list[Run], batches: Sequence[Batch], layout: Any, reasons: set[str]) -> None:
    wrote = sum(run.num_tokens for run in runs)
    ended = ", ".join(sorted(reasons))
    note(runs[0].speed())
    note(f"{describe_prefill(batches, layout)}, wrote {wrote:,}: {ended}")
