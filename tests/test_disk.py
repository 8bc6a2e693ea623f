"""The memo's disk tier where nothing goes wrong: what is kept, for whom, how long, and at what cost."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxkv.errors import NotSupportedError
from jaxkv.memo import catalog, disk, layout, record
from jaxkv.memo.disk import POLICIES, Disk

SIZE = 96
RECORD = record.HEADER_BYTES + SIZE


def key(number: int, namespace: int = 0) -> bytes:
    return namespace.to_bytes(16, "big") + number.to_bytes(16, "big")


def value(of: bytes, size: int = SIZE) -> bytes:
    """What lies under a key in these tests: a payload under a wrong key is seen."""
    return (of * (size // len(of) + 1))[:size]


def fill(store: Disk, numbers, size: int = SIZE, namespace: int = 0) -> int:
    keys = [key(number, namespace) for number in numbers]
    return store.write(keys, [value(k, size) for k in keys])


def found(store: Disk, numbers, size: int = SIZE, namespace: int = 0) -> list[int]:
    """Which numbers are there; whatever comes back must be right."""
    keys = [key(number, namespace) for number in numbers]
    values = store.read(keys, size)
    assert all(v is None or bytes(v) == value(k, size) for k, v in zip(keys, values, strict=True))
    return [number for number, v in zip(numbers, values, strict=True) if v is not None]


def files(directory, ending: str = ".seg"):
    return sorted(path for path in directory.iterdir() if path.name.endswith(ending))


# --- reading and writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, SIZE, 5000, 3_000_000])
def test_what_was_written_is_read_again_now_and_after_a_restart(tmp_path, size):
    store = Disk(tmp_path)
    assert fill(store, range(5), size) == 5
    assert found(store, [3, 0, 4, 3], size) == [3, 0, 4, 3]
    store.close()
    assert found(store, range(6), size) == [0, 1, 2, 3, 4]
    again = Disk(tmp_path)
    assert found(again, range(6), size) == [0, 1, 2, 3, 4]
    assert (again.stats().hits, again.stats().misses, again.stats().items) == (5, 1, 5)


def test_a_batch_of_more_pieces_than_one_call_takes_is_written_whole(tmp_path):
    assert fill(Disk(tmp_path), range(3000), 10) == 3000
    assert found(Disk(tmp_path), range(3000), 10) == list(range(3000))


def test_another_size_than_was_written_is_a_miss(tmp_path):
    store = Disk(tmp_path)
    fill(store, [1])
    assert store.read([key(1)], SIZE + 1) == [None] and found(store, [1]) == [1]
    assert store.stats().corrupt == 0


def test_a_key_is_written_once(tmp_path):
    store, other = Disk(tmp_path), Disk(tmp_path)
    assert fill(store, [1, 1, 2]) == 3
    before = store.stats()
    assert before.written == 2 and fill(store, [2, 1]) == 2 and store.stats() == before
    assert found(other, [1, 2]) == [1, 2]
    assert fill(other, [1]) == 1 and other.stats().nbytes == before.nbytes


def test_payloads_are_anything_with_bytes_and_may_change_afterwards(tmp_path):
    store = Disk(tmp_path)
    array = np.arange(24, dtype=np.float32).reshape(2, 12)
    expected = array.tobytes()
    store.write([key(1), key(2), key(3)], [array, bytearray(expected), memoryview(expected)])
    array[:] = 0
    assert [bytes(v) for v in store.read([key(1), key(2), key(3)], 96)] == [expected] * 3


def test_compression_saves_room_and_what_it_would_make_larger_stays_as_it_is(tmp_path):
    store = Disk(tmp_path, compress="zstd")
    noise = np.random.default_rng(0).bytes(5000)
    store.write([key(1), key(2)], [bytes(5000), noise])
    assert [bytes(v) for v in store.read([key(1), key(2)], 5000)] == [bytes(5000), noise]
    fixed = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix not in (".seg", ".idx"))
    assert store.stats().nbytes < fixed + 2 * catalog.record_bytes(0) + 5000 + 100
    assert [bytes(v) for v in Disk(tmp_path).read([key(1), key(2)], 5000)] == [bytes(5000), noise]
    assert Disk(tmp_path).read([key(1)], 4999) == [None]
    store.clear()
    store.write([key(2)], [noise])
    assert sum(path.stat().st_size for path in files(tmp_path)) == record.HEADER_BYTES + 5000


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="policy is 'best', must be one of keep, lru, mru, fifo"):
        Disk(tmp_path, policy="best")
    with pytest.raises(ValueError, match="compress is 'gzip'"):
        Disk(tmp_path, compress="gzip")
    with pytest.raises(ValueError, match="disk is an empty path; give a directory"):
        Disk("")
    with pytest.raises(ValueError, match="budget is 0"):
        Disk(tmp_path, budget=0)
    with pytest.raises(ValueError, match="32 bytes"):
        Disk(tmp_path).write([b"short"], [b""])
    with pytest.raises(ValueError, match="one payload for each key"):
        Disk(tmp_path).write([key(1)], [])


def test_where_files_cannot_be_locked_the_tier_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxkv.memo.segment.fcntl", None)
    with pytest.raises(NotSupportedError, match="use the memory tier alone"):
        Disk(tmp_path)


def test_a_missing_library_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"zstandard is not installed.*pip install zstandard$"):
        Disk(tmp_path, compress="zstd")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match=r"xxhash is not installed.*pip install xxhash$"):
        Disk(tmp_path)


def test_a_directory_that_holds_something_else_is_refused_and_not_filled(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        ValueError, match=r"holds other files than a store's \('thesis.tex' among them\); give an empty"
    ):
        Disk(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"thesis\.tex is not a directory"):
        Disk(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="is not a directory"):
        Disk(tmp_path / "thesis.tex" / "features")


def test_a_store_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_VERSION", 2)
    Disk(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is a store of version 2, this jaxkv reads version 1"):
        Disk(tmp_path)


def test_files_that_others_put_there_later_are_left_alone(tmp_path):
    fill(Disk(tmp_path), range(3))
    (tmp_path / "README").write_text("what is this?")
    assert found(Disk(tmp_path, policy="lru", budget=500), range(3)) == [0, 1, 2]
    fill(Disk(tmp_path, policy="lru", budget=500), range(3, 9))
    assert (tmp_path / "README").exists()


def test_a_namespace_is_described_once(tmp_path):
    store = Disk(tmp_path)
    store.describe(key(0)[:16], lambda: {"function": "f", "version": "1"})
    store.describe(key(0)[:16], lambda: {"function": "g"})
    Disk(tmp_path).describe(key(0)[:16], lambda: {"function": "h"})
    (path,) = files(tmp_path, ".json")
    assert json.loads(path.read_text()) == {"function": "f", "version": "1"} and path.stem == "0" * 32


def test_only_flush_waits_for_the_disk(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store = Disk(tmp_path, segment_bytes=RECORD)
    store.flush()
    fill(store, [1, 2, 3])
    assert not synced
    store.flush()
    assert {str(tmp_path), *map(str, files(tmp_path)), *map(str, files(tmp_path, ".idx"))} == set(synced)
    assert len(synced) == 7
    store.flush()
    assert len(synced) == 7, "once is enough"


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_neighbors_are_one_read_and_a_batch_is_one_write(tmp_path, monkeypatch):
    calls = {"pread": 0, "writev": 0}

    def count(name):
        real = getattr(os, name)

        def counted(*args):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(os, name, counted)

    store = Disk(tmp_path)
    fill(store, [0])
    count("pread"), count("writev")
    fill(store, range(1, 65))
    assert calls == {"pread": 0, "writev": 2}  # records and their index
    numbers = list(range(1, 65))
    random.Random(0).shuffle(numbers)
    assert found(store, numbers) == numbers and calls["pread"] == 1


def test_opening_reads_no_segment_and_misses_list_nothing_while_nothing_happens(tmp_path, monkeypatch):
    count = 1_000_000 if os.environ.get("JAXKV_FULL") else 30_000
    store = Disk(tmp_path, segment_bytes=1 << 22)
    keys = [key(number) for number in range(count)]
    store.write(keys, [b"12345678"] * count)
    store.close()
    monkeypatch.setattr(record, "scan", None)
    monkeypatch.setattr(os, "pread", None)
    again = Disk(tmp_path)
    monkeypatch.undo()
    assert again.stats().items == count
    assert again.read(keys[:: count // 100], 8) == [b"12345678"] * 100
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    for number in range(128):
        again.read([key(count + number)], 8)
    assert len(listed) == 2  # two changes of a directory may carry the same time: so now and then it is listed anyway


# --- budgets and policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_never_exceeded(tmp_path, policy):
    budget, chance = 60_000, random.Random(0)
    store = Disk(tmp_path, budget=budget, policy=policy, segment_bytes=5_000)
    store.describe(key(0)[:16], lambda: {"function": "f"})
    for turn in range(150):
        size = chance.choice([10, 100, 1000, 4000, 70_000])
        before = store.stats().written
        fill(store, range(100 * turn, 100 * turn + chance.randint(1, 20)), size)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget
        assert store.stats().nbytes <= budget
        if policy != "keep" and size < 1000:
            assert store.stats().written > before, "there is always room for what is new"
    assert store.stats().nbytes > budget // 2 and store.stats().errors == 0
    assert (store.stats().evicted == 0) == (policy == "keep")
    assert store.stats().items == store.stats().written - store.stats().evicted
    store.close()
    assert Disk(tmp_path, budget=budget, policy=policy).stats().items == store.stats().items


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_too_small_for_one_record_is_said_once(tmp_path, policy, caplog):
    store = Disk(tmp_path, budget=2048, policy=policy)
    for number in range(3):
        assert fill(store, [number], 3000) == 0
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: a record of 3.1 KiB is larger than the budget of 2.0 KiB allows")
    need = int(re.search("give a disk_budget of ([0-9,]+) bytes or more", message)[1].replace(",", ""))
    store.close()
    assert fill(Disk(tmp_path, budget=need - 1, policy=policy), [0], 3000) == 0
    assert fill(Disk(tmp_path, budget=need, policy=policy), [0], 3000) == 1, "what it says suffices"


def test_a_full_budget_is_said_once_where_what_is_there_is_kept(tmp_path, caplog):
    store = Disk(tmp_path, budget=2048)
    for number in range(20):
        fill(store, [number], 200)
    (message,) = caplog.messages
    assert f"{tmp_path}: the budget of 2.0 KiB is full, and a record of {catalog.record_bytes(200)} B" in message
    assert 'give a larger disk_budget or disk_policy="lru", or make room by jaxkv memo prune' in message
    caplog.clear()
    fill(Disk(tmp_path, budget=2048, policy="lru"), range(20, 30), 200)
    assert not caplog.messages, "room was made"


def test_labels_of_what_was_evicted_go_when_they_take_a_good_part_of_the_budget(tmp_path):
    store = Disk(tmp_path, budget=100_000, policy="lru", segment_bytes=10_000)
    for namespace in range(1, 200):
        store.describe(key(0, namespace)[:16], lambda: {"function": "f", "about": "x" * 300})
        fill(store, [0], namespace=namespace)
    fill(store, range(500))
    labels = files(tmp_path, ".json")
    kept = {n for n in range(1, 200) if found(store, [0], namespace=n)}
    assert len(found(store, range(500))) >= 300
    assert len(labels) < 100 and len(kept) < 100
    assert store.stats().nbytes <= 100_000


def rows(store: Disk, policy_use=()) -> list[int]:
    """Ten segments of two records each, some used again, then one more; what is left."""
    for first in range(0, 20, 2):
        fill(store, [first, first + 1])
    for number in policy_use:
        found(store, [number])
    fill(store, [20, 21])
    return found(store, range(22))


PAIR = 2 * catalog.record_bytes(SIZE)


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("keep", list(range(20))),
        ("fifo", list(range(2, 22))),
        ("lru", [0, 1, *range(4, 22)]),  # 0 was used again, 2 is the oldest that wasn't
        ("mru", [*range(10), *range(12, 22)]),  # 10 was the last that was used
    ],
)
def test_policies_remove_the_segments_that_they_should(tmp_path, policy, left):
    store = Disk(tmp_path, budget=10 * PAIR + 100, policy=policy, segment_bytes=PAIR // 2)
    assert rows(store, [0, 10]) == left
    assert store.stats().evicted == (0 if policy == "keep" else 2) and store.stats().lost == 0


def test_least_recent_use_is_known_after_a_restart(tmp_path):
    settings = dict(budget=10 * PAIR + 100, policy="lru", segment_bytes=PAIR // 2)
    store = Disk(tmp_path, **settings)
    for first in range(0, 20, 2):
        fill(store, [first, first + 1])
    found(store, [0, 2])
    store.close()
    again = Disk(tmp_path, **settings)
    fill(again, [20, 21])
    assert found(again, range(22)) == [0, 1, 2, 3, *range(6, 22)]


def test_a_clock_that_is_set_back_changes_nothing_within_a_process(tmp_path, monkeypatch):
    clock = [time.time_ns()]

    def backwards() -> int:
        clock[0] -= 10**12
        return clock[0]

    monkeypatch.setattr(time, "time_ns", backwards)
    store = Disk(tmp_path, budget=10 * PAIR + 100, policy="lru", segment_bytes=PAIR // 2)
    assert rows(store, [0, 10]) == [0, 1, *range(4, 22)]
    for path in tmp_path.iterdir():
        os.utime(path, ns=(0, 0))
    other = Disk(tmp_path)
    os.utime(tmp_path, ns=(0, 0))
    fill(store, [30])
    os.utime(tmp_path, ns=(0, 0))
    assert found(other, [4, 30]) == [4, 30] and other.stats().errors == 0


def test_what_another_process_writes_to_is_not_evicted_until_it_ends(tmp_path):
    settings = dict(budget=4 * PAIR + 100, policy="fifo", segment_bytes=PAIR // 2)
    first, second = Disk(tmp_path, **settings), Disk(tmp_path, **settings)
    fill(first, [0, 1])
    for number in range(2, 40, 2):
        fill(second, [number, number + 1])
        assert second.stats().nbytes <= 4 * PAIR + 100
    assert found(second, range(40)) == [0, 1, 34, 35, 36, 37, 38, 39]
    fill(first, [40, 41])  # its first segment is full, and sealed now
    assert found(second, [40, 41]) == [40, 41] and found(second, [0, 1]) == []
    for number in range(42, 60, 2):
        fill(second, [number, number + 1])
    assert found(second, [40, 41]) == [40, 41]
    first.close()
    for number in range(60, 80, 2):
        fill(second, [number, number + 1])
    assert found(second, range(80)) == list(range(72, 80))


def test_clear_removes_everything_or_one_namespace(tmp_path):
    store, other = Disk(tmp_path, segment_bytes=PAIR), Disk(tmp_path)
    for number in range(10):
        fill(store, [number], namespace=number % 2)
    store.describe(key(0, 0)[:16], lambda: {"function": "f"})
    store.describe(key(0, 1)[:16], lambda: {"function": "g"})
    fill(other, [100], namespace=1)
    store.clear([key(0, 1)[:16]])
    assert found(store, range(10), namespace=0) == [0, 2, 4, 6, 8]
    assert found(store, range(10), namespace=1) == [] and found(store, [100], namespace=1) == [100]
    assert found(other, range(10), namespace=0) == [0, 2, 4, 6, 8]
    other.close()
    store.clear()
    assert store.stats().items == 0 and not files(tmp_path) and not files(tmp_path, ".json")
    assert fill(store, range(4)) == 4 and found(Disk(tmp_path), range(4)) == [0, 1, 2, 3]
    assert store.stats().lost == 0


# --- threads and processes -------------------------------------------------------------------------------------------


def test_what_another_process_writes_is_found_at_the_next_miss(tmp_path):
    reader, writer = Disk(tmp_path), Disk(tmp_path)
    for number in range(0, 30, 3):
        fill(writer, [number, number + 1])
        assert found(reader, [number, number + 1, number + 2]) == [number, number + 1]
    writer.close()
    fill(writer, [50])
    assert found(reader, [50]) == [50] and found(Disk(tmp_path), [0, 50]) == [0, 50]


def test_a_store_travels_without_its_open_files(tmp_path):
    store = Disk(tmp_path, budget=10**6, policy="lru", compress="zstd", segment_bytes=1234)
    fill(store, [1])
    again = pickle.loads(pickle.dumps(store))
    assert found(again, [1]) == [1] and fill(again, [2]) == 1 and found(store, [2]) == [2]
    for name in ("directory", "budget", "policy", "compress", "segment_bytes"):
        assert getattr(again, name) == getattr(store, name)


def _write_in_child(store: Disk, numbers: list[int]) -> None:
    assert found(store, [1]) == [1]
    fill(store, numbers)


@pytest.mark.slow
def test_a_spawned_process_gets_its_own(tmp_path):
    store = Disk(tmp_path)
    fill(store, [1])
    child = multiprocessing.get_context("spawn").Process(target=_write_in_child, args=(store, [2, 3]))
    child.start()
    child.join()
    assert child.exitcode == 0 and found(store, [1, 2, 3]) == [1, 2, 3]


SHARED = """
import os, sys, threading
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_disk import Disk, fill, found, files
import pathlib
from jaxkv.memo.segment import is_live
store = Disk(sys.argv[1], segment_bytes=20_000)
fill(store, range(10))

