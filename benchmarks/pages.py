"""Pages beside rows, and the loops that share what sequences have in common beside transformers' (torch).

    python benchmarks/pages.py                                  # a table
    python benchmarks/pages.py --out docs/data/pages.json       # the same, kept, with docs/figures/pages.png
    python benchmarks/pages.py --only samples --out docs/data/pages.json    # measures this anew, keeps the others
    python benchmarks/pages.py --plot docs/data/pages.json      # only draws the figure again
    python benchmarks/pages.py --quick                          # tiny sizes: does it run?

layer    one decode step of one layer, as in decode.py; the pages lie in the pool in random order
model    the 125 M Llama shape of model.py, random weights: milliseconds per token on pages and on rows
samples  32 samples of one prompt: seconds of the whole call, and the bytes of the cache
forks    copy_prefix and take of 64 and of 4,096 tokens
beams    beam search with 4 beams, beside plain decoding of 4 rows
lookup   speculation by prompt lookup. Random weights repeat nothing, so what they write is dictated, by a bonus on the
         logit of each next token: a file of the standard library with one of its names changed, after that file; and
         prose after other prose. What a step costs is the model's own.

transformers runs in a process of its own, on the same cores, and has its turns as all others have. Medians of one run
are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import pathlib
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from typing import Any

import common
import decode
import jax
import jax.numpy as jnp
import model
import numpy as np
from common import ROOT, about, in_turn, interleave, medians, say, warn_if_busy
from pages_transformers import Peer

import jaxkv

THEIRS = "transformers"


@dataclasses.dataclass(frozen=True)
class Setting:
    shape: model.Shape = dataclasses.field(default_factory=model.Shape)
    layer: decode.Setting = dataclasses.field(
        default_factory=lambda: decode.Setting(batches=(1,), capacities=(4096,), fills=(64, 256, 1024, 4096))
    )
    page_sizes: tuple[int, ...] = (16, 64)
    prompt: int = 1024  # of the samples
    num_samples: int = 32
    new: int = 32
    forks: tuple[int, ...] = (64, 4096)
    beam_prompt: int = 512
    num_beams: int = 4
    beam_new: int = 64
    lookup_prompt: int = 768
    lookup_new: int = 192


QUICK = Setting(
    model.TINY, decode.Setting(4, 2, 16, (1,), (128,), (8, 128)), (16,), 32, 4, 4, (16, 64), 16, 2, 4, 40, 8
)


def turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each contestant, one number per round, without the first turn of all, which compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):
        for name in in_turn(list(runs), turn):
            say(f"round {turn + 1} of {rounds}: {name}")
            seconds = runs[name]()
            if turn >= 0:
                times[name].append(seconds)
    return times


def must(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(what)


class Paged(decode.Jaxkv):
    """A layer of decode.py on pages, which lie in the pool in random order."""

    def __init__(self, page_size: int, *args: Any):
        self.page_size = page_size
        super().__init__(*args)

    def empty(self, spec, batch, capacity):
        count = batch * capacity // self.page_size
        cache = jaxkv.Cache.init([spec], batch, capacity, layout=jaxkv.Pages(count, self.page_size))
        (group,) = cache.groups
        free = jnp.asarray(np.random.default_rng(0).permutation(count).astype(np.int32))
        group = dataclasses.replace(group, pages=dataclasses.replace(group.pages, free=free))
        return dataclasses.replace(cache, groups=(group,))


def layer(s: Setting, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step at each fill."""
    (capacity,) = s.layer.capacities
    made = {"rows": decode.Jaxkv(s.layer, 1, capacity)}
    made |= {f"pages of {size}": Paged(size, s.layer, 1, capacity) for size in s.page_sizes}
    cells = {}
    for fill in s.layer.fills:
        say(f"one layer, {fill} tokens")
        cells[str(fill)] = interleave({k: x.at(fill) for k, x in made.items()}, rounds=3 * rounds, seconds=seconds)
    return {"ms": cells}


