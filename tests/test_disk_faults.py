"""The memo's disk tier where things go wrong: never an exception, never a wrong value, and what was lost is counted.

JAXKV_FULL=1 flips every bit and runs more random programs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_disk import RECORD, files, fill, found, key

from jaxkv.memo.disk import Disk
from jaxkv.memo.record import ENTRY, HEADER_BYTES

FULL = bool(os.environ.get("JAXKV_FULL"))


@pytest.fixture
def store_of_five(tmp_path):
    """A closed store of five records in one segment, and what puts it back."""
    directory, kept = tmp_path / "store", tmp_path / "kept"
    store = Disk(directory)
    fill(store, range(5))
    store.close()
    shutil.copytree(directory, kept)

    def restore() -> tuple[Path, Path]:
        for path in directory.iterdir():
            path.unlink()
        for path in kept.iterdir():
            shutil.copy(path, directory)
        return files(directory)[0], files(directory, ".idx")[0]

    return directory, restore


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["whole", "gone", "cut"])
def test_a_segment_cut_at_any_byte_loses_only_what_was_cut(store_of_five, index):
    directory, restore = store_of_five
    for size in range(3 * RECORD, 5 * RECORD + 1):
        segment, entries = restore()
        cut(segment, size)
        if index == "gone":
            entries.unlink()
        elif index == "cut":
            cut(entries, size % (5 * ENTRY.itemsize))
        store = Disk(directory)
        whole = size // RECORD
        assert found(store, range(5)) == list(range(whole))
        stats = store.stats()
        assert stats.items == whole and stats.errors == 0
        indexed = {"whole": 5, "gone": 0, "cut": size % (5 * ENTRY.itemsize) // ENTRY.itemsize}[index]
        assert stats.corrupt == (size % RECORD > 0) and stats.lost == max(indexed - whole, 0)
        assert fill(store, range(5)) == 5 and found(store, range(5)) == list(range(5))
        store.close()
        assert found(Disk(directory), range(5)) == list(range(5))


def test_a_segment_cut_while_it_is_read_loses_only_what_was_cut(store_of_five):
    directory, restore = store_of_five
    for size in range(0, 5 * RECORD + 1, 7):
        segment, _ = restore()
        reader = Disk(directory)
        assert found(reader, [0]) == [0]
        cut(segment, size)
        assert found(reader, range(5)) == list(range(size // RECORD))
        assert reader.stats().lost == 5 - size // RECORD


def test_a_segment_cut_while_it_is_written_is_left_and_the_next_one_begun(tmp_path):
    for size in (0, 1, RECORD, 2 * RECORD - 1, 3 * RECORD):
        store = Disk(tmp_path / str(size))
        fill(store, range(3))
        cut(files(tmp_path / str(size))[0], size)
        fill(store, [7])
        assert found(store, range(3)) == list(range(size // RECORD)) and found(store, [7]) == [7]
        assert found(Disk(tmp_path / str(size)), [7]) == [7]


def test_any_bit_of_a_record_loses_only_that_record_and_any_bit_of_its_index_entry_nothing(store_of_five):
    directory, restore = store_of_five
    payload_bits = range(8 * HEADER_BYTES, 8 * RECORD, 1 if FULL else 13)
    for bit in [*range(8 * HEADER_BYTES), *payload_bits]:
        segment, _ = restore()
        flip(segment, 8 * 2 * RECORD + bit)
        store = Disk(directory)
        assert found(store, range(5)) == [0, 1, 3, 4], bit
        assert (store.stats().corrupt, store.stats().lost, store.stats().errors) == (1, 0, 0)
        if bit % 8 == 0:  # without the index, too
            files(directory, ".idx")[0].unlink()
            store = Disk(directory)
            assert found(store, range(5)) == [0, 1, 3, 4] and store.stats().corrupt == 1
            assert fill(store, [2]) == 1 and found(store, range(5)) == list(range(5))
    for bit in range(8 * ENTRY.itemsize):
        _, entries = restore()
        flip(entries, 8 * 2 * ENTRY.itemsize + bit)
        store = Disk(directory)
        assert found(store, range(5)) == list(range(5)), bit
        assert (store.stats().corrupt, store.stats().lost) == (0, 0)
        assert entries.stat().st_size == 5 * ENTRY.itemsize, "the index is mended"


def test_any_bit_flipped_while_the_store_is_open_loses_only_that_record(store_of_five):
    directory, restore = store_of_five
    for bit in range(0, 8 * RECORD, 11):
        segment, entries = restore()
        reader = Disk(directory)
        found(reader, [0])
        with open(segment, "r+b") as file:
            data = bytearray(file.read())
            data[2 * RECORD + bit // 8] ^= 1 << bit % 8
            file.seek(0)
            file.write(data)
        assert found(reader, range(5)) == [0, 1, 3, 4] and reader.stats().corrupt == 1
        assert found(reader, range(5)) == [0, 1, 3, 4] and reader.stats().corrupt == 1, "counted once"
        assert fill(reader, [2]) == 1 and found(reader, range(5)) == list(range(5))


def test_any_bit_of_an_index_that_is_being_written_hides_only_its_record_until_the_writer_is_done(tmp_path):
    for bit in range(0, 8 * ENTRY.itemsize, 7):
        directory = tmp_path / str(bit)
        writer = Disk(directory)
        fill(writer, range(3))
        flip(files(directory, ".idx")[0], 8 * ENTRY.itemsize + bit)
        reader = Disk(directory)
        assert found(reader, range(3)) == [0, 2] and reader.stats().corrupt == 1, bit
        fill(writer, [3])
        assert found(reader, range(4)) == [0, 2, 3] and reader.stats().corrupt == 1, "read once"
        writer.close()
        assert found(reader, range(4)) == list(range(4))


@pytest.mark.parametrize("live", [True, False])
def test_an_index_that_has_become_very_long_is_not_read_to_its_end(tmp_path, live):
    writer = Disk(tmp_path)
    fill(writer, range(5))
    if not live:
        writer.close()
    os.truncate(files(tmp_path, ".idx")[0], 1 << 42)
    assert found(Disk(tmp_path), range(5)) == list(range(5))


@pytest.mark.parametrize("short", [-(1 << 20), -1, 0, 1, 2, 3, 4, HEADER_BYTES - 1, HEADER_BYTES])
def test_the_record_after_a_large_damaged_one_is_found_without_an_index(tmp_path, short):
    """Files are searched a MiB at a time: the next header may begin just before the end of one."""
    store = Disk(tmp_path)
    store.write([key(0)], [bytes((1 << 20) - HEADER_BYTES - short)])
    fill(store, [1])
    store.close()
    flip(files(tmp_path)[0], 3)
    files(tmp_path, ".idx")[0].unlink()
    again = Disk(tmp_path)
    assert found(again, [0, 1]) == [1] and again.stats().corrupt == 1


def test_a_record_that_lies_where_another_one_should_is_not_given_for_it(store_of_five):
    directory, restore = store_of_five
    segment, _ = restore()
    data = segment.read_bytes()
    reader = Disk(directory)
    segment.write_bytes(data[RECORD : 2 * RECORD] + data[RECORD:])
    for store in (reader, Disk(directory)):
        assert found(store, range(5)) == [1, 2, 3, 4] and store.stats().corrupt == 1


def test_a_payload_that_looks_like_records_is_not_taken_for_them(tmp_path):
    victim = Disk(tmp_path / "victim")
    fill(victim, [1], 50)
    records = files(tmp_path / "victim")[0].read_bytes()
    inner = bytearray(records)
    store = Disk(tmp_path / "store")
    store.write([key(5)], [bytes(inner)])
    fill(store, [6])
    store.close()
    flip(files(tmp_path / "store")[0], 8 * 20)  # the header around it: now the file is searched
    files(tmp_path / "store", ".idx")[0].unlink()
    again = Disk(tmp_path / "store")
    assert found(again, [1], 50) == [] and found(again, [6]) == [6]


def test_records_and_indexes_count_only_in_the_file_they_were_written_to(tmp_path):
    first, second = Disk(tmp_path / "a"), Disk(tmp_path / "b")
    fill(first, range(5))
    fill(second, range(5, 10))
    first.close(), second.close()
    shutil.copy(files(tmp_path / "a", ".idx")[0], files(tmp_path / "b", ".idx")[0])
    assert found(Disk(tmp_path / "b"), range(10)) == [5, 6, 7, 8, 9]
    shutil.copy(files(tmp_path / "a")[0], files(tmp_path / "b")[0])
    assert found(Disk(tmp_path / "b"), range(10)) == []


@pytest.mark.parametrize("damage", ["", "jaxkv-disk 7 00000000\n", "jaxkv-disk 1", "\0" * 22])
def test_a_damaged_format_file_is_written_anew(tmp_path, damage, caplog):
    fill(Disk(tmp_path), range(3))
    before = (tmp_path / "FORMAT").read_bytes()
    (tmp_path / "FORMAT").write_text(damage)
    assert found(Disk(tmp_path), range(3)) == [0, 1, 2]
    assert (tmp_path / "FORMAT").read_bytes() == before and "FORMAT is damaged" in caplog.text


@settings(max_examples=1000 if FULL else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(["keep", "lru", "mru", "fifo"]))
def test_random_programs_with_damage_get_right_values_or_none(tmp_path_factory, seed, policy):
    directory, chance = tmp_path_factory.mktemp("store"), random.Random(seed)
    budget = chance.choice([None, 3000, 20_000])

    def fresh() -> Disk:
        compress = chance.choice([None, "zstd"])
        return Disk(
            directory, budget=budget, policy=policy, segment_bytes=chance.choice([300, 2000]), compress=compress
        )

    stores, written, harmed = [fresh(), fresh()], set(), budget is not None
    for _ in range(chance.randint(5, 40)):
        store, numbers = chance.choice(stores), [chance.randint(0, 30) for _ in range(chance.randint(1, 8))]
        deed = chance.choice(["write"] * 4 + ["read"] * 4 + ["reopen", "flip", "cut", "remove", "clear", "junk"])
        if deed == "write":
            assert fill(store, numbers) == len(numbers) or harmed
            written.update(numbers)
        elif deed == "read":
            there = found(store, numbers)
            assert harmed or set(numbers) & written == set(there)
        elif deed == "reopen":
            stores[stores.index(store)] = fresh()
        elif deed == "clear":
            store.clear(chance.choice([None, [key(0)[:16]]]))
            harmed = True
        else:
            paths = [path for path in directory.iterdir() if path.suffix in (".seg", ".idx")]
            if paths:
                path = chance.choice(paths)
                size = path.stat().st_size
                harmed = True
                if deed == "remove":
                    path.unlink()
                elif deed == "cut":
                    cut(path, chance.randint(0, size))
                elif deed == "junk":
                    with open(path, "ab") as file:
                        file.write(chance.randbytes(chance.randint(1, 200)))
                elif size:
                    with open(path, "r+b") as file:
                        at = chance.randrange(size)
                        file.seek(at)
                        byte = file.read(1)[0]
                        file.seek(at)
                        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    for store in (*stores, fresh()):
        there = found(store, range(31))
        assert set(there) <= written and (harmed or set(there) == written)
    shutil.rmtree(directory)


# --- a disk that doesn't take or give --------------------------------------------------------------------------------


@contextlib.contextmanager
def room_for(monkeypatch, count: int):
    """Lets only so many bytes more be written."""
    real, left = os.writev, [count]

    def writev(fd: int, pieces) -> int:
        data = b"".join(pieces)[: left[0]]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(data)
        return real(fd, [data])

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", writev)
        yield


def test_a_disk_that_is_full_after_any_byte_keeps_what_fits_and_tries_again_later(tmp_path, monkeypatch, caplog):
    size = 10
    least, most = 2 * (HEADER_BYTES + size), 2 * (HEADER_BYTES + size) + 2 * ENTRY.itemsize
    for count in range(most + 1):
        directory = tmp_path / str(count)
        store = Disk(directory)
        caplog.clear()
        with room_for(monkeypatch, count):
            kept = fill(store, range(2), size)
            assert kept == min(count // (HEADER_BYTES + size), 2)
            assert found(store, range(2), size) == list(range(kept))
            for _ in range(3):
                fill(store, range(5, 9), size)
        failing = count < most
        assert (store.stats().errors > 0) == (failing or kept == 2)
        assert len(caplog.records) == 1, "said once"
        there = found(store, range(9), size)
        assert there == list(range(kept))
        assert all(path.stat().st_size % ENTRY.itemsize == 0 for path in files(directory, ".idx"))
        tries = 0
        while fill(store, range(2), size) < 2 or fill(store, [20], size) < 1:
            tries += 1
            assert tries < 20
        assert found(store, [0, 1, 20], size) == [0, 1, 20]
        store.close()
        again = Disk(directory)
        assert found(again, [0, 1, 20], size) == [0, 1, 20]
        assert (again.stats().corrupt, again.stats().lost) == (0, 0), count
    assert least > 0


def test_a_disk_that_stays_full_is_tried_less_and_less_often(tmp_path, monkeypatch):
    store, calls = Disk(tmp_path), []

    def writev(fd: int, pieces) -> int:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "writev", writev)
    for number in range(3000):
        assert fill(store, [number]) == 0
    assert 5 < len(calls) < 20 and store.stats().errors == len(calls)
    assert len(files(tmp_path)) <= 1


def test_a_half_written_record_that_cannot_be_cut_off_is_stepped_over(tmp_path, monkeypatch):
    store = Disk(tmp_path)
    fill(store, [0])
    with room_for(monkeypatch, RECORD + 50):
        monkeypatch.setattr(os, "ftruncate", lambda fd, size: os.read(-1, 1))
        assert fill(store, [1, 2]) == 1
    monkeypatch.undo()
    while not fill(store, [3]):
        pass
    store.close()
    again = Disk(tmp_path)
    assert found(again, range(4)) == [0, 1, 3] and again.stats().corrupt == 1


LIMITED = """
import os, resource, sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_disk import Disk, fill, found
store = Disk(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
kept = [fill(store, range(10 * n, 10 * n + 10), 1000) for n in range(200)]
assert found(store, range(90), 1000) == list(range(90))
assert store.stats().errors > 0 and 90 < sum(kept) < 2000, (store.stats(), sum(kept))
assert len(found(store, range(2000), 1000)) == sum(kept)
"""


def test_a_limit_on_the_size_of_files_is_met_as_a_full_disk(tmp_path):
    here = os.path.dirname(__file__)
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "store"), here, os.path.dirname(here)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    again = Disk(tmp_path / "store")
    assert len(found(again, range(2000), 1000)) == again.stats().items >= 90
    assert (again.stats().corrupt, again.stats().lost) == (0, 0)


def test_a_directory_that_cannot_be_written_is_read(tmp_path, monkeypatch, caplog):
    fill(Disk(tmp_path), range(3))
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    store = Disk(tmp_path, policy="lru", budget=10_000)
    assert found(store, range(3)) == [0, 1, 2] and store.stats().errors == 0
    assert fill(store, [2, 3]) == 1 and found(store, range(4)) == [0, 1, 2]
    store.describe(key(0)[:16], lambda: {"function": "f"})
    store.flush(), store.clear(), store.close()
    assert store.stats().errors > 0 and "Read-only file system" in caplog.text
    assert found(store, range(3)) == [0, 1, 2]


def test_a_directory_that_cannot_be_made_holds_nothing_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "features")

    monkeypatch.setattr(os, "makedirs", refuse)
    store = Disk(tmp_path / "features")
    assert fill(store, range(3)) == 0 and found(store, range(3)) == []
    assert store.stats().errors > 0 and "Permission denied" in caplog.text
    monkeypatch.undo()
    while fill(store, range(3)) < 3:
        pass
    assert found(Disk(tmp_path / "features"), range(3)) == [0, 1, 2]


def test_a_segment_that_cannot_be_read_is_a_miss(tmp_path, monkeypatch, caplog):
    store = Disk(tmp_path)
    fill(store, range(3))

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        assert found(store, range(3)) == []
    assert store.stats().lost == 3 and store.stats().errors > 0 and "Input/output error" in caplog.text
    assert fill(store, range(3)) == 3 and found(store, range(3)) == [0, 1, 2]


def test_a_directory_that_is_removed_is_made_again_for_what_is_new(tmp_path, caplog):
    directory = tmp_path / "store"
    store, other = Disk(directory), Disk(directory)
    fill(store, range(5))
    fill(other, range(5, 8))
    assert found(store, range(8)) == list(range(8))
    shutil.rmtree(directory)
    assert found(store, [100]) == [] and found(store, range(8)) == []
    assert store.stats() == type(store.stats())(0, 0, 8, 9, 5, 0, 0, 8, 0)
    assert fill(store, range(3)) == 3 and found(store, range(8)) == [0, 1, 2]
    assert found(other, range(8))[:3] == [0, 1, 2] and fill(other, range(8)) == 8
    store.close(), other.close()
    assert found(Disk(directory), range(8)) == list(range(8))


def test_a_directory_that_something_else_takes_the_place_of_is_left_alone(tmp_path, caplog):
    directory = tmp_path / "store"
    store = Disk(directory)
    fill(store, range(5))
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "thesis.tex").touch()
    assert fill(store, [9]) == 0 and found(store, range(10)) == [] and len(list(directory.iterdir())) == 1
    shutil.rmtree(directory)
    directory.touch()
    assert fill(store, [9]) == 0 and found(store, range(10)) == []
    assert store.stats().errors > 0 and "thesis.tex" in caplog.text


# --- killed processes ------------------------------------------------------------------------------------------------

KILLED = """
import dataclasses, json, os, random, signal, sys, time
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_disk import Disk, fill, found
directory, rounds, chance = sys.argv[1], int(sys.argv[4]), random.Random(int(sys.argv[5]))
SIZE = 3000
settings = json.loads(sys.argv[6])

def write_on(first, pipe):
    store = Disk(directory, **settings)
    while True:
        assert fill(store, range(first, first + 7), SIZE) == 7 or "budget" in settings
        os.write(pipe, first.to_bytes(8, "big"))  # said only when it is written
        first += 7

def read_on(stop):
    store = Disk(directory, **settings)
    turns = 0
    try:
        while not os.path.exists(stop):
            found(store, [random.randrange(rounds * 2_000_000) for _ in range(3)], SIZE)
            found(store, [n * 1_000_000 + random.randrange(300) for n in range(2 * rounds)], SIZE)
            turns += 1
    except BaseException as error:
        print("reader:", repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0 if turns else 2)

reader = os.fork()
if reader == 0:
    read_on(directory + ".stop")
said = []
for round_ in range(rounds):
    writers, pipes = [], []
    for who in range(2):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_on((2 * round_ + who) * 1_000_000, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        writers.append(pid), pipes.append(ours)
    os.read(pipes[0], 8), os.read(pipes[1], 8)
    said += [2 * round_ * 1_000_000, (2 * round_ + 1) * 1_000_000]
    for pid in writers:
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
    for pid, pipe in zip(writers, pipes):
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "a writer ended by itself"
        while data := os.read(pipe, 8 * 4096):
            said += [int.from_bytes(data[i:i + 8], "big") for i in range(0, len(data), 8)]
        os.close(pipe)
open(directory + ".stop", "w").close()
assert os.waitpid(reader, 0)[1] == 0, "the reader failed"
store = Disk(directory, **settings)
numbers = [first + n for first in said for n in range(7)]
there = len(found(store, numbers, SIZE))
stats = store.stats()
print(json.dumps(dict(said=len(numbers), there=there, **dataclasses.asdict(stats))))
"""


def killed(directory: Path, rounds: int, **settings) -> dict[str, int]:
    """Kills two writers beside a reader, again and again; returns what is known of the store afterwards."""
    from jaxkv.memo.prune import prune
    from jaxkv.memo.upkeep import verify

    here = os.path.dirname(__file__)
    settings = {"segment_bytes": 300_000} | settings
    words = [str(directory), here, os.path.dirname(here), str(rounds), "0", json.dumps(settings)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lost"] == result["errors"] == 0
    assert result["corrupt"] <= 2 * rounds  # a torn end each, at most
    prune(str(directory), damaged=True)
    assert verify(str(directory)).damages == ()
    return result


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_they_had_written(tmp_path):
    result = killed(tmp_path / "store", 100)
    assert result["there"] == result["said"] >= 14 * 100


@pytest.mark.slow
def test_writers_killed_while_they_make_room_keep_the_budget_and_harm_nothing(tmp_path):
    budget, batch = 2_000_000, 2 * 7 * (RECORD + 3000 + ENTRY.itemsize)  # of two writers
    result = killed(tmp_path / "store", 15, budget=budget, policy="fifo")
    assert result["there"] < result["said"]
    assert result["nbytes"] <= budget + batch
