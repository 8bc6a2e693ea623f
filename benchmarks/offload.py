"""Offloading activations: append, fetch and iterate, plain and prefetched, per place, next to llm-compressor.

    python benchmarks/offload.py                                  # tables
    python benchmarks/offload.py --out docs/data/offload.json     # the same, kept

- append: a new store takes all batches (a hidden state each, and one mask for all).
- fetch: every batch once, its arrays ready.
- iterate: the same through the iterator, with prefetch 0 and 1.
- overlap: a computation that takes about as long as the copy is done with each batch. On an accelerator the prefetched
  loop should take no longer than the longer of the two alone; on a CPU, where the same cores do both, no longer than
  the plain loop.

llm-compressor's IntermediatesCache gets the same arrays as torch tensors. On a CPU it keeps no copy: it hands out the
tensors that were put in, as `Offload(to=None)` does with arrays of JAX.

    pip install torch tqdm; pip install --no-deps llmcompressor compressed-tensors
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import about, interleave, medians, say, timed, warn_if_busy

import jaxkv

PEER = "llm-compressor"


class Ours:
    """jaxkv.Offload with one place to keep things."""

    def __init__(self, to: Any, batches: list[dict[str, np.ndarray]]) -> None:
        self.to = to
        mask = jnp.array(batches[0]["mask"])
        self.batches = [{"hidden": jnp.array(batch["hidden"]), "mask": mask} for batch in batches]
        self.store = self.filled()

    def filled(self) -> jaxkv.Offload:
        store = jaxkv.Offload(self.to)
        for batch in self.batches:
            store.append(batch)
        return store

    def append(self) -> None:
        store = self.filled()
        jax.block_until_ready(jax.live_arrays())  # the copies
        store.close()

    def fetch(self) -> None:
        for i in range(len(self.store)):
            jax.block_until_ready(self.store.fetch(i))

    def iterate(self, prefetch: int) -> None:
        for batch in self.store.iter(prefetch=prefetch):
            jax.block_until_ready(batch)
            del batch

    def work(self, compute: Callable[[jax.Array], jax.Array], prefetch: int) -> None:
        for batch in self.store.iter(["hidden"], prefetch=prefetch):
            jax.block_until_ready(compute(batch["hidden"]))
            del batch


class Theirs:
    """llm-compressor's cache, from CPU or GPU tensors to the CPU."""

    def __init__(self, module: Any, batches: list[dict[str, np.ndarray]]) -> None:
        import torch

        self.cache, self.torch = module.IntermediatesCache, torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mask = torch.from_numpy(batches[0]["mask"].copy()).to(self.device)
        self.batches = [
            {"hidden": torch.from_numpy(batch["hidden"].copy()).to(self.device), "mask": mask} for batch in batches
        ]
        self.store = self.filled()
        if self.device.type == "cuda":
            for i in range(len(self.store)):
                self.store.pin_memory(i)

    def filled(self) -> Any:
        self.cache.offload_values.clear()  # it is shared by all caches: nothing would be copied again
        store = self.cache.empty(len(self.batches), self.torch.device("cpu"))
        for batch in self.batches:
            store.append(batch)
        return store

    def ready(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def append(self) -> None:
        self.filled()
        self.ready()

    def fetch(self) -> None:
        for i in range(len(self.store)):
            self.store.fetch(i)
            self.ready()

    def iterate(self, prefetch: int) -> None:
        for batch in self.store.iter_prefetch() if prefetch else self.store.iter():
            self.ready()
            del batch


def load_peer() -> Any:
    """Returns the module of llm-compressor's cache, or None. The package wants much that its cache does not."""
    try:
        import llmcompressor.pipelines.cache as module
    except ImportError:
        found = importlib.util.find_spec("llmcompressor")
        if found is None or found.origin is None:
            return None
        path = pathlib.Path(found.origin).parent / "pipelines" / "cache.py"
        spec = importlib.util.spec_from_file_location("llmcompressor_cache", path)
        if spec is None or spec.loader is None:
            return None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError:
            return None
    return module


def computation(like: jax.Array, milliseconds: float) -> Callable[[jax.Array], jax.Array]:
    """Returns a compiled function of an array that takes about so long."""

    @functools.partial(jax.jit, static_argnums=1)
    def times(x: jax.Array, count: int) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y * 0.999 + 0.001, x)

    run = timed(lambda: jax.block_until_ready(times(like, 8)))
    run(1)
    each = 1e3 * run(5) / 5 / 8
    return functools.partial(times, count=max(1, round(milliseconds / each)))


