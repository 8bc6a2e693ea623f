"""The memo's disk tier where things go wrong: never an exception, never a wrong value, and what was lost is counted.

JAXKV_FULL=1 flips every bit and runs more random programs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import secrets
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_disk import files, fill, found, key, taken

from jaxkv.memo import database, record, upkeep
from jaxkv.memo.disk import Disk
from jaxkv.memo.record import LARGE
from jaxkv.memo.upkeep import prune, survey, verify

FULL = bool(os.environ.get("JAXKV_FULL"))
COUNT = 24
SOME = range(COUNT)


@pytest.fixture
def store_of_some(tmp_path):
    """A closed store of some records of 1 KB, and what puts it back."""
    directory, kept = tmp_path / "store", tmp_path / "kept"
    store = Disk(directory)
    fill(store, SOME, 1000)
    store.close()
    shutil.copytree(directory, kept)

    def restore() -> Path:
        shutil.rmtree(directory)
        shutil.copytree(kept, directory)
        return files(directory)[0]

    return directory, restore


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def works_again(directory: Path, *stores: Disk) -> None:
    """Whatever was lost can be written again, and is found by all."""
    for store in (*stores, Disk(directory)):
        assert fill(store, SOME, 1000) == COUNT
        assert found(store, SOME, 1000) == list(SOME) and store.stats().errors == 0
        store.close()


def counted(store: Disk) -> int:
    stats = store.stats()
    return stats.corrupt + stats.lost + stats.replaced


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("while_open", [False, True])
def test_a_database_cut_at_any_byte_gives_what_is_left_and_is_counted(store_of_some, while_open):
    directory, restore = store_of_some
    size, kept = restore().stat().st_size, []
    for at in [*range(777, size, 16 if FULL else 2777), size - 1]:  # with few bytes it is a new one
        path = restore()
        store = Disk(directory)
        if not while_open:
            store.close()
        cut(path, at)
        there = found(store, SOME, 1000)
        assert len(there) == COUNT or counted(store) > 0, at
        kept.append(len(there))
        works_again(directory, store)
    assert sum(kept) > len(kept) * COUNT // 4, "what was not cut off is not lost"


def test_any_flipped_bit_loses_one_record_as_a_rule_and_is_counted(store_of_some):
    directory, restore = store_of_some
    size, chance, lost = restore().stat().st_size, random.Random(0), []
    for bit in range(8 * size) if FULL else [chance.randrange(8 * size) for _ in range(250)]:
        path = restore()
        flip(path, bit)
        store = Disk(directory)
        there = found(store, SOME, 1000)
        lost.append(COUNT - len(there))
        assert lost[-1] <= 1 or counted(store) > 0, bit  # where the index forgets a key, it is an ordinary miss
        if lost[-1]:
            works_again(directory, store)
        store.close()
    assert sum(lost) <= len(lost), "as many bits as records, at most"


def test_what_befalls_a_large_record_loses_only_that(tmp_path):
    store = Disk(tmp_path)
    fill(store, range(4), LARGE)
    first, second, third, _ = files(tmp_path, "-files")
    flip(first, 8 * 777), cut(second, 1000), third.unlink()
    for reader in (store, Disk(tmp_path)):
        assert len(found(reader, range(4), LARGE)) == 1
    assert (store.stats().corrupt, store.stats().lost, store.stats().replaced) == (2, 1, 0)
    assert fill(store, range(4), LARGE) == 4 and found(store, range(4), LARGE) == list(range(4))
    assert store.stats().nbytes == taken(tmp_path)


def test_a_record_that_lies_where_another_one_should_is_not_given_for_it(tmp_path):
    store = Disk(tmp_path)
    fill(store, range(4), LARGE), fill(store, range(10, 14))
    first, second, *_ = files(tmp_path, "-files")
    first.rename(tmp_path / "aside"), second.rename(first), (tmp_path / "aside").rename(second)
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0])) as db, db:
        db.execute(
            "update items set payload = (select payload from items where key = ?) where key = ?", [key(10), key(11)]
        )
    assert len(found(store, range(4), LARGE)) == 2 and found(store, range(10, 14)) == [10, 12, 13]
    assert store.stats().corrupt == 3


@pytest.mark.parametrize("value", [None, 3, 2.5, "text", b"", b"x" * 32, b"../" * 11, -1, 2**62])
@pytest.mark.parametrize("column", ["key", "raw", "stored", "hash", "used", "payload"])
def test_whatever_a_row_says_is_a_miss_at_worst(tmp_path, column, value):
    store = Disk(tmp_path, policy="lru", budget=10**6)
    fill(store, range(3))
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0])) as db, db:
        db.execute(f"update items set {column} = ? where key = ?", [value, key(1)])
    assert set(found(store, range(3))) >= {0, 2}
    assert fill(store, range(3)) == 3 and found(store, range(3)) == [0, 1, 2]
    for first in range(10, 300, 29):
        fill(store, range(first, first + 29), 5000)
    assert found(store, [299], 5000) == [299] and store.stats().errors == 0


@pytest.mark.parametrize("column", ["stored", "used"])
@pytest.mark.parametrize("value", ["-9e999", "9e999", "1e300"])
def test_whatever_all_rows_say_there_is_a_next_time_of_use_and_a_size(tmp_path, column, value):
    store = Disk(tmp_path, policy="lru", budget=10**6)
    fill(store, range(3))
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0])) as db, db:
        db.execute(f"update items set {column} = {value}")
    assert store.stats().items == 3 and len(found(store, range(3))) == (0 if column == "stored" else 3)
    assert fill(store, range(6)) == 6 and found(store, range(6)) == list(range(6)) and store.stats().errors == 0


@settings(max_examples=1000 if FULL else 40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(["keep", "lru", "mru", "fifo"]))
def test_random_programs_with_damage_get_right_values_or_none(tmp_path_factory, seed, policy):
    directory, chance = tmp_path_factory.mktemp("store"), random.Random(seed)
    budget, size = chance.choice([None, 100_000]), chance.choice([96, 3000, LARGE])

    def fresh() -> Disk:
        return Disk(directory, budget=budget, policy=policy, compress=chance.choice([None, "zstd"]))

    stores, written, harmed = [fresh(), fresh()], set(), budget is not None
    for _ in range(chance.randint(5, 30)):
        store, numbers = chance.choice(stores), [chance.randint(0, 30) for _ in range(chance.randint(1, 8))]
        deed = chance.choice(["write"] * 4 + ["read"] * 4 + ["reopen", "flip", "cut", "remove", "clear", "junk"])
        if deed == "write":
            assert fill(store, numbers, size) == len(set(numbers)) or harmed or len(set(numbers)) < len(numbers)
            written.update(numbers)
        elif deed == "read":
            there = found(store, numbers, size)
            assert harmed or set(numbers) & written == set(there)
        elif deed == "reopen":
            stores[stores.index(store)] = fresh()
        elif deed == "clear":
            store.clear(chance.choice([None, [key(0)[:16]]]))
            harmed = True
        elif paths := [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]:
            path, harmed = chance.choice(paths), True
            length = path.stat().st_size
            if deed == "remove":
                path.unlink()
            elif deed == "cut":
                cut(path, chance.randrange(length))
            elif deed == "junk":
                with open(path, "ab") as file:
                    file.write(chance.randbytes(chance.randint(1, 200)))
            else:
                flip(path, chance.randrange(8 * length))
    for store in (*stores, fresh()):
        there = found(store, range(31), size)
        assert set(there) <= written and (harmed or set(there) == written)
        store.close()
    shutil.rmtree(directory)


# --- a disk that doesn't take or give, and gets over it --------------------------------------------------------------


@pytest.fixture
def trouble(monkeypatch) -> list[str]:
    """Pragmas of what every connection suffers from."""
    pragmas: list[str] = []

    class Suffering(database.Database):
        def execute(self, statement, *values):
            for pragma in pragmas if statement.startswith(("begin", "select key from")) else ():
                super().execute(f"pragma {pragma}")
            return super().execute(statement, *values)

    monkeypatch.setattr("jaxkv.memo.current.Database", Suffering)
    return pragmas


def test_a_disk_that_is_full_keeps_what_fits_and_takes_more_as_soon_as_it_can(tmp_path, trouble, caplog):
    store = Disk(tmp_path)
    fill(store, range(50), 1000)
    trouble[:] = [f"max_page_count={store.stats().nbytes // 4096 + 1}"]
    kept = sum(fill(store, [100 + n], 1000) for n in range(20))
    assert found(store, range(50), 1000) == list(range(50)) and store.stats().errors == 20 - kept > 10
    assert sum("full" in message for message in caplog.messages) == 1, "said once"
    trouble.clear()
    assert fill(store, range(400, 410), 1000) == 10
    assert len(found(Disk(tmp_path), [*range(50), *range(100, 120), *range(400, 410)], 1000)) == 60 + kept


def test_a_store_that_becomes_read_only_is_read_and_written_again_when_it_may(tmp_path, trouble, caplog):
    store = Disk(tmp_path, policy="lru", budget=10**6)
    fill(store, range(3))
    trouble[:] = ["query_only=on"]
    store.describe(key(0, 5)[:16], {"function": "f"})
    assert fill(store, [7], namespace=5) == 0 and found(store, range(3)) == [0, 1, 2]
    assert store.stats().errors > 0 and "readonly" in caplog.text
    trouble.clear()
    assert fill(store, [7, 8]) == 2


PERMITTED = """
import os, sys, tempfile
sys.path[:0] = sys.argv[1:]
from test_disk import Disk, LARGE, fill, found
with tempfile.TemporaryDirectory() as place:
    if os.geteuid() == 0:  # whom permissions don't stop
        os.chown(place, 65534, 65534)
        try:
            os.setuid(65534)
        except OSError as error:
            sys.exit(f"no user without rights: {error}")
    directory = os.path.join(place, "store")
    before = Disk(directory, policy="lru", budget=10**7)
    assert fill(before, range(3)) == 3 and fill(before, [10], LARGE) == 1

    def permit(writing):
        for path in [os.path.join(root, name) for root, _, names in os.walk(place) for name in ["", *names]]:
            os.chmod(path, os.stat(path).st_mode & 0o555 | (0o200 if writing else 0))

    permit(False)
    assert not os.access(directory, os.W_OK)
    during = Disk(directory, policy="lru", budget=10**7)
    for store in (before, during):
        assert found(store, range(3)) == [0, 1, 2] and found(store, [10], LARGE) == [10]
        assert fill(store, [11], LARGE) == 0 and store.stats().errors > 0, store.stats()
    assert fill(during, [3]) == 0 and during.stats().errors > 1
    permit(True)
    for number, store in enumerate((before, during), 20):
        errors = store.stats().errors
        assert fill(store, [number]) == fill(store, [number], LARGE, namespace=1) == 1
        assert store.stats().errors == errors
        assert found(store, [0, 1, 2, number]) == [0, 1, 2, number] and found(store, [10], LARGE) == [10]
        assert store.stats().lost == store.stats().corrupt == store.stats().replaced == 0
    assert len(found(Disk(directory), range(30))) == 3 + 2
