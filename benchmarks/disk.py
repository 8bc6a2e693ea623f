"""Where a memo's outputs should lie: times per item, and what each way does when files or processes are harmed.

Contestants keep payloads under 32-byte keys: `jaxkv.memo.disk`, lmdb, sqlite3, diskcache,
joblib.Memory, and a file per item. None waits for the disk after each batch. "lmdb checked" is lmdb with what a careful
user would add: a checksum before each payload, and every error of the library taken for a miss.

    python benchmarks/disk.py                              # tables: times, then faults
    python benchmarks/disk.py --out docs/data/disk.json    # the same, kept
    python benchmarks/disk.py --only faults
    python benchmarks/disk.py --earlier DIR                # beside another jaxkv, whose package is in DIR
    python benchmarks/disk.py --only times --earlier DIR --cpu    # where others use the machine

Times are of one process that writes and reads, and of two that write into one store at once. They are read from the
clock; with --cpu they are the time that processors spent on it, in the process and in the system, on all its threads.

The faults, each in a process of its own, on 64 items of 4 KB:

- cut: a file is cut off at some byte; the store is opened and all items are read.
- cut while open: the same after the reader has opened the store and read one item.
- flipped: one bit, drawn over all files by size; opened and read.
- killed: two writers, killed at a random moment; then all they had said to be written is read.
- power: a writer is stopped at two moments, and of the pages of 4 KB that it changed in between some are as before,
  others as after, as a loss of power may leave them where nobody waits for the disk. What was said to be written before
  the first moment is read.
- full: writing into a file system of 1 MB (where this may be mounted, else under a limit on the size of files), then
  reading all that was said to be written.

An item is wrong if another payload came back than was written, and lost if none did. What is cut off is lost to
anybody, and a flipped bit may cost one item.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common import about, earlier, in_turn, say, warn_if_busy

from jaxkv.memo.disk import Disk

ITEMS, SIZE = 64, 4096
BATCHES_AT_ONCE = 20  # that each of two processes writes
BATCHES = ((1 << 20, 8), (65536, 64), (4096, 64))  # bytes of an item, items of a batch
FAULTS = ("cut", "cut while open", "flipped", "killed", "power", "full")
FULL_BYTES = 1 << 20


class Jaxkv:
    def __init__(self, directory: str, disk: Callable[[str], Any] = Disk) -> None:
        self.disk = disk(directory)

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        if self.disk.write(keys, payloads) < len(keys):
            raise OSError("not all were written")

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        return self.disk.read(keys, nbytes)


class Lmdb:
    def __init__(self, directory: str) -> None:
        import lmdb

        self.env = lmdb.open(directory, map_size=1 << 34, sync=False)

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        with self.env.begin(write=True) as transaction:
            for key, payload in zip(keys, payloads, strict=True):
                transaction.put(key, payload)

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        with self.env.begin() as transaction:
            return [transaction.get(key) for key in keys]


class LmdbChecked:
    def __init__(self, directory: str) -> None:
        import lmdb
        import xxhash

        self.error, self.hash, self.directory = lmdb.Error, xxhash.xxh3_64_digest, directory
        self.lmdb: Lmdb | None = None
        self.open()

    def open(self) -> bool:
        try:
            self.lmdb = self.lmdb or Lmdb(self.directory)
        except self.error:
            return False
        return True

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        if not self.open():
            raise OSError("not open")
        self.lmdb.write(keys, [self.hash(key + payload) + payload for key, payload in zip(keys, payloads, strict=True)])

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        values: list[Any] = [None] * len(keys)
        if self.open():
            for i, key in enumerate(keys):
                try:
                    with self.lmdb.env.begin() as transaction:
                        value = transaction.get(key)
                except self.error:
                    continue
                if value is not None and len(value) == nbytes + 8 and self.hash(key + value[8:]) == value[:8]:
                    values[i] = value[8:]
        return values


class Sqlite:
    def __init__(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        self.db = sqlite3.connect(os.path.join(directory, "items.db"), timeout=30)
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = off")
        self.db.execute("create table if not exists items (key blob primary key, value blob)")

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        with self.db:
            self.db.executemany("insert or ignore into items values (?, ?)", zip(keys, payloads, strict=True))

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        found = (self.db.execute("select value from items where key = ?", (key,)).fetchone() for key in keys)
        return [row and row[0] for row in found]


class Diskcache:
    def __init__(self, directory: str) -> None:
        import diskcache

        self.cache = diskcache.Cache(directory, eviction_policy="none", size_limit=1 << 40)

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        with self.cache.transact():
            for key, payload in zip(keys, payloads, strict=True):
                self.cache.set(key, payload)

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        return [self.cache.get(key) for key in keys]


def given(key: bytes, payload: bytes | None) -> bytes | None:
    """What joblib caches by the key; without a payload it says that nothing was there."""
    return payload


class Joblib:
    def __init__(self, directory: str) -> None:
        import joblib

        warnings.simplefilter("ignore")
        self.given = joblib.Memory(directory, verbose=0).cache(given, ignore=["payload"])

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        for key, payload in zip(keys, payloads, strict=True):
            self.given(key, payload)

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        return [self.given(key, None) if self.given.check_call_in_cache(key, None) else None for key in keys]


class Files:
    def __init__(self, directory: str) -> None:
        self.directory = pathlib.Path(directory)

    def path(self, key: bytes) -> pathlib.Path:
        return self.directory / key.hex()[-2:] / key.hex()

    def write(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> None:
        for key, payload in zip(keys, payloads, strict=True):
            path = self.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(payload)
            temporary.rename(path)

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        values: list[Any] = []
        for key in keys:
            try:
                values.append(self.path(key).read_bytes())
            except FileNotFoundError:
                values.append(None)
        return values


STORES: dict[str, Callable[[str], Any]] = {
    "jaxkv": Jaxkv,
    "lmdb": Lmdb,
    "lmdb checked": LmdbChecked,
    "sqlite3": Sqlite,
    "diskcache": Diskcache,
    "joblib": Joblib,
    "files": Files,
}


def items(numbers: Sequence[int], size: int) -> tuple[list[bytes], list[bytes]]:
    keys = [number.to_bytes(32, "little") for number in numbers]
    return keys, [random.Random(number).randbytes(size) for number in numbers]


# --- times -----------------------------------------------------------------------------------------------------------


def times(
    names: Sequence[str], size: int, count: int, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Microseconds per item of each round: a batch of new items is written, then read in another order."""
    measured: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: STORES[name](os.path.join(folder, name)) for name in names}
        for turn in range(-1, rounds):
            keys, payloads = items(range((turn + 1) * count, (turn + 2) * count), size)
            order = random.Random(turn).sample(keys, count)
            for name in in_turn(list(names), max(turn, 0)):
                start = clock()
                stores[name].write(keys, payloads)
                middle = clock()
                values = stores[name].read(order, size)
                end = clock()
                if [bytes(value) for value in values] != [payloads[keys.index(key)] for key in order]:
                    raise RuntimeError(f"{name} returned something else than was written")
                if turn >= 0:
                    measured[name]["write"].append(1e6 * (middle - start) / count)
                    measured[name]["read"].append(1e6 * (end - middle) / count)
    return measured


