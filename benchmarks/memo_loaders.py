"""Loader workers that share one large store: the memory of each, and the items per second of all.

    python benchmarks/memo_loaders.py                              # 8 spawned workers of torch, a million rows: 5 GB
    python benchmarks/memo_loaders.py --earlier DIR                # beside another jaxkv, whose package is in DIR
    python benchmarks/memo_loaders.py --rows 100000 --out loaders.json

A function of 16 numbers gives rows of 4 KB, which `warm` computes. torch's `DataLoader` then reads a `source` in random
order, 64 examples at a time. An example costs next to nothing, so what is timed is the hash, the lookup, and the way of
the batch from the worker to the program. Outputs are compared with what they should be.

The memory of a store's index is a worker's own memory less that of a worker on a store of 1,000 rows. Contestants take
turns, each time in a new process; the median of their turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROW, BATCH, FEW = 1024, 64, 1000  # numbers, rows, rows


class Examples:
    """16 numbers that stand for each row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(16, index, np.float32)  # whole up to 16 million


def own_bytes(pid: int) -> int:
    """A process's own memory (Linux), without the pages of files."""
    resident, shared = map(int, pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def work(directory: str, rows: int, workers: int, seconds: float) -> dict[str, float]:
    """In a process of its own: fills the store if need be, then reads it with the workers."""
    import jax.numpy as jnp
    import torch

    import jaxkv

    with jaxkv.Memo(memory=None, disk=directory) as memo:
        features = memo.wrap(lambda weights, x: x[:, :1] * weights, jnp.ones(ROW))
        numbers = np.arange(rows, dtype=np.float32)
        begin = time.perf_counter()
        parts = np.array_split(numbers, max(rows // 4096, 1))
        features.warm((np.repeat(part[:, None], 16, 1) for part in parts), progress=False)
        filled = time.perf_counter() - begin
        source = features.source(Examples(rows))
    loader = torch.utils.data.DataLoader(
        source, batch_size=BATCH, shuffle=True, num_workers=workers, multiprocessing_context="spawn"
    )
    batches = iter(loader)
    first = [next(batches) for _ in range(4 * workers)]  # every worker has begun, and what it fetched ahead is gone
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds and (batch := next(batches, None)) is not None:
        if not (batch[:, :1] == batch).all():
            raise RuntimeError("a row is wrong")
        count += len(batch)
    took = time.perf_counter() - begin
    own = statistics.median(own_bytes(worker.pid) for worker in batches._workers) if count else 0
    return {"items_per_second": count / took, "own_bytes": own, "filled_seconds": filled, "first": len(first)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many (default 1000000)")
    parser.add_argument("--workers", type=int, default=8, help="processes (default 8)")
    parser.add_argument("--seconds", type=float, default=8, help="how long each turn reads (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--earlier", type=pathlib.Path, help="a folder with another jaxkv, to compare with")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--work", nargs=2, metavar=("DIR", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        print(json.dumps(work(args.work[0], int(args.work[1]), args.workers, args.seconds)))
        return 0

    from common import ROOT, about, in_turn, say, warn_if_busy

    places = {"jaxkv": ROOT} | ({"earlier": args.earlier.resolve()} if args.earlier else {})
    data = about(("jax", "numpy", "torch", "xxhash"))
    settings = {name: getattr(args, name) for name in ("rows", "workers", "seconds", "rounds")}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    few: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def ask(name: str, rows: int, seconds: float) -> dict[str, Any]:
            say(f"{name}: {rows:,} rows")
            store = os.path.join(folder, f"{name}-{rows}")
            words = [sys.executable, __file__, "--work", store, str(rows), "--workers", str(args.workers)]
            env = os.environ | {"PYTHONPATH": str(places[name]), "JAX_PLATFORMS": "cpu"}
            done = subprocess.run([*words, "--seconds", str(seconds)], env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return json.loads(done.stdout)

        for name in places:
            few[name] = ask(name, max(FEW, 8 * args.workers * BATCH), 0.1)
        for turn in range(args.rounds):
            for name in in_turn(list(places), turn):
                turns[name].append(ask(name, args.rows, args.seconds))
    data |= {"settings": settings, "few": few, "turns": turns}
    say("")
    print(f"{args.workers} workers on {args.rows:,} rows of 4 KB, {BATCH} at once")
    for name, results in turns.items():
        speed = statistics.median(result["items_per_second"] for result in results)
        index = statistics.median(result["own_bytes"] for result in results) - few[name]["own_bytes"]
        print(f"{name:>10}  {speed:10,.0f} items/s  index of each worker {index / 1e6:8.1f} MB")
    warn_if_busy(data)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
