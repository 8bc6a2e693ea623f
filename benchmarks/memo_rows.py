"""A store on disk with many rows: time to open it, to look rows up, and memory it takes. Run by memo.py --rows.

lmdb, where it is installed, is measured after it in the same way, with the same rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from common import say
from disk import STORES

ROW = 4096  # bytes
BATCH = 4096  # rows written at once
ASKED = 64  # rows looked up at once
LOOKUPS = 200  # of each kind; as many where there are few rows, or the first ones would weigh more there
NAMESPACE = bytes(16)


def keys_of(numbers: Any) -> list[bytes]:
    return [NAMESPACE + hashlib.blake2b(int(n).to_bytes(8, "little"), digest_size=16).digest() for n in numbers]


def payloads_of(numbers: np.ndarray) -> np.ndarray:
    """Row n is the number n, over and over."""
    return np.repeat(numbers.astype(np.uint64)[:, None], ROW // 8, axis=1)


def milliseconds(store: Any, numbers: np.ndarray, there: bool) -> float:
    """The time of one lookup; what it finds is checked."""
    keys = keys_of(numbers)
    begin = time.perf_counter()
    found = store.read(keys, ROW)
    took = 1e3 * (time.perf_counter() - begin)
    pairs = zip(found, payloads_of(numbers), strict=True)
    right = [value is not None and bytes(value) == row.tobytes() for value, row in pairs]
    if not (all(right) if there else all(value is None for value in found)):
        raise RuntimeError("a row was lost, wrong, or found where none was")
    return took


def plain_milliseconds(files: list[Any], rng: np.random.Generator) -> float:
    """The time of as many reads at random places of the store's files, and nothing else: the system's part of it."""
    places = []
    for file in rng.integers(len(files), size=ASKED):
        size = os.fstat(files[file].fileno()).st_size
        places.append((files[file].fileno(), int(rng.integers(max(size - ROW, 1)))))
    begin = time.perf_counter()
    for fd, place in places:
        os.pread(fd, ROW, place)
    return 1e3 * (time.perf_counter() - begin)


def private_bytes() -> int:
    """This process's own memory (Linux), without the pages of files."""
    resident, shared = map(int, pathlib.Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def opened(name: str, directory: str, count: int, pipe: Any) -> None:
    """A new process opens the store and looks up rows."""
    before = private_bytes() if pathlib.Path("/proc/self/statm").exists() else 0
    begin = time.perf_counter()
    store = STORES[name](directory)
    rng = np.random.default_rng(count)
    first = milliseconds(store, rng.integers(count, size=ASKED), True)
    seconds = time.perf_counter() - begin
    held = private_bytes() - before if before else None
    some = [rng.choice(count, ASKED, replace=False) for _ in range(LOOKUPS)]
    near = [np.arange(ASKED) + ASKED * (i % (count // ASKED)) for i in range(LOOKUPS)]
    hit = [milliseconds(store, numbers, True) for numbers in some]
    miss = [milliseconds(store, count + numbers, False) for numbers in some]
    together = [milliseconds(store, numbers, True) for numbers in near]
    files = [path.open("rb") for path in pathlib.Path(directory).glob("*.*db")]  # lmdb's is data.mdb
    plain = [plain_milliseconds(files, rng) for _ in range(LOOKUPS)]
    ms = {"hit": hit, "hit, in order": together, "miss": miss, "plain reads": plain}
    ms = {name: {"median": float(np.median(t)), "p95": float(np.quantile(t, 0.95))} for name, t in ms.items()}
    pipe.send({"open_seconds": seconds, "first_ms": first, "index_bytes": held, "ms": ms})


def measure(count: int, folder: str) -> dict[str, Any]:
    """Returns what opening and looking up costs at 1,000 rows, 10,000, ... and `count`."""
    need = count * ROW * (2.1 if importlib.util.find_spec("lmdb") else 1.2)
    if shutil.disk_usage(folder).free < need:
        raise OSError(f"{folder} has no room for {need / 1e9:.1f} GB; name another place with TMPDIR")
    measured = grown("jaxkv", count, os.path.join(folder, "rows"))
    peers = {"lmdb": grown("lmdb", count, os.path.join(folder, "peer"))} if importlib.util.find_spec("lmdb") else {}
    return {"row_bytes": ROW, "asked": ASKED, **measured, "peers": peers}


def grown(name: str, count: int, directory: str) -> dict[str, Any]:
    """Returns what a store costs as it grows to so many rows. It is removed afterwards."""
    context = multiprocessing.get_context("spawn")
    sizes = [10**power for power in range(3, 12) if 10**power < count] + [count]
    store, cells, written, spent = STORES[name](directory), [], 0, 0.0
    for size in sizes:
        while written < size:
            if written % (64 * BATCH) < BATCH:
                say(f"{name}: {written:,} rows of {count:,}")
            numbers = np.arange(written, min(written + BATCH, size))
            keys, payloads = keys_of(numbers), [row.tobytes() for row in payloads_of(numbers)]
            begin = time.perf_counter()
            store.write(keys, payloads)
            spent += time.perf_counter() - begin
            written += len(numbers)
        ours, theirs = context.Pipe()
        process = context.Process(target=opened, args=(name, directory, size, theirs))
        process.start()
        theirs.close()  # or a process that fails would be waited for
        cells.append({"rows": size, **ours.recv()})
        process.join()
    stored = sum(path.stat().st_size for path in pathlib.Path(directory).rglob("*") if path.is_file())
    del store
    shutil.rmtree(directory)
    return {"write_us": 1e6 * spent / count, "stored_bytes": stored / count, "cells": cells}


def table(data: dict[str, Any]) -> str:
    lines = [f"rows of {data['row_bytes']} bytes on disk; lookups of {data['asked']}, median ms"]
    names = list(data["cells"][0]["ms"])
    heads = "".join(f"{name:>16}" for name in names)
    for store, measured in {"jaxkv": data, **data["peers"]}.items():
        lines.append(f"{store:<10}{'rows':>10}{'open s':>10}{'index MB':>10}{heads}")
        for cell in measured["cells"]:
            index = f"{cell['index_bytes'] / 1e6:10.1f}" if cell["index_bytes"] is not None else f"{'-':>10}"
            shown = "".join(f"{cell['ms'][name]['median']:16.3f}" for name in names)
            lines.append(f"{'':<10}{cell['rows']:10,}{cell['open_seconds']:10.3f}{index}{shown}")
        first, last = (measured["cells"][at]["ms"] for at in (0, -1))
        ratios = "".join(f"{last[name]['median'] / first[name]['median']:15.2f}x" for name in names)
        lines.append(f"{'most rows over fewest':<40}{ratios}")
        lines.append(f"written in {measured['write_us']:.1f} us a row; {measured['stored_bytes']:,.0f} bytes each")
    return "\n".join(lines)