"""


def test_a_directory_that_is_made_read_only_and_back_is_read_and_then_written_again():
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", PERMITTED, here, os.path.dirname(here)], capture_output=True, text=True, timeout=120
    )
    if "no user without rights" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


def test_a_store_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    fill(Disk(tmp_path), range(3))
    usual = database.quote  # even a directory without permissions is root's to write
    monkeypatch.setattr(database, "quote", lambda path: f"{usual(path)}?mode=ro&instead=")
    store = Disk(tmp_path)
    assert fill(store, [5]) == 0 and found(store, range(6)) == [0, 1, 2] and store.stats().items == 3


def test_a_file_in_the_directorys_place_is_an_error_until_it_is_gone(tmp_path):
    directory = tmp_path / "store"
    store = Disk(directory)
    shutil.rmtree(directory)
    directory.touch()
    assert fill(store, [1]) == 0 and found(store, [1]) == [] and store.stats().errors >= 2
    directory.unlink()
    assert fill(store, [1]) == 1


def test_a_directory_that_can_never_be_made_is_counted_and_said(monkeypatch, tmp_path, caplog):
    def refuse(path, **kwargs):  # as below /proc, where it is not "not permitted" but "no such file"
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr("jaxkv.memo.current.os.makedirs", refuse)
    store = Disk(tmp_path / "store")
    assert fill(store, [1]) == 0 and found(store, [1]) == [] and store.stats().errors == 2
    assert "writing failed: unable to open database file" in caplog.text
    monkeypatch.undo()
    assert fill(store, [1]) == 1 and store.stats().errors == 2


def test_file_descriptors_that_run_out_cost_no_record_and_come_back(tmp_path):
    store = Disk(tmp_path)
    fill(store, range(3)), fill(store, range(10, 12), LARGE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        assert found(store, range(10, 12), LARGE) == [] and fill(store, [20], LARGE) == 0
        found(store, range(3))
        assert fill(store, [21]) in (0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.stats().lost == store.stats().corrupt == 0 < store.stats().errors
    assert found(store, range(3)) == [0, 1, 2] and found(store, range(10, 12), LARGE) == [10, 11]
    assert fill(store, [30, 31]) == 2


LIMITED = """
import os, resource, sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_disk import Disk, fill, found
store = Disk(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
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
    assert (again.stats().corrupt, again.stats().lost, again.stats().replaced) == (0, 0, 0)


def test_whoever_holds_the_database_makes_nobody_wait_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxkv.memo.current._WAIT", 0.0)
    store = Disk(tmp_path)
    fill(store, range(3))
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0], isolation_level=None)) as stopped:
        stopped.execute("begin exclusive")
        assert found(store, range(3)) == [] and fill(store, [5]) == 0 and store.stats().busy >= 2
        stopped.execute("rollback")
    assert found(store, range(3)) == [0, 1, 2] and fill(store, [5]) == 1
    assert (store.stats().errors, store.stats().corrupt, store.stats().replaced) == (0, 0, 0)


