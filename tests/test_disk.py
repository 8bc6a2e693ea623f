"""The memo's disk tier where nothing goes wrong: what is kept, for whom, how long, and at what cost."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxkv.memo import database
from jaxkv.memo.budget import LEAST
from jaxkv.memo.disk import POLICIES, Disk
from jaxkv.memo.record import LARGE

SIZE = 96


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


def files(directory, ending: str = ".db"):
    """The database; or with "-files", the files of its large records."""
    paths = sorted(path for path in directory.iterdir() if path.name.endswith(ending))
    return sorted(file for path in paths for file in path.iterdir()) if ending == "-files" else paths


def taken(directory) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def statements(monkeypatch) -> list[str]:
    """What SQLite is told."""
    said: list[str] = []

    class Watched(database.Database):
        def execute(self, statement, *values):
            said.append(statement)
            return super().execute(statement, *values)

    monkeypatch.setattr("jaxkv.memo.current.Database", Watched)
    return said


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
    noise = np.random.default_rng(0).bytes(2 * LARGE)
    store.write([key(1), key(2)], [bytes(2 * LARGE), noise])
    for reader in (store, Disk(tmp_path)):
        assert [bytes(v) for v in reader.read([key(1), key(2)], 2 * LARGE)] == [bytes(2 * LARGE), noise]
        assert reader.read([key(1)], 4999) == [None]
    assert [path.stat().st_size for path in files(tmp_path, "-files")] == [2 * LARGE]
    assert store.stats().nbytes == taken(tmp_path) <= 2 * LARGE + database.LEAST_BYTES + 4096


@pytest.mark.parametrize("name", [b"50%?#x y", b"\xff\xfe"])
def test_a_directory_may_have_any_name_and_come_as_any_path(tmp_path, name):
    class Place:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path) + b"/" + name

    store = Disk(Place())
    assert fill(store, range(3)) == 3 and found(Disk(os.fsdecode(Place())), range(3)) == [0, 1, 2]
    assert store.directory == os.fsdecode(Place()) and Path(store.directory).is_dir()


def test_a_store_that_is_dropped_closes_its_database(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(database.Database, "close", lambda self: closed.append(self.folder))
    store = Disk(tmp_path)
    del store
    gc.collect()
    assert f"{files(tmp_path)[0]}-files" in closed, "Python 3.13 warns of what was not closed"


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="policy is 'best', must be one of keep, lru, mru, fifo"):
        Disk(tmp_path, policy="best")
    with pytest.raises(ValueError, match="compress is 'gzip'"):
        Disk(tmp_path, compress="gzip")
    for directory in ("", 5, b"features", "a\0b"):
        with pytest.raises(ValueError, match="give the path of a directory"):
            Disk(directory)
    with pytest.raises(ValueError, match="disk_budget is 9000; give 65,536 bytes or more, a share of"):
        Disk(tmp_path, budget=9000)
    with pytest.raises(ValueError, match="32 bytes"):
        Disk(tmp_path).write([b"short"], [b""])
    with pytest.raises(ValueError, match="one payload for each key"):
        Disk(tmp_path).write([key(1)], [])


def test_a_missing_library_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"zstandard is not installed.*pip install zstandard$"):
        Disk(tmp_path, compress="zstd")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match=r"xxhash is not installed.*pip install xxhash$"):
        Disk(tmp_path)


def test_a_python_without_sqlite_or_with_one_for_a_single_thread_is_told_so(tmp_path, monkeypatch):
    program = "import sys; sys.modules['_sqlite3'] = None; import jaxkv; jaxkv.Memo()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "ImportError: this Python was built without sqlite3, which a Memo needs; use a Python that" in done.stderr
    monkeypatch.setattr(sqlite3, "threadsafety", 0)
    with pytest.raises(ValueError, match=r"was built for one thread \(SQLITE_THREADSAFE=0\); use another Python"):
        Disk(tmp_path)


def test_a_directory_that_holds_something_else_is_refused_and_not_filled(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files, such as 'thesis.tex'; give an empty"):
        Disk(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"thesis\.tex is not a directory"):
        Disk(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="is not a directory"):
        Disk(tmp_path / "thesis.tex" / "features")


def test_a_store_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "VERSION", 2)
    Disk(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is a store of version 2; this jaxkv reads 1; give another one"):
        Disk(tmp_path)


@pytest.mark.parametrize("name", ["FORMAT", "000000000001-0123456789abcdef.seg"])
def test_what_an_earlier_jaxkv_kept_is_refused_with_the_command_that_removes_it(tmp_path, name):
    directory = tmp_path / "my features"
    directory.mkdir()
    (directory / name).write_text("jaxkv-disk 1 0")
    with pytest.raises(ValueError, match=r"earlier jaxkv kept.*remove it: rm -r '") as error:
        Disk(directory)
    subprocess.run(str(error.value).partition("remove it: ")[2], shell=True, check=True)
    assert fill(Disk(directory), range(3)) == 3


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    path = database.path_of(str(tmp_path), 1)
    with contextlib.closing(sqlite3.connect(path)) as theirs:
        theirs.execute("create table thesis (chapter)")
    before = files(tmp_path)[0].read_bytes()
    with pytest.raises(ValueError, match="is a database of another program; give another directory"):
        Disk(tmp_path)
    assert files(tmp_path)[0].read_bytes() == before


def test_a_database_that_somebody_holds_in_another_journal_mode_is_busy_until_they_let_go(tmp_path):
    store = Disk(tmp_path)
    fill(store, range(3)), store.close()
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0])) as theirs:
        theirs.execute("pragma journal_mode=wal")
        theirs.execute("select * from items").fetchone()
        again = Disk(tmp_path)
        assert found(again, range(3)) == [] and fill(again, [4]) == 0 and again.stats().busy > 1
    assert found(again, range(3)) == [0, 1, 2] and fill(again, [4]) == 1 and again.stats().errors == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("ending", ["", "-journal"])
def test_a_fifo_or_a_folder_in_a_files_place_is_refused_or_a_miss(tmp_path, make, ending):
    store = Disk(tmp_path)
    fill(store, range(3))
    path = database.path_of(str(tmp_path), 1) + ending
    os.unlink(path)
    make(path)
    with pytest.raises(ValueError, match="is not a file, as a database must be; remove it"):
        Disk(tmp_path)
    assert found(store, range(3)) == [] and fill(store, [4]) == 0 and store.stats().errors > 0
    os.rmdir(path) if make is os.mkdir else os.unlink(path)
    assert fill(store, [4]) == 1
    assert 4 in found(store, range(5))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: open(path, "w").close(), lambda path: None])
def test_whatever_takes_the_place_of_a_large_record_is_a_miss(tmp_path, make):
    store = Disk(tmp_path)
    fill(store, [1, 2], LARGE)
    path = files(tmp_path, "-files")[0]
    path.unlink()
    make(path)
    assert len(found(store, [1, 2], LARGE)) == 1
    assert fill(store, [1, 2], LARGE) == 2 and found(store, [1, 2], LARGE) == [1, 2]


def test_files_that_others_put_there_later_are_left_alone(tmp_path):
    fill(Disk(tmp_path), range(3))
    (tmp_path / "README").write_text("what is this?")
    assert found(Disk(tmp_path, policy="lru", budget=LEAST), range(3)) == [0, 1, 2]
    fill(Disk(tmp_path, policy="lru", budget=LEAST), range(3, 900))
    assert (tmp_path / "README").exists()


def labels(directory) -> dict[bytes, str]:
    with contextlib.closing(sqlite3.connect(files(directory)[0])) as db:
        return dict(db.execute("select namespace, cast(about as text) from labels"))


def test_a_namespace_is_described_with_its_first_record(tmp_path):
    store = Disk(tmp_path)
    store.describe(key(0)[:16], {"function": "f", "version": "1"})
    assert labels(tmp_path) == {}
    fill(store, [1])
    store.describe(key(0)[:16], {"function": "g"})
    other = Disk(tmp_path)
    other.describe(key(0)[:16], {"function": "h"})
    fill(store, [2]), fill(other, [3])
    assert {name: json.loads(text) for name, text in labels(tmp_path).items()} == {
        bytes(16): {"function": "f", "version": "1"}
    }
    store.clear([bytes(16)])
    assert labels(tmp_path) == {}, "nobody asks for it any more"
    fill(store, [2])
    assert list(labels(tmp_path)) == [bytes(16)]


def test_only_flush_waits_for_the_disk(tmp_path, monkeypatch, statements):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store = Disk(tmp_path)
    fill(store, [1, 2], LARGE), fill(store, [3])
    assert "pragma synchronous=off" in statements and "pragma synchronous=full" not in statements
    assert not synced
    store.flush()
    folder = tmp_path / "memo-v1-000001.db-files"
    assert set(synced) == {str(tmp_path), str(folder), *map(str, folder.iterdir())}
    last = statements[statements.index("pragma synchronous=full") :]
    assert last[1] == "begin immediate" and last[-2:] == ["commit", "pragma synchronous=off"]


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_a_batch_is_one_query_or_one_transaction(tmp_path, statements):
    store = Disk(tmp_path)
    statements.clear()
    fill(store, range(64))
    assert [line for line in statements if line in ("begin immediate", "commit")] == ["begin immediate", "commit"]
    statements.clear()
    assert len(found(store, range(70))) == 64
    assert len(statements) == 1 and statements[0].startswith("select")


def test_a_process_holds_no_index(tmp_path):
    """Nothing grows with the store: neither what is in memory, nor how many pages an opening reads."""
    count = 1_000_000 if os.environ.get("JAXKV_FULL") else 20_000
    store = Disk(tmp_path)
    keys = [key(number) for number in range(count)]
    store.write(keys, [b"12345678"] * count)
    store.close()
    tracemalloc.start()
    again = Disk(tmp_path)
    assert again.read(keys[:: count // 100], 8) == [b"12345678"] * 100
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000 and again.stats().items == count


# --- budgets and policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_never_exceeded(tmp_path, policy):
    budget, chance = 300_000, random.Random(0)
    store = Disk(tmp_path, budget=budget, policy=policy)
    store.describe(key(0)[:16], {"function": "f"})
    for turn in range(100):
        size = chance.choice([10, 100, 1000, 4000, 70_000, 400_000])
        before = store.stats().written
        fill(store, range(100 * turn, 100 * turn + chance.randint(1, 20)), size)
        assert store.stats().nbytes == taken(tmp_path) <= budget
        if policy != "keep" and size < 1000:
            assert store.stats().written > before, "there is always room for what is new"
    assert store.stats().nbytes > budget // 2 and store.stats().errors == 0
    assert (store.stats().evicted == 0) == (policy == "keep")
    assert store.stats().items == store.stats().written - store.stats().evicted
    store.close()
    assert Disk(tmp_path, budget=budget, policy=policy).stats().items == store.stats().items


def test_what_is_taken_is_measured_seldom_far_from_the_budget_and_always_near_it(tmp_path, statements):
    store = Disk(tmp_path, budget=1 << 30)

    def measured(count: int) -> int:
        statements.clear()
        for _ in range(count):
            fill(store, [chance.getrandbits(60)], 4000)
        return statements.count("pragma page_count")

    chance = random.Random(0)
    assert measured(50) <= 2
    store.budget = store.stats().nbytes + 40 * 4096
    store._sure = 0
    assert 20 < measured(30) < 70 and store.stats().nbytes <= store.budget


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_too_small_for_one_record_is_said_once(tmp_path, policy, caplog):
    store = Disk(tmp_path, budget=LEAST, policy=policy)
    for number in range(3):
        assert fill(store, [number], 65_000) == 0
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: the budget of 64.0 KiB has no room for a record of 63.5 KiB; it is not")
    need = int(re.search("give a disk_budget of ([0-9,]+) bytes or more", message)[1].replace(",", ""))
    assert fill(Disk(tmp_path, budget=need, policy=policy), [0], 65_000) == 1, "what it says suffices"


def test_a_full_budget_is_said_once_where_what_is_there_is_kept(tmp_path, caplog):
    store = Disk(tmp_path, budget=1 << 17)
    for number in range(50):
        fill(store, [number], 4000)
    (message,) = caplog.messages
    assert f"{tmp_path}: the budget of 128.0 KiB has no room for a record of 3.9 KiB" in message
    assert ' bytes or more, or disk_policy="lru", or make room by jaxkv memo prune' in message
    caplog.clear()
    fill(Disk(tmp_path, budget=1 << 17, policy="lru"), range(50, 60), 4000)
    assert not caplog.messages, "room was made"


def test_labels_go_with_the_last_record(tmp_path):
    store = Disk(tmp_path, budget=100_000, policy="lru")
    for namespace in range(1, 200):
        store.describe(key(0, namespace)[:16], {"function": "f", "about": "x" * 300})
        fill(store, [0], namespace=namespace)
    fill(store, range(100), 500)
    kept = {key(0, n)[:16] for n in range(1, 200) if found(store, [0], namespace=n)}
    assert set(labels(tmp_path)) == kept and len(kept) < 150
    assert store.stats().nbytes <= 100_000


MUCH = 5000  # two pages


def rows(store: Disk, used_again=()) -> list[int]:
    """Ten records, some used again, then one more; what is left."""
    for number in range(10):
        fill(store, [number], MUCH)
    for number in used_again:
        found(store, [number], MUCH)
    fill(store, [10], MUCH)
    left = found(store, range(11), MUCH)
    return left


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> int:
    """A budget for ten records of that size and no more."""
    store = Disk(tmp_path_factory.mktemp("measured"))
    fill(store, range(10), MUCH)
    return store.stats().nbytes + MUCH - 1000


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("keep", list(range(10))),
        ("fifo", list(range(1, 11))),
        ("lru", [0, *range(2, 11)]),  # 0 was used again, 1 is the oldest that wasn't
        ("mru", [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),  # 5 was the last that was used
    ],
)
def test_policies_remove_the_record_that_they_should(tmp_path, policy, left, ten):
    surely = 6000 if policy == "keep" else 0  # it writes only what fits in any case
    store = Disk(tmp_path, budget=ten + surely, policy=policy)
    assert rows(store, [0, 5]) == left
    assert store.stats().evicted == (policy != "keep") and store.stats().lost == 0


def test_least_recent_use_is_known_after_a_restart_and_to_others(tmp_path, ten):
    store, other = Disk(tmp_path, budget=ten, policy="lru"), Disk(tmp_path, budget=ten, policy="lru")
    for number in range(10):
        fill(store, [number], MUCH)
    found(other, [0, 2], MUCH)
    store.close()
    again = Disk(tmp_path, budget=ten, policy="lru")
    fill(again, [10, 11], MUCH)
    assert found(again, range(12), MUCH) == [0, 2, *range(4, 12)]


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch, ten):
    clock = [time.time_ns()]

    def backwards() -> int:
        clock[0] -= 10**12
        return clock[0]

    monkeypatch.setattr(time, "time_ns", backwards)
    assert rows(Disk(tmp_path, budget=ten, policy="lru"), [0, 5]) == [0, *range(2, 11)]


def test_clear_removes_everything_or_one_namespace(tmp_path):
    store, other = Disk(tmp_path), Disk(tmp_path)
    for number in range(10):
        fill(store, [number], namespace=number % 2)
        fill(store, [10 + number], LARGE, namespace=number % 2)
    store.clear([key(0, 1)[:16]])
    assert found(store, range(10), namespace=0) == [0, 2, 4, 6, 8] and found(store, range(10), namespace=1) == []
    assert found(other, range(10), namespace=0) == [0, 2, 4, 6, 8] and len(files(tmp_path, "-files")) == 5
    store.clear()
    assert store.stats().items == other.stats().items == 0 and files(tmp_path, "-files") == []
    assert fill(other, range(4)) == 4 and found(store, range(4)) == [0, 1, 2, 3]
    assert store.stats().lost == store.stats().errors == other.stats().errors == 0


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
    store = Disk(tmp_path, budget=10**6, policy="lru", compress="zstd")
    fill(store, [1])
    again = pickle.loads(pickle.dumps(store))
    assert found(again, [1]) == [1] and fill(again, [2]) == 1 and found(store, [2]) == [2]
    for name in ("directory", "budget", "policy", "compress"):
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
from test_disk import Disk, fill, found
from jaxkv.memo import current
current._WAIT = 30  # here everything is to be kept, however busy it gets
store = Disk(sys.argv[1])
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
child = os.fork()
if child == 0:
    os.read(go, 1)
    os._exit(found(store, [55_000]) != [55_000] or fill(store, [55_001]) != 1)
fill(store, [55_000])
store.close()
os.write(said, b".")
assert os.waitpid(child, 0)[1] == 0
assert found(store, [55_000, 55_001]) == [55_000, 55_001]

children = []
child = os.fork()  # the child shares the store, not the connection
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
    store = Disk(tmp_path, budget=100_000, policy="lru")
    failed = []

    def work(who: int) -> None:
        try:
            for turn in range(50):
                fill(store, range(100 * who + turn, 100 * who + turn + 5), 700)
                found(store, range(0, 800, 7), 700)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    assert not failed and stats.evicted > 0 and stats.nbytes <= 100_000
    assert (stats.corrupt, stats.errors) == (0, 0)
