"""A store on disk with many rows: time to open it, to look rows up, and memory it takes. Run by memo.py --rows."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from common import say

from jaxkv.memo.disk import Disk

ROW = 4096  # bytes
BATCH = 4096  # rows written at once
ASKED = 64  # rows looked up at once
NAMESPACE = bytes(16)


def keys_of(numbers: Any) -> list[bytes]:
    return [NAMESPACE + hashlib.blake2b(int(n).to_bytes(8, "little"), digest_size=16).digest() for n in numbers]


def payloads_of(numbers: np.ndarray) -> np.ndarray:
    """Row n is the number n, over and over."""
    return np.repeat(numbers.astype(np.uint64)[:, None], ROW // 8, axis=1)


def milliseconds(disk: Disk, numbers: np.ndarray, there: bool) -> float:
    """The time of one lookup; what it finds is checked."""
    keys = keys_of(numbers)
    begin = time.perf_counter()
    found = disk.read(keys, ROW)
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


def opened(directory: str, count: int, pipe: Any) -> None:
    """A new process opens the store and looks up rows."""
    before = private_bytes() if pathlib.Path("/proc/self/statm").exists() else 0
    begin = time.perf_counter()
    disk = Disk(directory)
    rng = np.random.default_rng(count)
    first = milliseconds(disk, rng.integers(count, size=ASKED), True)
    seconds = time.perf_counter() - begin
    held = private_bytes() - before if before else None
    some = rng.permutation(count)[: min(200, count // ASKED) * ASKED].reshape(-1, ASKED)
    hit = [milliseconds(disk, numbers, True) for numbers in some]
    miss = [milliseconds(disk, count + numbers, False) for numbers in some]
    near = np.arange(ASKED)
    together = [milliseconds(disk, near + ASKED * i, True) for i in range(min(200, count // ASKED))]
    files = [path.open("rb") for path in pathlib.Path(directory).glob("*.db")]
    plain = [plain_milliseconds(files, rng) for _ in range(200)]
    ms = {"hit": hit, "hit, in order": together, "miss": miss, "plain reads": plain}
    ms = {name: {"median": float(np.median(t)), "p95": float(np.quantile(t, 0.95))} for name, t in ms.items()}
    pipe.send({"open_seconds": seconds, "first_ms": first, "index_bytes": held, "ms": ms})


def measure(count: int, folder: str) -> dict[str, Any]:
    """Returns what opening and looking up costs at 1,000 rows, 10,000, ... and `count`."""
    directory = os.path.join(folder, "rows")
    need = count * ROW * 1.1
    if shutil.disk_usage(folder).free < need:
        raise OSError(f"{folder} has no room for {need / 1e9:.1f} GB; name another place with TMPDIR")
    context = multiprocessing.get_context("spawn")
    sizes = [10**power for power in range(3, 12) if 10**power < count] + [count]
    disk, cells, written, spent = Disk(directory), [], 0, 0.0
    for size in sizes:
        while written < size:
            if written % (64 * BATCH) < BATCH:
                say(f"rows: {written:,} of {count:,}")
            numbers = np.arange(written, min(written + BATCH, size))
            keys, payloads = keys_of(numbers), payloads_of(numbers)
            begin = time.perf_counter()
            disk.write(keys, list(payloads))
            spent += time.perf_counter() - begin
            written += len(numbers)
        ours, theirs = context.Pipe()
        process = context.Process(target=opened, args=(directory, size, theirs))
        process.start()
        theirs.close()  # or a process that fails would be waited for
        cells.append({"rows": size, **ours.recv()})
        process.join()
    stats = disk.stats()
    disk.close()
    shutil.rmtree(directory)
    each = {"write_us": 1e6 * spent / count, "stored_bytes": stats.nbytes / count}
    return {"row_bytes": ROW, "asked": ASKED, **each, "cells": cells}


def table(data: dict[str, Any]) -> str:
    lines = [f"rows of {data['row_bytes']} bytes on disk; lookups of {data['asked']}, median ms"]
    names = list(data["cells"][0]["ms"])
    lines.append(f"{'rows':>10}{'open s':>10}{'index MB':>10}" + "".join(f"{name:>16}" for name in names))
    for cell in data["cells"]:
        index = f"{cell['index_bytes'] / 1e6:10.1f}" if cell["index_bytes"] is not None else f"{'-':>10}"
        shown = "".join(f"{cell['ms'][name]['median']:16.3f}" for name in names)
        lines.append(f"{cell['rows']:10,}{cell['open_seconds']:10.3f}{index}{shown}")
    lines.append(f"written in {data['write_us']:.1f} us a row; {data['stored_bytes']:,.0f} bytes each")
    return "\n".join(lines)