@dataclasses.dataclass
class Llama:
    """The model that the parts below decode with, and the checkpoint that transformers loads."""

    setting: Setting
    folder: str

    def __post_init__(self) -> None:
        say("writing a random llama")
        model.write_checkpoint(self.setting.shape, self.folder)
        self.model = jaxkv.models.load(self.folder, dtype="float32", fuse=True)
        self.forward, self.params = self.model.forward, self.model.params
        size = self.setting.shape.vocab_size
        self.prompt = np.random.default_rng(1).integers(0, size, self.setting.shape.capacity)

    @functools.cached_property
    def peer(self) -> Peer | None:
        return Peer(self.folder, common.count_cores()) if Peer.there() else None

    def cache(self, rows: int, capacity: int, layout: Any = jaxkv.Rows()) -> jaxkv.Cache:  # noqa: B008
        block = min(self.setting.shape.max_block, capacity)
        return jaxkv.Cache.init(self.model.specs, rows, capacity, layout=layout, max_block=block)


class Decoding:
    """One sequence that is decoded from the same place again and again."""

    def __init__(self, llama: Llama, layout: Any):
        self.llama, self.cache = llama, llama.cache(1, llama.setting.shape.capacity, layout)
        self.rewind = jax.jit(lambda cache, n: cache.rewind(n[None]), donate_argnums=0)

    def run(self, length: int, new: int) -> float:
        begin = time.perf_counter()
        prompt = [self.llama.prompt[: length + 1]]
        result = jaxkv.generate(self.llama.forward, self.llama.params, prompt, self.cache, max_new_tokens=new)
        seconds = time.perf_counter() - begin
        self.cache = jax.block_until_ready(self.rewind(result.cache, jnp.int32(length)))
        return seconds


def model_part(s: Setting, llama: Llama, rounds: int) -> dict[str, Any]:
    """Milliseconds per token at each context."""
    count = s.shape.capacity // 16
    made = {"rows": Decoding(llama, jaxkv.Rows()), "pages of 16": Decoding(llama, jaxkv.Pages(count, 16))}
    cells = {}
    for length in s.shape.contexts:
        for name, one in made.items():
            say(f"{name}: reading {length} tokens")
            one.run(length, 1)
        runs = {name: functools.partial(one.run, length, s.new) for name, one in made.items()}
        times = turns(runs, rounds)
        cells[str(length)] = {name: [1e3 * t / s.new for t in values] for name, values in times.items()}
    return {"ms": cells}