def test_a_directory_that_is_removed_or_moved_is_made_again_for_what_is_new(tmp_path):
    directory = tmp_path / "store"
    for take in (shutil.rmtree, lambda path: path.rename(tmp_path / "elsewhere")):
        store, other = Disk(directory), Disk(directory)
        store.describe(key(0)[:16], {"function": "f"})
        fill(store, range(5)), fill(store, [9], LARGE), fill(other, range(5, 8))
        assert found(store, range(8)) == list(range(8))
        take(directory)
        assert found(store, [100]) == [] and found(store, range(8)) == [] and not directory.exists()
        assert fill(store, range(3)) == 3 and fill(store, [9], LARGE) == 1, "at once"
        assert found(store, range(8)) == [0, 1, 2] and found(other, range(8)) == [0, 1, 2]
        assert fill(other, range(8)) == 8 and found(Disk(directory), range(8)) == list(range(8))
        assert store.stats().errors == other.stats().errors == 0
        shutil.rmtree(directory)
    assert found(Disk(tmp_path / "elsewhere"), range(8)) == list(range(8))


def test_a_database_that_another_one_takes_the_place_of_is_followed(tmp_path):
    store, other = Disk(tmp_path / "a"), Disk(tmp_path / "b")
    fill(store, range(5)), fill(other, range(5, 9)), other.close()
    os.replace(files(tmp_path / "b")[0], files(tmp_path / "a")[0])
    assert found(store, range(9)) == [5, 6, 7, 8] and fill(store, range(9)) == 9
    assert found(Disk(tmp_path / "a"), range(9)) == list(range(9)) and store.stats().errors == 0


