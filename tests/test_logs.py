"""The logger `jaxkv`: silent about itself unless the environment says so."""

from __future__ import annotations

import logging

import pytest

from jaxkv import logs


@pytest.fixture(autouse=True)
def _as_it_was():
    log = logs.log
    before = log.handlers, log.level, log.propagate
    yield
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = before[0], before[2]
    log.setLevel(before[1])


def test_without_variables_nothing_is_configured():
    before = list(logs.log.handlers), logs.log.level, logs.log.propagate
    logs.configure({})
    assert (logs.log.handlers, logs.log.level, logs.log.propagate) == before


def test_level_format_date_and_file(tmp_path):
    path = tmp_path / "some.log"
    path.write_text("old\n")
    said = {"LEVEL": "info", "FILE": str(path), "FMT": "%(asctime)s|%(levelname)s|%(message)s", "DATEFMT": "%Y"}
    logs.configure({f"JAXKV_LOG_{name}": value for name, value in said.items()})
    logging.getLogger("jaxkv").info("seen")
    logging.getLogger("jaxkv").debug("not seen")
    old, new = path.read_text().splitlines()
    assert old == "old"
    year, level, message = new.split("|")
    assert len(year) == 4 and (level, message) == ("INFO", "seen")


def test_every_field_of_a_record_may_be_in_the_format(capsys):
    logs.configure(
        {"JAXKV_LOG_FMT": "%(levelno)d %(created)f %(lineno)d %(process)d %(thread)d %(funcName)s %(message)s"}
    )
    logs.log.warning("seen")
    assert capsys.readouterr().err.endswith(" test_every_field_of_a_record_may_be_in_the_format seen\n")


def test_the_default_format_names_the_library(capsys):
    logs.configure({"JAXKV_LOG_LEVEL": "WARNING"})
    logs.log.warning("careful")
    line = capsys.readouterr().err
    assert line.startswith("[jaxkv] - ") and line.endswith(" - jaxkv - WARNING - careful\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEVEL", "loud"),
        ("FMT", "%(nothing"),
        ("FMT", "%(nope)s"),
        ("FMT", "%(message)d"),
        ("DATEFMT", "\0"),
        ("FILE", "/nowhere/at/all.log"),
    ],
)
def test_what_cannot_be_followed_is_said_and_the_rest_works(name, value, capsys):
    logs.configure({f"JAXKV_LOG_{name}": value})
    assert f"JAXKV_LOG_{name}: " in capsys.readouterr().err
    logs.log.warning("still %s", "here")
    line = capsys.readouterr().err
    assert line.endswith("WARNING - still here\n") and line.count("\n") == 1