def work(who):
    for turn in range(40):
        first = 1000 * who + 10 * turn
        assert fill(store, range(first, first + 10)) == 10
        assert found(store, range(10)) == list(range(10))
        assert len(found(store, range(first, first + 10))) == 10
        found(store, range(1000 * (1 + who % 16), 1000 * (1 + who % 16) + 50))

def eight(first):
    failed = []
    def guarded(who):
        try:
            work(who)
        except BaseException as error:
            failed.append(error)
            raise
    threads = [threading.Thread(target=guarded, args=(first + n,)) for n in range(8)]
    for thread in threads: thread.start()
    return threads, failed

go, said = os.pipe()
child = os.fork()  # it goes on following the segment that its parent writes to
if child == 0:
    os.read(go, 1)
    live = [path for path in files(pathlib.Path(sys.argv[1])) if is_live(str(path))]
    os._exit(bool(live) or found(store, [55_000]) != [55_000] or fill(store, [55_001]) != 1)
fill(store, [55_000])
store.close()  # the child, which was there before, holds no lock on what its parent wrote
os.write(said, b".")
assert os.waitpid(child, 0)[1] == 0
assert found(store, [55_000, 55_001]) == [55_000, 55_001]

children = []
child = os.fork()  # the child shares the store, not the segment
if child == 0:
    threads, failed = eight(9)
    for thread in threads: thread.join()
    os._exit(bool(failed))