def write_some(work: tuple[str, str, int, int, int, Callable[[], float]]) -> float:
    """Writes batches into a store in a process of its own, again if need be; returns microseconds per item."""
    name, folder, first, size, count, clock = work
    store, tries = STORES[name](folder), 0
    batches = [items(range(first + i * count, first + (i + 1) * count), size) for i in range(BATCHES_AT_ONCE)]
    begin = clock()
    while batches:
        try:
            store.write(*batches[-1])
            batches.pop()
        except Exception:  # the other one had locked it
            if (tries := tries + 1) > 100:
                raise
    return 1e6 * (clock() - begin) / (BATCHES_AT_ONCE * count)


def times_of_two(
    names: Sequence[str], size: int, count: int, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Microseconds per item of each round in which two processes write new items into one store."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(-1, rounds):
            for name in in_turn(list(names), max(turn, 0)):
                place, first = os.path.join(folder, name), 10_000_000 * (turn + 1)
                trial(lambda name=name, place=place: STORES[name](place) and {})  # both find it made
                works = [(name, place, first + 1_000_000 * who, size, count, clock) for who in range(2)]
                with multiprocessing.get_context("fork").Pool(2) as pool:
                    each = pool.map(write_some, works, chunksize=1)
                if turn >= 0:
                    measured[name].append(statistics.mean(each))
    return measured


# --- faults ----------------------------------------------------------------------------------------------------------


def trial(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Runs in a forked process, and returns its counts, with how it ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(20)
        result: dict[str, int] = {"exceptions": 1, "lost": -1}
        try:
            result = work()
        finally:
            os.write(theirs, json.dumps(result).encode())
            os._exit(0)
    os.close(theirs)
    said = b""
    while part := os.read(ours, 65536):
        said += part
    os.close(ours)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return {"hangs" if os.WTERMSIG(status) == signal.SIGALRM else "crashes": 1, "lost": -1}
    return json.loads(said)


def check(store: Any, numbers: Sequence[int]) -> dict[str, int]:
    """Reads items one by one: how many are wrong, lost, or raise."""
    counts = {"wrong": 0, "lost": 0, "exceptions": 0}
    for number in numbers:
        (key,), (payload,) = items([number], SIZE)
        try:
            (value,) = store.read([key], SIZE)
        except Exception:  # noqa: BLE001 (whatever it raises is what is counted)
            counts["exceptions"] = 1
            value = None
        if value is None:
            counts["lost"] += 1
        elif bytes(value) != payload:
            counts["wrong"] += 1
    return counts


def data_files(folder: str) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.stat().st_size)


def cut(folder: str, chance: random.Random) -> None:
    """Cuts a file off, drawn by size, at any byte."""
    paths = data_files(folder)
    path = chance.choices(paths, [path.stat().st_size for path in paths])[0]
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(folder: str, chance: random.Random) -> None:
    paths = data_files(folder)
    path = chance.choices(paths, [path.stat().st_size for path in paths])[0]
    with open(path, "r+b") as file:
        file.seek(at := chance.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def harmed(name: str, folder: str, kept: str, fault: str, chance: random.Random) -> dict[str, int]:
    shutil.copytree(kept, folder)

    def work() -> dict[str, int]:
        if fault != "cut while open":
            {"cut": cut, "flipped": flip}[fault](folder, chance)
            return check(STORES[name](folder), range(ITEMS))
        store = STORES[name](folder)
        check(store, [0])
        cut(folder, chance)
        return check(store, range(ITEMS))

    counts = trial(work)
    shutil.rmtree(folder)
    return counts


def killed(name: str, folder: str, chance: random.Random) -> dict[str, int]:
    """Two writers on one store, killed at a random moment."""
    trial(lambda: STORES[name](folder) and {})  # both find it made
    pids, pipes = [], []
    for who in range(2):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            store, first = STORES[name](folder), who * 1_000_000
            while True:
                keys, payloads = items(range(first, first + 8), SIZE)
                store.write(keys, payloads)
                os.write(theirs, first.to_bytes(8, "little"))
                first += 8
        os.close(theirs)
        pids.append(pid)
        pipes.append(ours)
    time.sleep(0.02 + 0.05 * chance.random())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    numbers = []
    for pid, pipe in zip(pids, pipes, strict=True):
        os.waitpid(pid, 0)
        while said := os.read(pipe, 8):
            numbers += range(first := int.from_bytes(said, "little"), first + 8)
        os.close(pipe)
    counts = trial(lambda: check(STORES[name](folder), numbers))
    shutil.rmtree(folder, ignore_errors=True)  # not there if both were killed before their first item
    return counts | {"items": len(numbers)}


def mixed(before: str, after: str, folder: str, chance: random.Random) -> None:
    """Makes a directory of pages that are as before or as after; a new page that was not written yet is of zeros."""
    share = chance.random()
    for path in {path.relative_to(place) for place in (before, after) for path in data_files(place)}:
        old, new = (pathlib.Path(place, path) for place in (before, after))
        if not (old if chance.random() < share else new).exists():
            continue
        was, now = (place.read_bytes() if place.exists() else b"" for place in (old, new))
        size = len(was if chance.random() < share else now)
        parts = [
            (was if chance.random() < share else now)[at : at + 4096].ljust(4096, b"\0") for at in range(0, size, 4096)
        ]
        place = pathlib.Path(folder, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"".join(parts)[:size])


def powerless(name: str, folder: str, chance: random.Random) -> dict[str, int]:
    os.makedirs(folder)
    trial(lambda: STORES[name](folder) and {})
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        store, first = STORES[name](folder), 0
        while True:
            store.write(*items(range(first, first + 8), SIZE))
            os.write(theirs, first.to_bytes(8, "little"))
            first += 8
    os.close(theirs)

    def stop(place: str) -> None:
        time.sleep(0.005 + 0.05 * chance.random())
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        shutil.copytree(folder, place)

    try:
        stop(f"{folder}-before")
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(ours, 65536)
        os.kill(pid, signal.SIGCONT)
        stop(f"{folder}-after")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)
    shutil.rmtree(folder)
    os.mkdir(folder)
    mixed(f"{folder}-before", f"{folder}-after", folder, chance)
    firsts = [int.from_bytes(said[at : at + 8], "little") for at in range(0, len(said), 8)]
    numbers = [first + i for first in firsts for i in range(8)]
    counts = trial(lambda: check(STORES[name](folder), numbers))
    for place in (folder, f"{folder}-before", f"{folder}-after"):
        shutil.rmtree(place)
    return counts | {"items": len(numbers)}


def full(name: str, folder: str) -> dict[str, int]:
    """Writes 2 MB into 1, going on after errors; then a new process reads what was said to be written."""
    os.makedirs(folder)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "none", folder], capture_output=True)

    def write() -> dict[str, Any]:
        import resource

        if mounted.returncode:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES // 2, FULL_BYTES // 2))
        store, said, raised = STORES[name](os.path.join(folder, "store")), [], 0
        for first in range(0, 512, 8):
            keys, payloads = items(range(first, first + 8), SIZE)
            try:
                store.write(keys, payloads)
                said += range(first, first + 8)
            except Exception:  # noqa: BLE001
                raised += 1
        return {"said": said, "raised": raised, **check(store, said)}

    try:
        result: dict[str, Any] = trial(write)
        numbers = result.pop("said", [])
        again = trial(lambda: check(STORES[name](os.path.join(folder, "store")), numbers))
        keys = ("wrong", "exceptions", "crashes", "hangs")
        worst = {key: max(result.get(key, 0), again.get(key, 0)) for key in keys}
        lost = -1 if -1 in (result.get("lost"), again.get("lost")) else max(result["lost"], again["lost"])
        return {**worst, "lost": lost, "items": len(numbers)}
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def faults(name: str, trials: dict[str, int]) -> dict[str, dict[str, int]]:
    """What becomes of one store: counts over all trials of each fault."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = os.path.join(folder, "kept")

        def fill() -> dict[str, int]:
            store = STORES[name](kept)
            for first in range(0, ITEMS, 8):
                store.write(*items(range(first, first + 8), SIZE))
            return {}

        trial(fill)
        for fault in FAULTS:
            say(f"{name}: {fault}")
            chance, place = random.Random(fault), os.path.join(folder, "store")
            counts = {"trials": trials[fault], "items": 0, "wrong": 0, "lost": 0}
            counts |= {"exceptions": 0, "crashes": 0, "hangs": 0}
            for _ in range(trials[fault]):
                if fault == "killed":
                    result = killed(name, place, random.Random(chance.random()))
                elif fault == "power":
                    result = powerless(name, place, random.Random(chance.random()))
                elif fault == "full":
                    result = full(name, place)
                else:
                    result = harmed(name, place, kept, fault, random.Random(chance.random()))
                result.setdefault("items", ITEMS)
                if result.get("lost", 0) < 0:  # it ended before it could say what is there: nothing is
                    result["lost"] = result["items"]
                for key, count in result.items():
                    if key in counts:
                        counts[key] += count
            table[fault] = counts
    return table


def installed() -> Iterator[str]:
    modules = {"jaxkv": "xxhash", "lmdb checked": "lmdb", "files": "os", "earlier": "xxhash"}
    for name, module in ((name, modules.get(name, name)) for name in STORES):
        try:
            __import__(module)
        except ImportError:
            print(f"left out: {name}; pip install {module}")
        else:
            yield name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write results as JSON; what --only leaves out stays")
    parser.add_argument("--rounds", type=int, default=30, help="batches that are timed (default 30)")
    parser.add_argument("--earlier", type=pathlib.Path, help="a folder with another jaxkv, to compare with")
    parser.add_argument("--cpu", action="store_true", help="the time that processors spent, in place of the clock's")
    parser.add_argument("--only", choices=("times", "faults"), help="one of the two tables")
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that the script runs")
    arguments = parser.parse_args(argv)
    facts = about(("jaxkv", "numpy", "xxhash", "lmdb", "diskcache", "joblib"))
    facts["versions"]["sqlite3"] = sqlite3.sqlite_version
    if arguments.earlier:
        STORES["earlier"] = functools.partial(Jaxkv, disk=earlier(arguments.earlier).memo.disk.Disk)
    names = list(installed())
    results: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    if arguments.only != "times":
        trials = dict(zip(FAULTS, (2, 2, 4, 1, 1, 1) if arguments.quick else (120, 120, 500, 30, 60, 3), strict=True))
        table = {name: faults(name, trials) for name in names}
        results["faults"] = facts | {"items": ITEMS, "item_bytes": SIZE, "table": table}
        say("")
        for fault in FAULTS:
            print(f"\n{fault}: {trials[fault]} trials")
            print(f"  {'':<13} {'items':>8} {'wrong':>6} {'lost':>7} {'raised':>7} {'crashed':>8} {'hung':>5}")
            for name in names:
                row = table[name][fault]
                print(
                    f"  {name:<13} {row['items']:>8,} {row['wrong']:>6,} {row['lost']:>7,} {row['exceptions']:>7,} "
                    f"{row['crashes']:>8,} {row['hangs']:>5,}"
                )
    if arguments.only != "faults":
        cases, clock = [], time.process_time if arguments.cpu else time.perf_counter
        for size, count in BATCHES:
            say(f"times: {size} bytes")
            rounds = 2 if arguments.quick else arguments.rounds
            case = {"item_bytes": size, "batch": count, "microseconds": times(names, size, count, rounds, clock)}
            cases.append(case)
        for name, each in times_of_two(names, size, count, max(rounds // 6, 2), clock).items():  # of the smallest items
            case["microseconds"][name]["write, two at once"] = each
        results["times"] = facts | {"clock": "cpu" if arguments.cpu else "wall", "cases": cases}
        say("")
        for case in cases:
            print(f"\nmicroseconds per item of {case['item_bytes']:,} bytes, {case['batch']} at once")
            for name, measured in case["microseconds"].items():
                print(
                    f"  {name:<13} " + ", ".join(f"{what} {statistics.median(us):.1f}" for what, us in measured.items())
                )
        warn_if_busy(facts)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
