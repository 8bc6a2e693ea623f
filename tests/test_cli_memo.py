"""`jaxkv memo`, as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_disk import SIZE, files, fill, found, key
from test_disk_faults import flip

from jaxkv.cli import main
from jaxkv.memo import upkeep
from jaxkv.memo.catalog import record_bytes
from jaxkv.memo.disk import Disk
from jaxkv.memo.prune import prune
from jaxkv.memo.record import HEADER_BYTES
from jaxkv.sizes import format_bytes

ABOUT = {
    "function": "backbone.apply",
    "version": "2",
    "inputs": [{"path": "x", "dtype": "float32", "shape": [3, 224, 224]}],
    "outputs": [{"path": "", "dtype": "float32", "shape": [1024]}, {"path": "mask", "dtype": "bool", "shape": []}],
}


TWO = f"{key(0, 2)[:16].hex()}, {key(0, 1)[:16].hex()}"


@pytest.fixture
def directory(tmp_path):
    """Four segments: 20 items of a described function, then 20 of another one."""
    store = Disk(tmp_path / "features", segment_bytes=10 * (HEADER_BYTES + SIZE))
    for namespace in (1, 2):
        fill(store, range(20), namespace=namespace)
    store.describe(key(0, 1)[:16], lambda: ABOUT)
    store.close()
    return tmp_path / "features"


def there(directory: Path) -> list[int]:
    """How many items of each function are found."""
    store = Disk(directory)
    return [len(found(store, range(20), namespace=namespace)) for namespace in (1, 2)]


def test_ls_says_whose_outputs_are_there(directory, capsys):
    assert main(["memo", "ls", str(directory)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert (
        err == "" and len(lines) == 3 and lines[0].split() == ["namespace", "items", "size", "last", "used", "function"]
    )
    described = "backbone.apply, version 2: x float32[3,224,224] -> float32[1024], mask bool[]"
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{'0' * 12}     20  4.4 KiB  {date}  not described", lines[1]), "it was written last"
    assert re.fullmatch(f"{'0' * 12}     20  4.4 KiB  {date}  {re.escape(described)}", lines[2])


def test_ls_shows_first_what_was_used_last(directory, capsys, monkeypatch):
    for path in files(directory, ".idx")[2:]:
        os.utime(path, (1, 1))
    os.utime(files(directory, ".idx")[1], (946684800, 946684800))  # 2000-01-01 in UTC
    os.utime(files(directory, ".idx")[0], ns=(0, -(2**62)))
    Disk(directory).describe(key(0, 3)[:16], dict)
    os.utime(files(directory, ".json")[-1], (2**33, 2**33))  # no records: the time of its description counts
    found = upkeep.survey(str(directory))
    assert [space.key[-1] for space in found.namespaces] == [3, 1, 2]
    far = dataclasses.replace(found.namespaces[0], used=2**90)
    assert main(["memo", "ls", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r" 0 B  2242-\d\d-\d\d", lines[1]) and re.search("  (1999-12-31|2000-01-01) .*apply", lines[2])
    monkeypatch.setattr(upkeep, "survey", lambda _: dataclasses.replace(found, namespaces=(far,)))
    assert main(["memo", "ls", str(directory)]) == 0
    assert re.search(r"0 B  \?  ", capsys.readouterr().out), "no calendar has that time"


def test_ls_of_one_file_shows_first_what_was_written_last(tmp_path):
    store = Disk(tmp_path)
    for namespace in (2, 3, 1):
        fill(store, [1], namespace=namespace)
    assert [space.key[-1] for space in upkeep.survey(str(tmp_path)).namespaces] == [1, 3, 2]


def test_ls_cuts_lines_on_a_terminal_only(directory, capsys, monkeypatch):
    inputs = ", ".join(f"x{number}: float32[224,224,3]" for number in range(20)) + ", pool: 'max'"
    files(directory, ".json")[0].write_text(json.dumps({"function": "f", "inputs": inputs, "outputs": []}))
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["memo", "ls", str(directory)]) == 0
    out, err = capsys.readouterr()
    assert f"f: {inputs} -> nothing\n" in out and err == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["memo", "ls", str(directory)]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) == 90 and out.count("...\n") == 1
    assert err == "jaxkv: lines are cut to the terminal's width; in a file or a pipe they are whole\n"


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"function": 3, "inputs": 4, "outputs": [1, {"shape": "x"}]}', ""])
def test_ls_takes_whatever_a_description_says(directory, text, capsys):
    files(directory, ".json")[0].write_text(text)
    assert main(["memo", "ls", str(directory)]) == 0
    assert "4.4 KiB" in capsys.readouterr().out


def test_ls_prints_nothing_that_a_terminal_obeys(directory, capsys):
    files(directory, ".json")[0].write_text('{"function": "\\u001b[2J\\nf"}')
    assert main(["memo", "ls", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(out.splitlines()) == 3


def test_stat_says_what_there_is_and_what_could_be_won(directory, capsys):
    assert main(["memo", "stat", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "items       40 of 2 namespaces\n" in out and "segments    4, 0 being written to\n" in out
    assert "can be won  0 B\n" in out
    writer = Disk(directory)
    fill(writer, [100])
    with open(files(directory)[0], "ab") as file:
        file.write(bytes(100))
    (directory / "000000000009-0123456789abcdef.idx").write_bytes(bytes(50))
    assert main(["memo", "stat", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "segments    5, 1 being written to\n" in out
    assert "torn        100 B\n" in out and "left over   50 B\n" in out
    assert "can be won  150 B, by prune --damaged\n" in out


def test_verify_finds_each_damaged_record(directory, capsys):
    assert main(["memo", "verify", str(directory)]) == 0
    assert capsys.readouterr().out == "40 records whole, 0 damaged places\n"
    segment = files(directory)[1]
    flip(segment, 8 * (HEADER_BYTES + 5))  # a payload
    flip(segment, 8 * (2 * (HEADER_BYTES + SIZE) + 9))  # a header
    assert main(["memo", "verify", str(directory)]) == 1
    out, err = capsys.readouterr()
    assert f"{segment}: at 0: damaged record, of namespace {'0' * 12}\n" in out
    assert f"{segment}: at {2 * (HEADER_BYTES + SIZE)}: damaged record" in out
    assert "38 records whole, 2 damaged places\n" in out and "count as misses" in err


def test_prune_damaged_removes_what_verify_found_and_nothing_else(directory, capsys):
    flip(files(directory)[1], 8 * (HEADER_BYTES + 5))
    files(directory, ".idx")[2].unlink()
    with open(files(directory)[3], "r+b") as file:
        file.truncate(1000)
    (directory / "FORMAT.0123.tmp").touch()
    (directory / "000000000009-0123456789abcdef.seg").touch()
    assert main(["memo", "verify", str(directory)]) == 1
    capsys.readouterr()
    assert main(["memo", "prune", str(directory), "--damaged"]) == 0
    assert re.search(r"now; removed: 0 items, \d+ damaged places\n$", capsys.readouterr().out)
    assert main(["memo", "verify", str(directory)]) == 0
    assert capsys.readouterr().out == "34 records whole, 0 damaged places\n"
    assert there(directory) == [19, 15] and not files(directory, ".tmp") and len(files(directory)) == 4


def test_prune_to_a_size_keeps_what_was_used_last(directory, capsys):
    Disk(directory, policy="lru").read([key(0, 1)], SIZE)  # the first segment
    size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix not in (".seg", ".idx"))
    assert main(["memo", "prune", str(directory), "--to", str(size + 23 * record_bytes(SIZE))]) == 0
    assert "; removed: 17 items\n" in capsys.readouterr().out
    assert there(directory) == [10, 13]
    assert sum(path.stat().st_size for path in directory.iterdir()) <= size + 23 * record_bytes(SIZE)


@pytest.mark.parametrize("size", ["0", "5"])
def test_prune_to_less_than_what_says_that_it_is_a_store_is_done_when_all_records_are_gone(directory, size, capsys):
    assert main(["memo", "prune", str(directory), "--to", size]) == 0
    out, err = capsys.readouterr()
    assert "; removed: 40 items\n" in out and err == "jaxkv: what says that this is a store, 22 B, stays\n"
    assert there(directory) == [0, 0] and not files(directory)
    assert main(["memo", "prune", str(directory), "--to", size]) == 0, "there is nothing to do"
    assert capsys.readouterr().out == "22 B before, 22 B now; removed: 0 items\n"


def test_prune_that_leaves_too_much_says_who_is_in_the_way(directory, capsys):
    writer = Disk(directory)
    fill(writer, range(100, 105), namespace=1)
    assert main(["memo", "prune", str(directory), "--to", "5"]) == 1
    assert "; run it again when those programs have ended\n" in capsys.readouterr().err
    writer.close()
    (directory / "000000000009-0123456789abcdef.idx").write_bytes(bytes(50))
    assert main(["memo", "prune", str(directory), "--to", "5"]) == 1
    assert capsys.readouterr().err == "jaxkv: this is more than 5 B; --damaged removes what is left over\n"
    assert main(["memo", "prune", str(directory), "--to", "5", "--damaged"]) == 0


def test_prune_of_a_namespace_leaves_the_others(directory, capsys):
    assert main(["memo", "prune", str(directory), "--namespace", key(0, 2)[:16].hex()]) == 0
    assert "; removed: 20 items\n" in capsys.readouterr().out
    assert there(directory) == [20, 0]
    assert main(["memo", "prune", str(directory), "--namespace", "0000"]) == 0  # now it is the only one
    assert there(directory) == [0, 0] and not files(directory, ".json")


def test_prune_leaves_what_is_being_written_and_says_so(directory, capsys):
    writer, reader = Disk(directory), Disk(directory)
    fill(writer, range(100, 105), namespace=1)
    assert main(["memo", "prune", str(directory), "--to", "2KB"]) == 0
    assert "jaxkv: left alone, because a program is writing to it: 1 segment\n" in capsys.readouterr().err
    assert found(reader, range(100, 105), namespace=1) == list(range(100, 105))
    assert fill(writer, [105], namespace=1) == 1 and found(reader, [105], namespace=1) == [105]


def test_copies_that_were_replaced_are_called_so_and_can_go_alone(directory, capsys):
    first, second = Disk(directory), Disk(directory)
    fill(first, [50]), fill(second, [51])
    first.read([key(99)], SIZE)  # it knows what the second one wrote
    second._catalog.places.clear()
    fill(second, range(20), namespace=1)
    first.close(), second.close()
    assert upkeep.survey(str(directory)).copies == 20 * record_bytes(SIZE)
    taken = format_bytes(20 * record_bytes(SIZE))
    assert main(["memo", "stat", str(directory)]) == 0
    out = capsys.readouterr().out
    assert f"replaced    {taken}\n" in out and "torn        0 B\n" in out
    assert f"can be won  {taken}, by prune --replaced\n" in out
    assert main(["memo", "prune", str(directory), "--replaced"]) == 0
    assert capsys.readouterr().out.endswith("; removed: 0 items, 20 replaced\n")
    assert upkeep.survey(str(directory)).copies == 0 and there(directory) == [20, 20]


def test_what_can_be_won_is_what_prune_removes_while_others_write(directory, capsys):
    writer = Disk(directory)
    writer._catalog.places.clear()
    fill(writer, range(20), namespace=1)  # the older copies are sealed, and can go; these can't
    assert upkeep.survey(str(directory)).copies == 20 * record_bytes(SIZE)
    before = upkeep.survey(str(directory)).nbytes
    done = prune(str(directory))
    assert (before - done.after, done.copies, done.items) == (20 * record_bytes(SIZE), 20, 0)
    assert upkeep.survey(str(directory)).copies == 0 and there(directory) == [20, 20]


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from jaxkv.memo.prune import prune
left = int(sys.argv[4])
for name in ("writev", "rename", "unlink", "open", "fsync"):
    def counted(*args, real=getattr(os, name), **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(os, name, counted)
prune(sys.argv[1], namespaces=[bytes(15) + bytes([1])], damaged=True)
"""