def samples(s: Setting, llama: Llama, rounds: int) -> dict[str, Any]:
    """Seconds of the whole call, the prompt included, and bytes of the cache."""
    n, capacity, size = s.num_samples, s.prompt + s.new, 16
    prompt, options = llama.prompt[: s.prompt], {"max_new_tokens": s.new, "key": jax.random.key(0)}
    pages = jaxkv.Pages(s.prompt // size + n * (-(-s.new // size) + 1), size)
    sampler = jaxkv.sampling.Temperature(1.0)
    reset = jax.jit(lambda cache: cache.reset(jnp.ones_like(cache.ok)), donate_argnums=0)
    # Told that they share nothing, as many as that, rows are read one by one, by the same loop.
    held = {
        "best_of on pages": llama.cache(n, capacity, pages),
        "on pages, each row read by itself": llama.cache(n, capacity, pages).sharing(jnp.int32(0)),
        "best_of on rows": llama.cache(n, capacity),
        "on rows, each row read by itself": llama.cache(n, capacity).sharing(jnp.int32(0)),
    }
    alone = [llama.cache(1, capacity)]
    nbytes = {name: cache.nbytes for name, cache in held.items()}

    def together(name: str) -> float:
        cache = jax.block_until_ready(reset(held[name]))
        begin = time.perf_counter()
        result = jaxkv.best_of(llama.forward, llama.params, [prompt], cache, n=n, sampler=sampler, **options)
        seconds = time.perf_counter() - begin
        must(set(result.reasons[0]) == {"length"}, f"samples ended by {result.reasons}")
        held[name] = result.cache
        return seconds

    def one_by_one() -> float:
        cache = jax.block_until_ready(reset(alone[0]))
        begin = time.perf_counter()
        result = jaxkv.generate(llama.forward, llama.params, [prompt], cache, sampler=sampler, **options)
        seconds = time.perf_counter() - begin
        alone[0] = result.cache
        return seconds * n

    runs: dict[str, Any] = {name: functools.partial(together, name) for name in held}
    runs["one after the other (one, times as many)"] = one_by_one
    times = turns(runs, rounds)
    held.clear()
    if llama.peer:
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": n}
        say(THEIRS)  # once: it reads the prompt for every sample
        times[THEIRS] = [llama.peer(prompt, s.new, **options)[0]]
    return {"seconds": times, "nbytes": nbytes, "of": [s.prompt, n, s.new]}


def forks(s: Setting, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a `copy_prefix` and of a `take`, in a donated loop."""
    shape, longest, num_rows = s.shape, max(s.forks), 4
    spec = jaxkv.LayerSpec(jaxkv.Full(), shape.num_kv_heads, shape.head_dim)
    rows = jnp.arange(num_rows, dtype=jnp.int32)[::-1]

    def copied(i: Any, cache: Any, length: Any) -> Any:
        return cache.copy_prefix(0, 1 + i % (num_rows - 1), length)

    def taken(i: Any, cache: Any, length: Any) -> Any:
        return cache.take(rows)

    def looped(change: Any, layout: Any, length: int) -> Callable[[int], float]:
        cache = jaxkv.Cache.init([spec] * shape.num_layers, num_rows, longest, layout=layout, max_block=length)
        cache, _ = jax.jit(jaxkv.Cache.begin, donate_argnums=0)(cache, np.tile(np.arange(length), (num_rows, 1)))
        held = [cache]

        @functools.partial(jax.jit, donate_argnums=0)
        def loop(cache, length, steps):
            return jax.lax.fori_loop(0, steps, lambda i, cache: change(i, cache, length), cache)

        def run(steps: int) -> float:
            begin = time.perf_counter()
            held[0] = jax.block_until_ready(loop(held[0], jnp.int32(length), jnp.int32(steps)))
            return time.perf_counter() - begin

        return run

    layouts = {"rows": jaxkv.Rows(), "pages of 16": jaxkv.Pages(num_rows * longest // 16, 16)}
    cells: dict[str, Any] = {}
    for name, change in (("copy_prefix", copied), ("take", taken)):
        say(f"forks: {name}")
        runs = {f"{on}, {n}": looped(change, layout, n) for on, layout in layouts.items() for n in s.forks}
        cells[name] = interleave(runs, rounds=rounds, seconds=seconds)
    return {"ms": cells}


def beams(s: Setting, llama: Llama, rounds: int) -> dict[str, Any]:
    """Seconds of the whole call, the prompt included."""
    n, capacity, new = s.num_beams, s.beam_prompt + s.beam_new, s.beam_new
    prompt = llama.prompt[: s.beam_prompt]
    pages = jaxkv.Pages(n * -(-capacity // 16), 16)
    reset = jax.jit(lambda cache: cache.reset(jnp.ones_like(cache.ok)), donate_argnums=0)
    layouts = {"on pages": pages, "on rows": jaxkv.Rows()}
    held = {on: llama.cache(n, capacity, layout) for on, layout in layouts.items()}
    held |= {f"plain decoding {on}": llama.cache(n, capacity, layout) for on, layout in layouts.items()}
    texts: dict[str, list[int]] = {}

    def search(name: str) -> float:
        cache = jax.block_until_ready(reset(held[name]))
        begin = time.perf_counter()
        result = jaxkv.beam_search(llama.forward, llama.params, [prompt], cache, num_beams=n, max_new_tokens=new)
        seconds = time.perf_counter() - begin
        held[name], texts[name] = result.cache, result.tokens[0, 0].tolist()
        return seconds

    def plain(name: str) -> float:
        """As many samples of the prompt, read once."""
        cache = jax.block_until_ready(reset(held[name]))
        begin = time.perf_counter()
        result = jaxkv.best_of(
            llama.forward, llama.params, [prompt], cache, n=n, max_new_tokens=new, key=jax.random.key(0)
        )
        seconds = time.perf_counter() - begin
        held[name] = result.cache
        return seconds

    runs: dict[str, Any] = {k: functools.partial(plain if "plain" in k else search, k) for k in held}
    if llama.peer:

        def theirs() -> float:
            seconds, (texts[THEIRS],) = llama.peer(prompt, new, num_beams=n, do_sample=False)
            return seconds

        runs[THEIRS] = theirs
    times = turns(runs, rounds)
    same = {name: text == texts["on pages"] for name, text in texts.items()}
    return {"seconds": times, "same_text": same, "of": [s.beam_prompt, n, new]}


@dataclasses.dataclass(frozen=True)
class Dictated:
    """A model that writes what it is told."""

    forward: Any

    def __call__(self, params, tokens, positions, cache):
        params, script = params
        logits, cache = self.forward(params, tokens, positions, cache)
        following = script[jnp.clip(positions + 1, 0, script.size - 1)]
        numbers = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.where(numbers[None, None] == following[..., None], 1e4, logits), cache


def scripts(s: Setting) -> dict[str, np.ndarray]:
    """The texts that are dictated, as numbers of words, the prompt in front."""
    from pydoc_data.topics import topics

    def numbered(*texts: str) -> list[np.ndarray]:
        words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in texts]
        ids = {word: i for i, word in enumerate(dict.fromkeys(word for part in words for word in part))}
        return [np.array([ids[word] % s.shape.vocab_size for word in part], np.int32) for part in words]

    source = inspect.getsource(textwrap)
    source, edited = numbered(source, re.sub(r"\bwidth\b", "columns", source))
    prose, other = numbered(topics["execmodel"], topics["strings"])
    begin = s.lookup_prompt // 3  # beyond the license
    parts = {
        "a file edited": (source[begin:], edited[begin:]),
        "other prose": (prose, other),
    }
    return {
        name: np.concatenate([first[: s.lookup_prompt], then[: s.lookup_new]]) for name, (first, then) in parts.items()
    }


def lookup(s: Setting, llama: Llama, rounds: int) -> dict[str, Any]:
    """Seconds for the new tokens alone, and how many forward passes they took."""
    forward, capacity, new = Dictated(llama.forward), s.lookup_prompt + s.lookup_new + 16, s.lookup_new
    rewind = jax.jit(lambda cache, n: cache.rewind(n[None]), donate_argnums=0)
    held = {"plain": llama.cache(1, capacity), "by lookup": llama.cache(1, capacity)}
    found: dict[str, Any] = {}
    for name, script in scripts(s).items():
        prompt, params = script[: s.lookup_prompt], (llama.params, jnp.asarray(script))
        passes: dict[str, int] = {}

        def ours(way: str, prompt=prompt, params=params, script=script, passes=passes) -> float:
            loop = jaxkv.generate if way == "plain" else jaxkv.speculate
            cache = rewind(held[way], jnp.int32(0))
            _, cache = jaxkv.prefill(forward, params, [prompt[:-1]], cache)
            cache = jax.block_until_ready(cache)
            begin = time.perf_counter()
            result = loop(forward, params, [prompt], cache, max_new_tokens=new)
            seconds = time.perf_counter() - begin
            must(result.tokens[0].tolist() == script[s.lookup_prompt :].tolist(), "not what was dictated")
            passes[way] = new if way == "plain" else int(result.steps[0])
            held[way] = result.cache
            return seconds

        def theirs(options: dict[str, Any], prompt=prompt, script=script) -> float:
            """Without the prompt, which one token less takes."""
            read, _ = llama.peer(prompt, 1, script.tolist(), do_sample=False)
            seconds, (text,) = llama.peer(prompt, new, script.tolist(), do_sample=False, **options)
            must(text == script[s.lookup_prompt :].tolist(), "not what was dictated")
            return seconds - read

        runs = {way: functools.partial(ours, way) for way in held}
        if llama.peer:
            runs |= {
                f"{THEIRS}, plain": functools.partial(theirs, {}),
                f"{THEIRS}, by lookup": functools.partial(theirs, {"prompt_lookup_num_tokens": 8}),
            }
        found[name] = {"seconds": turns(runs, rounds), "passes": passes}
    return {"texts": found, "of": [s.lookup_prompt, new]}


PARTS = ("layer", "model", "samples", "forks", "beams", "lookup")
OF_MODEL = {"model": model_part, "samples": samples, "beams": beams, "lookup": lookup}


def measure(s: Setting, names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Runs these parts and returns what `--out` writes, a table printed after each."""
    facts = about(("jax", "jaxlib", "flax", "torch", "transformers"))
    warn_if_busy(facts)
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        llama = None
        for name in names:
            if name in OF_MODEL:
                llama = llama or Llama(s, folder)
                part = OF_MODEL[name](s, llama, rounds)
            else:
                part = {"layer": layer, "forks": forks}[name](s, 3 * rounds, seconds)
            data[name] = {**facts, "rounds": rounds, **part}
            say("")
            print(table(name, data[name]), flush=True)
        if llama and llama.peer:
            llama.peer.close()
    return data


def lines_of(times: dict[str, list[float]], unit: str, base: str) -> list[str]:
    """The medians, each with its ratio to one of them."""
    middle = medians(times)
    return [f"  {name:44} {value:10.3f} {unit} {value / middle[base]:6.2f}x" for name, value in middle.items()]


def table(name: str, part: dict[str, Any]) -> str:
    """A part's medians as text."""
    lines = []
    if name in ("layer", "model"):
        for fill, ms in part["ms"].items():
            lines += [f"{name}, {fill} tokens held", *lines_of(ms, "ms", "rows")]
    elif name == "forks":
        for what, ms in part["ms"].items():
            lines += [what, *lines_of(ms, "ms", list(ms)[-1])]
    elif name == "lookup":
        for text, found in part["texts"].items():
            passes = ", ".join(f"{way}: {n}" for way, n in found["passes"].items())
            lines += [f"{text}; passes of the model for {part['of'][1]} tokens: {passes}"]
            lines += lines_of(found["seconds"], "s", "plain")
    else:
        first = next(iter(part["seconds"]))
        lines += [f"{name}: prompt, how many, new tokens: {part['of']}", *lines_of(part["seconds"], "s", first)]
        lines += [f"  {what}: cache of {size / 2**20:.0f} MiB" for what, size in part.get("nbytes", {}).items()]
        lines += [
            f"  {what}: {'the same' if same else 'another'} text" for what, same in part.get("same_text", {}).items()
        ]
    return "\n".join(lines)


def plot(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws each part that there is: time over tokens held, or bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = {
        "layer": "One decode step of one layer",
        "model": "125 M Llama, a token",
        "samples": "{1} samples of a prompt of {0:,}",
        "forks": "Forks",
        "beams": "{1} beams, prompt of {0}",
    }
    panels: list[tuple[str, str, dict[str, float]]] = []
    for name in ("layer", "model"):
        for fill, ms in data.get(name, {}).get("ms", {}).items():
            panels.append((f"{titles[name]}: {int(fill):,} held", "ms", medians(ms)))
    for name in ("samples", "beams"):
        if name in data:
            panels.append((titles[name].format(*data[name]["of"]), "seconds", medians(data[name]["seconds"])))
    for what, ms in data.get("forks", {}).get("ms", {}).items():
        panels.append((f"{what} of so many tokens", "ms", medians(ms)))
    for text, found in data.get("lookup", {}).get("texts", {}).items():
        panels.append((f"prompt lookup: {text}", "seconds", medians(found["seconds"])))
    columns = 3
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(14, 2.1 * -(-len(panels) // columns)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in axes.ravel()[len(panels) :]:
        panel.set_axis_off()
    for panel, (title, unit, values) in zip(axes.ravel(), panels, strict=False):
        colors = ["C1" if THEIRS in name else "0.6" if "rows" in name or "plain" in name else "C0" for name in values]
        bars = panel.barh(list(values), list(values.values()), color=colors)
        panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize=7)
        panel.set_title(f"{title} ({unit})", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="where the numbers go (json); parts not measured are kept")
    parser.add_argument("--plot", type=pathlib.Path, help="only draw the figure of these numbers")
    parser.add_argument("--figure", type=pathlib.Path, default=ROOT / "docs/figures/pages.png")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.05, help="about how long one turn of a single step lasts")
    args = parser.parse_args(argv)
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.figure)
        return 0
    setting, rounds, seconds = (QUICK, 1, 0.001) if args.quick else (Setting(), args.rounds, args.seconds)
    data = measure(setting, args.only, rounds, seconds)
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        data = {name: part for name in PARTS if (part := data.get(name, kept.get(name)))}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        plot(data, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
