"""The memo's disk tier with two writers, a reader, a process that clears and one that prunes, all at once.

    python benchmarks/disk_together.py                # three rounds of a minute
    python benchmarks/disk_together.py --seconds 5

In the round "namespaces" each writer has a namespace of its own that nobody is asked to remove; what it was told to be
kept must be there in the end. Beside them lie two namespaces of which one is cleared and one pruned, again and again.
In the round "everything" all is cleared, and pruned to 1 MB: nothing need be there. In the round "without locks" the
processes take none, as on a network file system that has no locks between machines: values must be right, if there are
any; and it is counted how many are lost.

Items are of 3 KB and 64 KB. Counted are values that are wrong, exceptions, items lost in the end, and what the
processes counted themselves: records found damaged or without their file, databases replaced, errors; and calls that
gave up after 0.1 s because another process held the database (busy), whose items are not kept, or missed once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from common import say

from jaxkv.errors import CacheError
from jaxkv.memo import current, database
from jaxkv.memo.disk import Disk
from jaxkv.memo.record import LARGE
from jaxkv.memo.upkeep import prune, verify

KEPT, CLEARED, PRUNED = (1, 2), 3, 4
COUNTED = ("put", "wrong", "raised", "lost_in_the_end", "corrupt", "lost", "replaced", "errors", "busy")


def item(namespace: int, number: int) -> tuple[bytes, bytes]:
    key = namespace.to_bytes(16, "big") + number.to_bytes(16, "big")
    return key, key * ((LARGE if number % 5 == 0 else 3000) // len(key))


def namespace(number: int) -> bytes:
    return item(number, 0)[0][:16]


def wrong(store: Disk, space: int, numbers: list[int]) -> tuple[int, int]:
    """How many come back wrong, and how many not at all."""
    found = [(store.read([key], len(value))[0], value) for key, value in (item(space, n) for n in numbers)]
    return sum(got is not None and bytes(got) != value for got, value in found), sum(got is None for got, _ in found)


def writer(directory: str, until: float, own: int) -> dict[str, int]:
    store, put, bad = Disk(directory), list[int](), 0
    for first in range(0, 1 << 40, 8):
        if time.time() > until:
            break
        for space in (own, CLEARED, PRUNED):
            numbers = range(first, first + 8) if space == own else range(8 * own, 8 * own + 8)
            keys, values = zip(*(item(space, n) for n in numbers), strict=True)
            if store.write(keys, values) == 8 and space == own:
                put += numbers
        bad += wrong(store, own, random.sample(put, min(4, len(put))))[0]
    current._WAIT = 10.0  # in the end everything is to be found, however busy the others are
    lost = wrong(Disk(directory), own, put)[1]
    return counts(store) | {"put": len(put), "wrong": bad, "lost_in_the_end": lost}


def reader(directory: str, until: float) -> dict[str, int]:
    store, bad = Disk(directory), 0
    while time.time() < until:
        for space in (*KEPT, CLEARED, PRUNED):
            bad += wrong(store, space, random.sample(range(200), 8))[0]
    return counts(store) | {"wrong": bad}


def clearer(directory: str, until: float, everything: bool) -> dict[str, int]:
    store = Disk(directory)
    while time.time() < until:
        store.clear(None if everything else [namespace(CLEARED)])
        time.sleep(0.1 * random.random())
    return counts(store)


def pruner(directory: str, until: float, everything: bool, locks: bool) -> dict[str, int]:
    while time.time() < until:
        with contextlib.suppress(*() if locks else (CacheError,)):  # the command says that the database is damaged
            prune(directory, 1_000_000 if everything else None, [namespace(PRUNED)], True, lambda done, total: None)
        time.sleep(0.1 * random.random())
    return {}


def counts(store: Disk) -> dict[str, int]:
    stats = store.stats()
    return {name: getattr(stats, name) for name in COUNTED if hasattr(stats, name)}


def forked(work: Callable[[], dict[str, int]]) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = {"raised": 1}
        try:
            result = work()
        except BaseException:  # noqa: BLE001 (it is counted)
            traceback.print_exc()
        finally:
            os.write(theirs, json.dumps(result).encode())
            os._exit(0)
    os.close(theirs)
    return pid, ours


def together(seconds: float, everything: bool, locks: bool = True) -> dict[str, Any]:
    """Returns what all of them counted, and what is damaged afterwards."""
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        Disk(directory).close()
        until = time.time() + seconds
        works: list[Callable[[], dict[str, int]]] = [lambda own=own: writer(directory, until, own) for own in KEPT]  # type: ignore[misc]
        works += [lambda: reader(directory, until), lambda: clearer(directory, until, everything)]
        works += [lambda: pruner(directory, until, everything, locks)]
        for pid, pipe in [forked(work) for work in works]:
            with os.fdopen(pipe, "rb") as said:
                total.update(json.loads(said.read() or b'{"raised": 1}'))
            os.waitpid(pid, 0)
        if everything:
            total["lost_in_the_end"] = 0
        damages = verify(directory, lambda done, total: None)[1] if locks else []
    return {name: total[name] for name in COUNTED} | {"damaged": len(damages)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long each round lasts (default 60)")
    arguments = parser.parse_args(argv)
    usual = database.quote
    for name, everything, locks in (
        ("namespaces", False, True),
        ("everything", True, True),
        ("without locks", False, False),
    ):
        say(f"{name}: {arguments.seconds:g} s")
        database.quote = usual if locks else lambda path: f"{usual(path)}?nolock=1&instead="
        result = together(arguments.seconds, everything, locks)
        say("")
        print(f"{name:>12}  " + "  ".join(f"{what.replace('_', ' ')} {count:,}" for what, count in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