threads, failed = eight(1)
import warnings
warnings.simplefilter("ignore")  # forking beside threads is what is tested
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        ok = fill(store, [77_000]) == 1 and found(store, range(10)) == list(range(10))
        os._exit(not ok)
    children.append(pid)
for thread in threads: thread.join()
status = [os.waitpid(pid, 0)[1] for pid in [child, *children]]
everything = [1000 * who + n for who in range(1, 17) for n in range(400)]
assert not failed and not any(status), (failed, status)
assert found(store, everything) == everything
stats = store.stats()
assert (stats.corrupt, stats.lost, stats.errors) == (0, 0, 0), stats
"""


@pytest.mark.slow
def test_eight_threads_and_two_processes_share_one_store_and_may_fork(tmp_path):
    here = os.path.dirname(__file__)
    words = [sys.executable, "-c", SHARED, str(tmp_path / "store"), here, os.path.dirname(here)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    again = Disk(tmp_path / "store")
    everything = [1000 * who + n for who in range(1, 17) for n in range(400)]
    assert found(again, everything) == everything and again.stats().corrupt == again.stats().lost == 0


def test_threads_write_and_read_what_others_evict(tmp_path):
    store = Disk(tmp_path, budget=30_000, policy="lru", segment_bytes=2_000)
    failed = []

    def work(who: int) -> None:
        try:
            for turn in range(50):
                fill(store, range(100 * who + turn, 100 * who + turn + 5))
                found(store, range(0, 800, 7))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    assert not failed and stats.evicted > 0 and stats.nbytes <= 30_000
    assert (stats.corrupt, stats.errors) == (0, 0)


def test_records_put_elsewhere_by_another_process_are_found_there(tmp_path):
    from jaxkv.memo.prune import prune

    store = Disk(tmp_path)
    fill(store, range(10))
    fill(store, range(10), namespace=1)
    store.close()
    reader = Disk(tmp_path)
    prune(str(tmp_path), namespaces=[key(0, 1)[:16]])
    assert found(reader, range(10)) == list(range(10)) and found(reader, range(10), namespace=1) == []
    assert disk.DiskStats(10, reader.stats().nbytes, 10, 10, 0, 0, 0, 10, 0) == reader.stats()
