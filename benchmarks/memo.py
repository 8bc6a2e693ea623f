"""A frozen function's outputs, found again: jaxkv.Memo beside torchcache, joblib and diskcache.

    python benchmarks/memo.py                                       # a table
    python benchmarks/memo.py --rows 1000000 --out docs/data/memo.json --figure docs/figures/memo.png
    python benchmarks/memo.py --faults                              # whose answers are wrong, shown by running
    python benchmarks/memo.py --quick                               # tiny sizes: does it run?

A batch of 64 x (3, 224, 224) float32 goes through a frozen function that takes next to no time (the mean of each
channel, one product to 1,024 features), in JAX for jaxkv, in torch for the others, on the same bytes. Measured are

- hash: what the contestant reads of the batch to find its keys.
- memory hit, disk hit: a call whose items are all there; on disk means in the system's page cache, and not in memory.
- miss: a call that computes and keeps all items, less the function alone, in memory only and on disk only.
- half new: a call with half of its items new and half in memory, all of it.
- first call: naming a backbone of 300 leaves (its program, its weights) before anything can be looked up.
- policies: the share of items found in shuffled epochs when half of them have place.
- --rows: a store on disk of so many rows of 4 KB: time to open it, to look up 64 rows, memory of the index.

torchcache keeps items in memory or, with max_memory_cache_size=0, on disk. joblib.Memory is used as its users do, on
the whole batch, and once more per item, which is what the others answer. diskcache gets what its users write: blake2b
of each item as the key, values as bytes, one transaction per batch. Contestants take turns; medians, ratios of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import memo_faults
import memo_rows
import numpy as np
from common import about, interleave, medians, say, timed, warn_if_busy
from memo_contestants import CONTESTANTS, QUICK, Inputs, Setting, weights

import jaxkv

TARGETS = {"memory hit": 4.0, "disk hit": 6.0, "miss, on disk": 6.0}  # ms, and five times less than torchcache


def measure(setting: Setting, folder: str, *, rounds: int, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns {row: {contestant: milliseconds of each round}}, and who was left out and why."""
    inputs = Inputs(setting)
    made: dict[str, dict[str, Any]] = {"memory": {}, "disk": {}}
    left_out = {}
    for name, contestant in CONTESTANTS.items():
        for tier in contestant.tiers:
            say(f"{name}, {tier}: first call")
            try:
                here = contestant(setting, inputs, tier, os.path.join(folder, name.replace(", ", "-"), tier))
            except ModuleNotFoundError as error:
                left_out[name] = f"{error.name} is not installed"
                continue
            made[tier][name] = here
            same = np.asarray(inputs.x).mean((2, 3)) @ weights(setting)
            for turn in range(2):  # computed, then found
                if not np.allclose(np.asarray(here.call()), same, rtol=1e-3, atol=1e-3):
                    raise RuntimeError(f"{name}, {tier}: call {turn} gave other features")

    def turns(runs: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
        return interleave(runs, rounds=rounds, seconds=seconds)

    table = {}
    say("hash")
    table["hash"] = turns({name: timed(here.hash) for name, here in (made["memory"] | made["disk"]).items()})
    for tier, contestants in made.items():
        say(f"{tier} hit")
        table[f"{tier} hit"] = turns({name: timed(here.call) for name, here in contestants.items()})
    for tier, contestants in made.items():
        say(f"miss, {tier}")
        runs = {name: timed(here.call, inputs.renew) for name, here in contestants.items()}
        runs |= {f"{name} alone": timed(here.alone, inputs.renew) for name, here in contestants.items()}
        times = turns(runs)
        row = f"miss, {'in memory' if tier == 'memory' else 'on disk'}"
        pairs = {name: zip(times[name], times[f"{name} alone"], strict=True) for name in contestants}
        table[row] = {name: [whole - alone for whole, alone in rounds] for name, rounds in pairs.items()}
        table[f"alone ({tier})"] = {name: times[f"{name} alone"] for name in contestants}
    say("half new")
    halves = {name: timed(here.call, lambda: inputs.renew(2)) for name, here in made["memory"].items()}
    table["half new, in memory"] = turns(halves)
    return table, left_out


def first_call(setting: Setting, *, rounds: int) -> dict[str, Any]:
    """Milliseconds to name a backbone of many leaves, and of what is done about its leaves at each later call."""
    from flax import linen

    layers, width = setting.layers, setting.width

    class Backbone(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(layers):
                x = x + linen.relu(linen.Dense(width)(x))
            return x

    network, x = Backbone(), np.zeros((1, width), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
    times: dict[str, list[float]] = {"trace and lower": [], "first call": [], "later call": []}
    for turn in range(-1, rounds):
        say(f"first call: round {turn + 1} of {rounds}")
        with jaxkv.Memo(memory="16MiB") as memo:
            features = memo.wrap(network.apply, variables)
            steps = {
                # Another function each time: JAX remembers what it has traced.
                "trace and lower": lambda: jax.jit(functools.partial(network.apply)).lower(variables, x).as_text(),
                "first call": functools.partial(features.lookup, x),
                "later call": functools.partial(features.lookup, x),
            }
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                if turn >= 0:
                    times[name].append(1e3 * (time.perf_counter() - begin))
    leaves = jax.tree.leaves(variables)
    return {"leaves": len(leaves), "nbytes": sum(leaf.nbytes for leaf in leaves), "ms": times}


def policies(setting: Setting) -> dict[str, list[float]]:
    """The share of items found in each shuffled epoch, when half of them have place in memory."""
    batch = min(64, setting.items)
    items = np.arange(1, setting.items + 1, dtype=np.float32)[:, None] * np.ones(16, np.float32)
    twice = jnp.float32(2)

    def epochs(call: Callable[[np.ndarray], Any], found: Callable[[], int]) -> list[float]:
        rng, shares = np.random.default_rng(0), []
        for _ in range(setting.epochs):
            before = found()
            for part in np.split(rng.permutation(setting.items), range(batch, setting.items, batch)):
                call(items[part])
            shares.append((found() - before) / setting.items)
        return shares

    def remembered(budget: Any, policy: str) -> tuple[list[float], int]:
        with jaxkv.Memo(memory=budget, policy=policy) as memo:
            features = memo.wrap(lambda twice, x: x * twice, twice, batch="full")
            return epochs(features, lambda: memo.stats().hits), memo.stats().memory.nbytes

    _, whole = remembered("1GiB", "keep")
    shares = {policy: remembered(whole // 2, policy)[0] for policy in ("keep", "lru", "mru", "fifo")}
    try:
        import torch
        from torchcache import torchcache
    except ModuleNotFoundError:
        return shares
    computed = 0

    class Twice(torch.nn.Module):
        def forward(self, x):
            nonlocal computed
            computed += len(x)
            return 2 * x

    asked = 0
    cached = torchcache(max_memory_cache_size=items.nbytes // 2)(Twice)()

    def call(part: np.ndarray) -> None:
        nonlocal asked
        asked += len(part)
        cached(torch.from_numpy(part))

    return shares | {"torchcache": epochs(call, lambda: asked - computed)}


def show(data: dict[str, Any]) -> str:
    """The medians as text, each with its ratio to jaxkv."""
    lines = [f"median ms for a batch of {data['shape']['batch']} x {tuple(data['shape']['shape'])} float32"]
    for row, times in data["ms"].items():
        ms = medians(times)
        ratio = {name: f" ({value / ms['jaxkv']:.1f}x)" if name != "jaxkv" else "" for name, value in ms.items()}
        shown = "  ".join(f"{name} {value:.2f}{ratio[name]}" for name, value in ms.items())
        if row in TARGETS and not data["settings"]["quick"]:
            kept = ms["jaxkv"] <= TARGETS[row]
            kept &= "torchcache" not in ms or ms["torchcache"] >= 5 * ms["jaxkv"]
            shown += f"  [at most {TARGETS[row]:g}, a fifth of torchcache's: {'yes' if kept else 'NO'}]"
        lines.append(f"{row:>22}  {shown}")
    first = data["first_call"]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in medians(first["ms"]).items())
    lines.append(f"{first['leaves']} leaves, {first['nbytes'] / 1e6:.1f} MB, ms: {shown}")
    lines.append("found in each shuffled epoch, half of the items have place:")
    for name, shares in data["policies"].items():
        lines.append(f"{name:>22}  " + " ".join(f"{share:.2f}" for share in shares))
    if data["rows"]:
        lines.append(memo_rows.table(data["rows"]))
    lines += [f"left out: {name}: {why}" for name, why in data["left_out"].items()]
    return "\n".join(lines)


def plot(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws hits and misses as bars, one panel each."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = {"memory hit": "found in memory", "disk hit": "found on disk", "miss, on disk": "computed and kept on disk"}
    figure, axes = pyplot.subplots(1, len(rows), figsize=(11, 2.6), layout="constrained", sharex=True, sharey=True)
    names = list(data["ms"]["disk hit"])
    for panel, (row, title) in zip(axes, rows.items(), strict=True):
        ms = medians(data["ms"][row])
        for place, name in enumerate(names):
            color = "C3" if name == "jaxkv" else "0.65"
            panel.barh(place, ms.get(name, 0), color=color, height=0.7)
            said = f" {ms[name]:.1f}" if name in ms else " keeps nothing there"
            panel.text(ms.get(name, 0), place, said, va="center", fontsize=9)
        panel.set(title=title, xlabel="ms", yticks=range(len(names)), yticklabels=names)
        panel.title.set_fontsize(10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlim(0, 1.2 * max(max(medians(data["ms"][row]).values()) for row in rows))
    axes[0].invert_yaxis()
    batch = f"{data['shape']['batch']} x {tuple(data['shape']['shape'])} float32"
    device = f"{data['device']['cores']} cores of {data['device']['cpu']}, {data['date']}"
    figure.suptitle(f"One call with a batch of {batch}, without the function's own time ({device})", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write the times as JSON")
    parser.add_argument("--figure", type=pathlib.Path, help="draw hits and misses")
    parser.add_argument("--plot", type=pathlib.Path, metavar="JSON", help="only draw --figure, from these times")
    parser.add_argument("--rows", type=int, default=0, help="also a store of so many rows on disk; 1000000 takes 9 GB")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--seconds", type=float, default=0.15, help="about how long one turn lasts (default 0.15)")
    parser.add_argument("--faults", action="store_true", help="only show whose answers are wrong")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    args = parser.parse_args(argv)
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.figure or pathlib.Path("memo.png"))
        return 0
    if args.faults:
        return memo_faults.main(quick=args.quick)
    setting = QUICK if args.quick else Setting()
    rounds, seconds = (2, 0.001) if args.quick else (args.rounds, args.seconds)
    settings = {"rounds": rounds, "seconds": seconds, "quick": args.quick}
    packages = ("jax", "jaxlib", "flax", "numpy", "xxhash", "torch", "torchcache", "joblib", "diskcache")
    data = about(packages) | {"shape": dataclasses.asdict(setting), "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        data["ms"], data["left_out"] = measure(setting, folder, rounds=rounds, seconds=seconds)
        data["first_call"] = first_call(setting, rounds=min(rounds, 5))
        data["policies"] = policies(setting)
        data["rows"] = memo_rows.measure(args.rows, folder) if args.rows else None
    say("")
    print(show(data))
    warn_if_busy(data)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    if args.figure:
        plot(data, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