def test_a_directory_that_something_else_takes_the_place_of_is_left_alone(tmp_path, caplog):
    directory = tmp_path / "store"
    store = Disk(directory)
    fill(store, range(5))
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "thesis.tex").touch()
    assert fill(store, [9]) == 0 and found(store, range(10)) == [] and len(list(directory.iterdir())) == 1
    assert store.stats().errors > 0 and "thesis.tex" in caplog.text
    (directory / "thesis.tex").unlink()
    assert fill(store, [9]) == 1


# --- others, at the worst moment --------------------------------------------------------------------------------------


def between(monkeypatch, where, name: str, others) -> None:
    """Has others act once, as soon as this process comes to a function."""
    usual, waiting = getattr(where, name), [others]

    def hooked(*words, **named):
        if waiting:
            waiting.pop()()
        return usual(*words, **named)

    monkeypatch.setattr(where, name, hooked)


def test_a_database_that_another_process_clears_while_this_one_writes_is_no_error(tmp_path, monkeypatch, caplog):
    store, other = Disk(tmp_path), Disk(tmp_path)
    fill(store, range(5)), found(other, range(5))
    between(monkeypatch, database.Database, "transaction", other.clear)
    assert fill(store, range(5, 9)) == 4 and found(Disk(tmp_path), range(9)) == [5, 6, 7, 8]
    between(monkeypatch, database.Database, "transaction", other.clear)
    assert fill(store, range(3), LARGE) == 0 and found(Disk(tmp_path), range(3), LARGE) == []
    assert fill(store, range(3), LARGE) == 3 and found(Disk(tmp_path), range(3), LARGE) == [0, 1, 2]
    assert (store.stats().errors, store.stats().replaced, caplog.messages) == (0, 0, [])