@pytest.mark.slow
def test_prune_that_is_killed_at_any_step_loses_nothing(directory):
    """In a child forked for each step; here only three of them, with JAXKV_FULL=1 all."""
    full = bool(os.environ.get("JAXKV_FULL"))
    here = os.path.dirname(__file__)
    for step in range(60) if full else (7, 12, 19):
        store = Disk(directory)
        fill(store, range(20), namespace=1), fill(store, [step], namespace=3)
        store.close()
        words = [sys.executable, "-c", KILLED, str(directory), here, os.path.dirname(here), str(step)]
        subprocess.run(words, check=False)
        assert there(directory)[1] == 20 and len(found(Disk(directory), [step], namespace=3)) == 1
    prune(str(directory), namespaces=[key(0, 1)[:16]], damaged=True)
    assert there(directory) == [0, 20] and upkeep.verify(str(directory)).damages == ()
    assert upkeep.survey(str(directory)).strays == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls"], "the following arguments are required: DIR; see jaxkv memo ls --help"),
        (["ls", ""], "the path of the store is empty; give the directory that was named as disk="),
        (["ls", "nowhere"], "nowhere does not exist; give the directory that was named as disk="),
        (["stat", "features/FORMAT"], "features/FORMAT is a file, no directory; give the directory that was named as"),
        (["verify", "empty"], "empty is not a store of a memo, it is empty; give the directory that was named as"),
        (["ls", "."], ". is not a store of a memo, it holds other files, such as 'empty'; give the directory that was"),
        (["prune", ".", "--to", "5"], "named as disk=: is it ./features?"),
        (["prune", "features"], "say what to remove: --to SIZE, --namespace NAME, --damaged or --replaced"),
        (["prune", "features", "--to", "8 bits"], "'8 bits' is not a size; give one such as 8GB"),
        (["prune", "features", "--to", "-1"], "'-1' is not a size; give one such as 8GB"),
        (["prune", "features", "--namespace", "f00"], f"no namespace begins with 'f00'; there are {TWO}"),
        (["prune", "features", "--namespace", "00"], f"2 namespaces begin with '00'; give more of it: {TWO}"),
        (["prune", "features", "--namespace", ""], f"2 namespaces begin with ''; give more of it: {TWO}"),
        (["look", "features"], "invalid choice: 'look' (choose from"),
        ([], "the following arguments are required: {ls,stat,verify,prune}; see jaxkv memo --help"),
    ],
)
def test_wrong_use_is_one_line_with_the_cure_and_status_2(directory, words, message, capsys, monkeypatch):
    monkeypatch.chdir(directory.parent)
    Path("empty").mkdir()
    try:
        status = main(["memo", *words])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.startswith("jaxkv: error: ") and err.count("\n") == 1
    assert message in err and there(directory) == [20, 20]


def test_two_prunes_at_once_are_one_too_many(directory, capsys):
    from jaxkv.memo.segment import Handle, lock

    with Handle(str(directory / "lock"), os.O_RDWR | os.O_CREAT) as handle:
        assert lock(handle)
        assert main(["memo", "prune", str(directory), "--to", "1"]) == 1
        assert "another process is removing files of" in capsys.readouterr().err
        store = Disk(directory, budget=9000, policy="lru")
        assert fill(store, range(100, 120)) < 20, "nobody waits for the lock"
    assert there(directory) == [20, 20]


@pytest.mark.parametrize("words", [[], ["ls"], ["stat"], ["verify"], ["prune"]])
def test_help_fits_a_terminal_and_shows_examples(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main(["memo", *words, "--help"])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 104 and "  jaxkv memo " in out
