"""`jaxkv memo`, as a user meets it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_disk import SIZE, files, fill, found, key, taken

from jaxkv.cli import main
from jaxkv.memo import upkeep
from jaxkv.memo.disk import Disk
from jaxkv.memo.record import LARGE
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
    """20 items of a described function, then 20 of another one."""
    store = Disk(tmp_path / "features")
    store.describe(key(0, 1)[:16], ABOUT)
    for namespace in (1, 2):
        fill(store, range(20), namespace=namespace)
    store.close()
    return tmp_path / "features"


def change(directory: Path, statement: str, *values) -> None:
    with contextlib.closing(sqlite3.connect(files(directory)[0])) as db, db:
        db.execute(statement, values)


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
    assert re.fullmatch(f"{'0' * 12}     20  1.9 KiB  {date}  not described", lines[1]), "it was written last"
    assert re.fullmatch(f"{'0' * 12}     20  1.9 KiB  {date}  {re.escape(described)}", lines[2])


def test_ls_shows_first_what_was_used_last(directory, capsys):
    fill(Disk(directory), [1], namespace=3)
    change(directory, "update items set used = 946684800000000000 where rowid <= 20")  # 2000-01-01 in UTC
    change(directory, "update items set used = ? where rowid > 40", 2**61)
    assert [space.key[-1] for space in upkeep.survey(str(directory)).namespaces] == [3, 2, 1]
    assert main(["memo", "ls", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r" 96 B  2043-\d\d-\d\d", lines[1]) and re.search("  (1999-12-31|2000-01-01) .*apply", lines[3])
    change(directory, "update items set used = ? where rowid > 40", 2**63 - 1), change(directory, "delete from labels")
    change(directory, "update items set used = 'yesterday' where rowid <= 20")
    assert main(["memo", "ls", str(directory)]) == 0


def test_ls_cuts_lines_on_a_terminal_only(directory, capsys, monkeypatch):
    inputs = ", ".join(f"x{number}: float32[224,224,3]" for number in range(20)) + ", pool: 'max'"
    change(directory, "update labels set about = ?", json.dumps({"function": "f", "inputs": inputs, "outputs": []}))
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
    change(directory, "update labels set about = ?", text)
    assert main(["memo", "ls", str(directory)]) == 0
    assert "1.9 KiB" in capsys.readouterr().out


def test_ls_prints_nothing_that_a_terminal_obeys(directory, capsys):
    change(directory, "update labels set about = ?", '{"function": "\\u001b[2J\\nf"}')
    assert main(["memo", "ls", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(out.splitlines()) == 3


def test_stat_says_what_there_is_what_there_may_be_and_what_is_left_over(directory, capsys, monkeypatch):
    fill(Disk(directory), [50], LARGE)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=(10 << 30) - taken(directory)))
    assert main(["memo", "stat", str(directory)]) == 0
    out = capsys.readouterr().out
    size = format_bytes(taken(directory))
    budget = "5.0 GiB now, unless a memo is given a disk_budget (50% of this size and of what is free)"
    assert out == f"size        {size}\nitems       41 of 3 namespaces\nbudget      {budget}\nleft over   0 B\n"
    (directory / "memo-v1-000001.db-files" / "0123.partial").write_bytes(bytes(50))
    assert main(["memo", "stat", str(directory)]) == 0
    assert "left over   50 B, which prune --damaged removes\n" in capsys.readouterr().out


def test_verify_finds_each_damaged_record(directory, capsys):
    assert main(["memo", "verify", str(directory)]) == 0
    assert capsys.readouterr().out == "40 records whole, 0 damaged places\n"
    change(directory, "update items set payload = zeroblob(96) where rowid = 7")
    fill(Disk(directory), [50], LARGE)
    files(directory, "-files")[0].unlink()
    assert main(["memo", "verify", str(directory)]) == 1
    out, err = capsys.readouterr()
    assert "record 7: damaged\n" in out and "record 41: [Errno 2] No such file" in out
    assert "39 records whole, 2 damaged places\n" in out and "count as misses" in err
    assert main(["memo", "prune", str(directory), "--damaged"]) == 0
    assert re.search(r"now; removed: 0 items, 2 damaged places\n$", capsys.readouterr().out)
    assert main(["memo", "verify", str(directory)]) == 0
    assert capsys.readouterr().out == "39 records whole, 0 damaged places\n"
    assert there(directory) == [19, 20]


def test_a_database_that_is_damaged_is_said_with_what_will_become_of_it(directory, capsys):
    path = files(directory)[0]
    for page in range(1, path.stat().st_size // 4096):
        with open(path, "r+b") as file:
            file.seek(4096 * page)
            file.write(b"\xff" * 4096)
    for words in (["ls"], ["stat"], ["prune", "--damaged"]):
        assert main(["memo", words[0], str(directory), *words[1:]]) == 1
        err = capsys.readouterr().err
        assert "is malformed; the next program that uses it goes on with a new one" in err and err.count("\n") == 1
    assert fill(Disk(directory), range(3)) == 3 and main(["memo", "ls", str(directory)]) == 0


def test_prune_to_a_size_keeps_what_was_used_last(directory, capsys):
    fill(Disk(directory), range(100, 120), 4000)
    Disk(directory, policy="lru").read([key(0, 1)], SIZE)
    size = upkeep.survey(str(directory)).nbytes - 50_000
    assert main(["memo", "prune", str(directory), "--to", str(size)]) == 0
    assert taken(directory) <= size and there(directory)[0] == 1
    assert len(found(Disk(directory), range(100, 120), 4000)) > 5
    reader = Disk(directory)
    fill(reader, [200], LARGE), fill(reader, range(3))
    assert main(["memo", "prune", str(directory), "--to", "48KiB"]) == 0
    assert files(directory, "-files") == [] and found(reader, range(3)) == [0, 1, 2], "while others use it"


@pytest.mark.parametrize("size", ["0", "5"])
def test_prune_to_less_than_an_empty_database_is_done_when_all_records_are_gone(directory, size, capsys):
    assert main(["memo", "prune", str(directory), "--to", size]) == 0
    out, err = capsys.readouterr()
    assert "; removed: 40 items\n" in out and err == "jaxkv: the empty database, 32.0 KiB, stays\n"
    assert there(directory) == [0, 0] and upkeep.survey(str(directory)).namespaces == []
    assert main(["memo", "prune", str(directory), "--to", size]) == 0, "there is nothing to do"
    assert capsys.readouterr().out == "32.0 KiB before, 32.0 KiB now; removed: 0 items\n"


def test_prune_that_leaves_too_much_says_why(directory, capsys):
    folder = directory / "memo-v1-000001.db-files"
    folder.mkdir()
    (folder / "0123.partial").write_bytes(bytes(50))
    assert main(["memo", "prune", str(directory), "--to", "5"]) == 1
    assert capsys.readouterr().err == "jaxkv: this is more than 5 B; --damaged removes bytes that belong to no item\n"
    assert main(["memo", "prune", str(directory), "--to", "5", "--damaged"]) == 0 and not list(folder.iterdir())


def test_prune_of_a_namespace_leaves_the_others(directory, capsys):
    assert main(["memo", "prune", str(directory), "--namespace", key(0, 2)[:16].hex()]) == 0
    assert "; removed: 20 items\n" in capsys.readouterr().out
    assert there(directory) == [20, 0]
    assert main(["memo", "prune", str(directory), "--namespace", "0000"]) == 0  # now it is the only one
    assert there(directory) == [0, 0]


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from jaxkv.memo import upkeep
left = int(sys.argv[4])
class Counted(database.Database):
    def execute(self, *args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*args)
upkeep.Database = Counted
upkeep.prune(sys.argv[1], None, [bytes(15) + bytes([1])], True, print)
"""