@pytest.mark.parametrize("where", [(record, "put_aside"), (secrets, "token_hex")])
def test_a_large_record_that_others_clear_around_is_whole_or_not_kept(tmp_path, monkeypatch, caplog, where):
    store, other = Disk(tmp_path), Disk(tmp_path)
    fill(store, [1], LARGE)
    between(monkeypatch, *where, other.clear)
    assert fill(store, [2], LARGE) == 0 and found(store, [1, 2], LARGE) == []
    assert fill(store, [2], LARGE) == 1 and found(other, [1, 2], LARGE) == [2]
    assert counted(store) == store.stats().errors == 0 and caplog.messages == []


def test_a_folder_that_others_remove_while_it_is_made_is_no_error(tmp_path, monkeypatch):
    store, other, usual = Disk(tmp_path), Disk(tmp_path), os.makedirs

    def makedirs(path, **how):
        usual(path, **how)
        if path.endswith("-files"):
            other.clear()
            raise FileExistsError(path)

    monkeypatch.setattr(os, "makedirs", makedirs)
    assert fill(store, [2], LARGE) == 0
    monkeypatch.undo()
    assert fill(store, [2], LARGE) == 1 and store.stats().errors == 0


def test_a_large_record_whose_half_written_file_is_pruned_is_not_kept(tmp_path, monkeypatch):
    store = Disk(tmp_path)
    fill(store, [1], LARGE)

    def pruned(path, mode, **how):
        file = open(path, mode, **how)  # noqa: SIM115
        prune(str(tmp_path), None, (), True, lambda done, total: None) if mode == "xb" else None
        return file

    monkeypatch.setattr(record, "open", pruned, raising=False)
    assert fill(store, [2], LARGE) == 0
    monkeypatch.undo()
    assert fill(store, [2], LARGE) == 1 and found(store, [1, 2], LARGE) == [1, 2]
    assert counted(store) == store.stats().errors == 0 and survey(str(tmp_path)).strays == 0


def test_a_record_that_takes_the_number_of_a_damaged_one_is_not_pruned(tmp_path, monkeypatch):
    store = Disk(tmp_path)
    fill(store, range(3)), fill(store, [9], LARGE)
    files(tmp_path, "-files")[0].unlink()

    def others() -> None:
        store.clear([key(0)[:16]])
        fill(store, range(20, 24), namespace=1)  # the last of them has the number of the one without its file

    between(monkeypatch, upkeep, "unpack", others)
    assert prune(str(tmp_path), None, (), True, lambda done, total: None) == (0, 0)
    assert found(store, range(20, 24), namespace=1) == [20, 21, 22, 23]
    assert verify(str(tmp_path), lambda done, total: None) == (4, [])


def test_a_store_that_is_cleared_while_it_is_pruned_is_no_error(tmp_path, monkeypatch):
    store = Disk(tmp_path)
    fill(store, range(50), 1000)
    between(monkeypatch, database.Database, "remove", store.clear)
    assert prune(str(tmp_path), 40_000, [key(0)[:16]], True, lambda done, total: None) == (0, 0)
    assert fill(store, range(5)) == 5 and found(store, range(5)) == list(range(5))