def overlap(ours: Ours, options: dict[str, Any]) -> dict[str, float]:
    """Returns milliseconds for all batches: copy alone, compute alone, both plain, both prefetched."""
    copy = interleave({"copy": timed(lambda: ours.iterate(0))}, **options)["copy"][0]
    compute = computation(ours.batches[0]["hidden"], copy / len(ours.batches))

    def alone() -> None:
        for batch in ours.batches:
            jax.block_until_ready(compute(batch["hidden"]))

    runs = {
        "copy": timed(lambda: ours.iterate(0)),
        "compute": timed(alone),
        "both": timed(lambda: ours.work(compute, 0)),
        "both, prefetched": timed(lambda: ours.work(compute, 1)),
    }
    return medians(interleave(runs, **options))


def inputs(count: int, shape: tuple[int, int, int]) -> Iterator[dict[str, np.ndarray]]:
    for i in range(count):
        hidden = np.random.default_rng(i).standard_normal(shape, np.float32)
        yield {"hidden": hidden, "mask": np.tril(np.ones((shape[1], shape[1]), bool))}


def show(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in times.items():
        peer = next((times[other] for other in (name.replace(name.split(",")[0], PEER), PEER) if other in times), None)
        ratio = f"  {value / peer:8.2f} x {PEER}" if peer and not name.startswith(PEER) else ""
        print(f"  {name:28} {value:10.3f} ms{ratio}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write the times as JSON")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn (default 0.5)")
    parser.add_argument("--quick", action="store_true", help="small arrays, one round: shows that the script runs")
    arguments = parser.parse_args(argv)
    options = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    count, shape = 16, (8, 512, 1024)
    if arguments.quick:
        options, count, shape = {"rounds": 1, "seconds": 0.01}, 3, (2, 8, 16)
    facts = about(("jax", "jaxlib", "numpy", "torch", "llmcompressor"))
    facts["device"]["jax"] = jax.devices()[0].device_kind
    batches = list(inputs(count, shape))
    with tempfile.TemporaryDirectory() as folder:
        places = {"pinned_host": "pinned_host", "numpy": "numpy", "directory": pathlib.Path(folder), "in place": None}
        contestants: dict[str, Any] = {name: Ours(to, batches) for name, to in places.items()}
        peer = load_peer()
        if peer is None:
            print("left out: llm-compressor or what its cache needs is not installed")
        else:
            contestants[PEER] = Theirs(peer, batches)
        times: dict[str, dict[str, list[float]]] = {}
        for what in ("append", "fetch"):
            say(what)
            times[what] = interleave({name: timed(getattr(one, what)) for name, one in contestants.items()}, **options)
        iterations = {}
        for name, one in contestants.items():
            iterations[name] = timed(lambda one=one: one.iterate(0))
            iterations[f"{name}, prefetched"] = timed(lambda one=one: one.iterate(1))
        say("iterate")
        times["iterate"] = interleave(iterations, **options)
        both = {}
        for name in ("pinned_host", "numpy", "directory"):
            say(f"overlap: {name}")
            both[name] = overlap(contestants[name], options)
    say("")
    print(f"{count} batches of {batches[0]['hidden'].nbytes / 1e6:.1f} MB; milliseconds for all of them, medians")
    for what, found in times.items():
        show(what, medians(found))
    print("\noverlap")
    for name, found in both.items():
        longer = max(found["copy"], found["compute"])
        shown = "  ".join(f"{key} {value:.2f}" for key, value in found.items())
        prefetched = found["both, prefetched"]
        print(f"  {name:12} {shown}")
        print(
            f"  {'':12} prefetched {prefetched / found['both']:.3f} x plain, {prefetched / longer:.3f} x the longer one"
        )
    plain = medians(times["iterate"])
    print("\niterating, prefetched against plain")
    for name in contestants:
        print(f"  {name:28} {plain[f'{name}, prefetched'] / plain[name]:.3f}")
    warn_if_busy(facts)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"batches": count, "shape": shape, **options}
        arguments.out.write_text(
            json.dumps({**facts, "settings": settings, "ms": times, "overlap": both}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
