"""`jaxkv info`: what a model is, what its cache takes, and how long a text fits into memory."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.arguments import FAR
from jaxkv.cache.build import stored_as
from jaxkv.cache.pages import Pages
from jaxkv.cache.plan import max_capacity, plan_memory
from jaxkv.cache.rows import Rows
from jaxkv.cache.storage import Dense
from jaxkv.cli.options import DTYPES
from jaxkv.cli.run import check_capacity
from jaxkv.cli.source import Source, default_dtype, find, told
from jaxkv.cli.storage import storages
from jaxkv.cli.terminal import printable, write
from jaxkv.models import Files, Tokenizer, tiny
from jaxkv.safetensors import File
from jaxkv.sizes import format_bytes

_EXAMPLE = 4096  # tokens, if nobody says how many


def run(args: argparse.Namespace) -> int:
    source = find(args.model or args.directory, text=False)
    check_capacity(args.capacity, source.context, "--context/--capacity")
    with told():
        counts = _counts(source)
    with told():
        specs = stored_as(source.specs(), storages(args.storage))
    facts = {
        "model": f"{source.name} ({source.family})" if source.directory else source.name,
        "parameters": _parameters(source.num_params, counts),
        "layers": _layers(specs),
        "attention": _heads(source),
        "context": "unknown" if source.context is None else f"texts of up to {source.context:,} tokens",
        "tokenizer": _tokenizer(source),
        "stop tokens": ", ".join(map(str, source.stop_tokens)) or "none",
    }
    for name, fact in facts.items():
        write(f"{name:<12} {fact}\n")
    rows, capacity = args.rows, args.capacity or source.context or _EXAMPLE
    layout = _layout(args.layout, rows)
    memory, where = free_memory() if args.memory is None else (args.memory, "given")
    write(f"\n{_table(source, specs, source.num_params, memory, rows, capacity, args.storage, layout)}")
    texts = "one text" if rows == 1 else f"each of {rows:,} texts"
    write(f"\nlongest: tokens of {texts} beside the parameters in {format_bytes(memory)} ({where})\n")
    kept = args.storage or default_dtype() or source.config.dtype.name
    with told():
        specs = specs if args.storage else stored_as(specs, Dense(kept))
        plan = plan_memory(specs, rows, capacity, layout=layout(capacity))
    lies = "" if args.layout == "rows" else f", in pages of {layout(capacity).page_size} tokens"
    write(f"\ncache for {texts.removeprefix('each of ')} of up to {capacity:,} tokens in {kept}{lies}:\n")
    write("".join(f"  {line}\n" for line in str(plan).splitlines()))
    return 0


def _layout(name: str, rows: int) -> Callable[[int], Any]:
    """Returns the layout of a cache of each capacity: of pages as many as all texts can fill."""

    def pages(capacity: int) -> Pages:
        size = min(Pages(1).page_size, capacity)
        return Pages(rows * -(-capacity // size), size)

    return pages if name == "pages" else lambda capacity: Rows()


def _counts(source: Source) -> dict[str, int]:
    """Returns how many numbers of each dtype there are in the files, by their headers."""
    if source.directory is not None:
        return Files(source.directory).dtypes
    counts: dict[str, int] = {}
    file = File(tiny.PATH)
    for name in file:
        kind = file.kind(name).name
        counts[kind] = counts.get(kind, 0) + math.prod(file.shape(name))
    return counts


def _parameters(number: int, counts: dict[str, int]) -> str:
    parts = [f"{format_bytes(count * jnp.dtype(name).itemsize)} of {name}" for name, count in counts.items()]
    return f"{number:,}, {' and '.join(parts)}"


def _layers(specs: Sequence[Any]) -> str:
    reaches = [spec.reach for spec in specs]
    counts = {reach: reaches.count(reach) for reach in reaches}
    return ", ".join(f"{count} {_short(reach)}" for reach, count in counts.items())


def _short(reach: Any) -> str:
    numbers = [str(reach.size)] * (reach.size is not None) + [f"sinks={reach.sinks}"] * (reach.sinks > 0)
    return f"{type(reach).__name__}({', '.join(numbers)})"


def _heads(source: Source) -> str:
    config = getattr(source.config, "decoder", source.config)  # the half that has a cache
    if (latent := getattr(config, "latent", None)) is not None:
        return f"{config.num_heads} query heads, one latent of {latent.rank} and a rotary key of {latent.rotary_dim}"
    kinds = dict.fromkeys(config.layer_heads(i) for i in range(config.num_layers))
    return f"{config.num_heads} query heads, {', '.join(f'{count} kv heads x {size}' for count, size in kinds)}"


def _tokenizer(source: Source) -> str:
    if source.directory is None:
        return "bytes; no chat template"
    try:
        tokenizer = Tokenizer(source.directory)
    except FileNotFoundError:
        return "no tokenizer.json"
    except (ImportError, OSError, ValueError) as error:
        return printable(str(error))
    chat = "with a chat template" if tokenizer.chat_template is not None else "no chat template"
    return f"{tokenizer.vocab_size:,} tokens, {chat}"


def _table(
    source: Source,
    specs: Sequence[Any],
    num_params: int,
    memory: int,
    rows: int,
    capacity: int,
    storage: str | None,
    layout: Callable[[int], Any],
) -> str:
    of = "" if rows == 1 else f", {rows:,} texts"
    lines: list[tuple[str, ...]] = [
        ("dtype", "parameters", "cache per token", f"at {capacity:,} tokens{of}", "longest")
    ]
    for dtype in DTYPES:
        nbytes = num_params * jnp.dtype(dtype).itemsize
        cached = specs if storage else stored_as(specs, Dense(dtype))
        with told():
            plan = plan_memory(cached, rows, capacity, layout=layout(capacity))
        left, most = memory - nbytes, source.context or FAR
        longest = max_capacity(cached, left, rows, most=most, layout=layout) if left > 0 else 0
        if memory < nbytes:
            said = "too large"
        else:
            said = f"all {longest:,}" if longest == source.context else f"{longest:,}"
        lines.append((dtype, format_bytes(nbytes), format_bytes(plan.bytes_per_token), format_bytes(plan.nbytes), said))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + "\n" for line in lines
    )


def free_memory() -> tuple[int, str]:
    """Returns the free bytes of the device that JAX computes on, and how to call them."""
    device = jax.devices()[0]
    stats: Any = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"free on {device.device_kind}"
    return min(_free_on_host()), "free on this machine"


def _free_on_host() -> Iterator[int]:
    """Yields what different accounts say is free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = (line.split() for line in meminfo.read_text().splitlines())
        yield from (int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # of a container
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        yield max(int(most) - int(used.read_text()), 0)
    yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