@pytest.mark.parametrize("clear", ["all", "namespace"])
def test_a_large_record_that_others_remove_while_this_process_reads_it_is_not_lost(tmp_path, monkeypatch, clear):
    store, other = Disk(tmp_path), Disk(tmp_path)
    fill(store, range(3), LARGE)

    def others():
        other.clear(None if clear == "all" else [key(0)[:16]])
        fill(other, range(10, 20))

    between(monkeypatch, record, "unpack", others)
    assert found(store, range(3), LARGE) == [] and found(store, range(10, 20)) == list(range(10, 20))
    assert counted(store) == store.stats().errors == 0


def test_clear_and_prune_remove_what_lower_numbers_left(tmp_path):
    for remove in ("clear", "prune"):
        old, store = tmp_path / f"old-{remove}", Disk(tmp_path / remove)
        Disk(old), fill(store, range(5)), fill(store, [9], LARGE)
        shutil.copy(files(old)[0], tmp_path / remove / "memo-v1-000002.db")  # of one killed while it took over
        newer = Disk(tmp_path / remove)
        fill(newer, range(5, 8))
        if remove == "clear":
            store.clear()
        else:
            assert survey(str(tmp_path / remove)).strays > LARGE
            prune(str(tmp_path / remove), None, (), True, print)
            assert survey(str(tmp_path / remove)).strays == 0
        assert found(store, range(9)) == found(newer, range(9)) == ([] if remove == "clear" else [5, 6, 7])
        assert not [path for path in (tmp_path / remove).iterdir() if "000001" in path.name]


@pytest.mark.parametrize("trouble", ["full", "held"])
def test_a_damaged_database_that_cannot_be_taken_over_is_gone_all_the_same(tmp_path, monkeypatch, trouble):
    store = Disk(tmp_path)
    fill(store, range(50), 1000), fill(store, [50], LARGE)
    with open(files(tmp_path)[0], "r+b") as file:
        file.truncate(15 * 4096)
    with contextlib.closing(sqlite3.connect(files(tmp_path)[0], isolation_level=None)) as holder:

        def hold():
            holder.execute("pragma writable_schema=on"), holder.execute("begin exclusive")

        def rescue(self, old):
            self.execute(f"pragma max_page_count={2 + self.tell('pragma page_count')}")
            hold() if trouble == "held" else None
            usual(self, old)

        usual = database.Database.rescue
        monkeypatch.setattr(database.Database, "rescue", rescue)
        connect = sqlite3.connect
        monkeypatch.setattr(
            "sqlite3.connect", lambda *words, **named: waits.append(named["timeout"]) or connect(*words, **named)
        )
        waits: list[float] = []
        found(store, range(50), 1000)
        assert waits and max(waits) <= 0.1, "seconds that a process which is stopped holds up others"
    assert [path.name for path in files(tmp_path)] == ["memo-v1-000002.db"] and store.stats().errors == 1
    monkeypatch.undo()
    store.close()
    assert fill(store, range(50), 1000) == 50 and found(store, range(50), 1000) == list(range(50))