@pytest.mark.slow
def test_prune_that_is_killed_at_any_step_loses_nothing(directory):
    """In a process for each step; here only three of them, with JAXKV_FULL=1 all."""
    full = bool(os.environ.get("JAXKV_FULL"))
    here = os.path.dirname(__file__)
    for step in range(60) if full else (22, 30):
        store = Disk(directory)
        fill(store, range(20), namespace=1), fill(store, [step], namespace=3)
        store.close()
        words = [sys.executable, "-c", KILLED, str(directory), here, os.path.dirname(here), str(step)]
        subprocess.run(words, check=False)
        assert there(directory)[1] == 20 and len(found(Disk(directory), [step], namespace=3)) == 1
    upkeep.prune(str(directory), None, [key(0, 1)[:16]], True, print)
    assert there(directory) == [0, 20] and upkeep.verify(str(directory), print)[1] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls"], "the following arguments are required: DIR; see jaxkv memo ls --help"),
        (["ls", ""], "'': No such file or directory; give the disk= directory of a memo"),
        (["ls", "nowhere"], "'nowhere': No such file or directory; give the disk= directory of a memo"),
        (
            ["stat", "features/memo-v1-000001.db"],
            ".db': Not a directory; give the disk= directory of a memo",
        ),
        (["verify", "empty"], "'empty': it holds no store of a memo; give the disk= directory of a memo"),
        (["ls", "."], ". holds other files, such as 'empty'; give"),
        (
            ["stat", "old"],
            "old holds what an earlier jaxkv kept, which this one does not read; give another directory",
        ),
        (["prune", "features"], "choose what to remove: --to SIZE, --namespace NAME or --damaged"),
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
    Path("empty").mkdir(), Path("old").mkdir(), Path("old/FORMAT").touch()
    try:
        status = main(["memo", *words])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.startswith("jaxkv: error: ") and err.count("\n") == 1
    assert message in err and there(directory) == [20, 20]


def test_a_program_that_holds_the_database_is_waited_for_and_named(directory, capsys, monkeypatch):
    monkeypatch.setattr(upkeep, "_WAIT", 0.0)
    with contextlib.closing(sqlite3.connect(files(directory)[0], isolation_level=None)) as other:
        other.execute("begin exclusive")
        assert main(["memo", "prune", str(directory), "--to", "1"]) == 1
        assert "is locked; try again when the program that writes to it is done" in capsys.readouterr().err
    assert there(directory) == [20, 20]


@pytest.mark.parametrize("words", [[], ["ls"], ["stat"], ["verify"], ["prune"]])
def test_help_fits_a_terminal_and_shows_examples(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main(["memo", *words, "--help"])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 104 and "  jaxkv memo " in out