@pytest.mark.parametrize("name", ["room_taken", "with_keys", "now", "executemany", "execute"])
def test_ctrl_c_within_a_batch_leaves_all_of_it_or_nothing(tmp_path, monkeypatch, name):
    store = Disk(tmp_path, budget=10**7)
    fill(store, range(3)), fill(store, [9], LARGE)
    real = getattr(database.Database, name)
    for turn in range(30 if name == "execute" else 3):
        left = [turn]

        def interrupted(*args, left=left):
            done = real(*args)
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return done

        with monkeypatch.context() as patch:
            patch.setattr(database.Database, name, interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                fill(store, [100, 101], LARGE)
        there = found(store, [100, 101], LARGE)
        assert there in ([], [100, 101]) and len(files(tmp_path, "-files")) == 1 + len(there)
        assert found(store, range(3)) == [0, 1, 2] and fill(store, [100, 101], LARGE) == 2
        store.clear([bytes(16)])
        assert fill(store, range(3)) == 3 and fill(store, [9], LARGE) == 1


# --- a loss of power ---


def mixed(before: Path, after: Path, directory: Path, chance: random.Random) -> None:
    """A store of which some pages are as before, and others as after: nobody had waited for the disk."""
    share = chance.random()
    for path in {path.relative_to(place) for place in (before, after) for path in place.rglob("*") if path.is_file()}:
        states = [place / path for place in (before, after)]
        if chance.choice(states).exists():
            old, new = (state.read_bytes() if state.exists() else b"" for state in states)
            size = len(chance.choice([old, new]))
            pages = [(old, new)[chance.random() < share][at : at + 4096] for at in range(0, size, 4096)]
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(b"".join(page.ljust(4096, b"\0") for page in pages)[:size])


@pytest.mark.parametrize("deed", ["write", "evict", "clear"])
def test_a_loss_of_power_at_any_statement_leaves_right_values_or_none(tmp_path, monkeypatch, deed):
    """All that had been written before is there, or some of it: which pages came to the disk is anybody's guess."""
    kept, lost, chance = tmp_path / "kept", [], random.Random(deed)
    policy = {"budget": 120_000, "policy": "lru"} if deed == "evict" else {}
    store = Disk(kept, **policy)
    fill(store, SOME, 1000), fill(store, [100], LARGE), store.close()
    usual = database.Database.execute
    for turn in range(200 if FULL else 25):
        directory, before, after = (tmp_path / f"{name}-{turn}" for name in ("store", "before", "after"))
        shutil.copytree(kept, directory)
        store, statements = Disk(directory, **policy), iter(range(chance.randrange(3, 40)))

        def until(self, *words, left=statements, here=directory, there=after):
            done = usual(self, *words)
            if next(left, None) is None and not there.exists():
                shutil.copytree(here, there)
            return done

        shutil.copytree(directory, before)
        monkeypatch.setattr(database.Database, "execute", until)
        for first in range(200, 260, 12):
            fill(store, range(first, first + 12), 1000), fill(store, [first], LARGE, namespace=1)
            store.clear([key(0)[:16]]) if deed == "clear" else None
        monkeypatch.setattr(database.Database, "execute", usual)
        store.close(), shutil.rmtree(directory), directory.mkdir()
        mixed(before, after, directory, chance)
        again = Disk(directory)
        lost.append(COUNT + 1 - len(found(again, SOME, 1000)) - len(found(again, [100], LARGE)))
        found(again, range(200, 260), 1000)
        works_again(directory, again)
    assert deed != "write" or sum(lost) < len(lost) * COUNT // 2


# --- killed processes ------------------------------------------------------------------------------------------------

KILLED = """
import dataclasses, json, os, random, signal, sys, time
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_disk import Disk, fill, found
directory, rounds, chance = sys.argv[1], int(sys.argv[4]), random.Random(int(sys.argv[5]))
SIZE = int(sys.argv[7])
settings = json.loads(sys.argv[6])

def write_on(first, pipe):
    store = Disk(directory, **settings)
    while True:
        if fill(store, range(first, first + 7), SIZE) == 7:  # the other writer may hold the database
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
    said += [int.from_bytes(os.read(pipe, 8), "big") for pipe in pipes]
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


def killed(directory: Path, rounds: int, size: int = 3000, **settings) -> dict[str, int]:
    """Kills two writers beside a reader, again and again; returns what is known of the store afterwards."""
    here = os.path.dirname(__file__)
    words = [str(directory), here, os.path.dirname(here), str(rounds), "0", json.dumps(settings), str(size)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lost"] == result["errors"] == result["corrupt"] == result["replaced"] == 0
    prune(str(directory), None, (), True, print)
    assert verify(str(directory), print)[1] == []
    return result


@pytest.mark.slow
@pytest.mark.parametrize("size", [3000, LARGE])
def test_killed_writers_lose_nothing_that_they_had_written(tmp_path, size):
    result = killed(tmp_path / "store", 20, size)
    assert result["there"] == result["said"] >= 14 * 20


@pytest.mark.slow
def test_writers_killed_while_they_make_room_keep_the_budget_and_harm_nothing(tmp_path):
    budget, batch = 2_000_000, 2 * 7 * 2 * 4096  # of two writers
    result = killed(tmp_path / "store", 15, budget=budget, policy="fifo")
    assert result["there"] < result["said"]
    assert result["nbytes"] <= budget + batch
