"""What the benchmarks share: turns, medians, and what is said about machine and versions.

A machine drifts by more than most differences are worth, so contestants take turns in one run, medians are compared,
and only ratios of one run are quoted.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed: import this module before jaxkv


def earlier(place: pathlib.Path) -> Any:
    """Returns the package jaxkv of another folder, beside this one's: for comparisons in one run."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "jaxkv"}
    sys.path.insert(0, str(place.resolve()))
    try:
        package = importlib.import_module("jaxkv")
        importlib.import_module("jaxkv.memo.disk")
        if place.resolve() not in pathlib.Path(package.__file__).parents:
            raise ValueError(f"{place} holds no jaxkv; give the folder that the package lies in")
        return package
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == "jaxkv"]:
            del sys.modules[name]
        sys.modules.update(ours)


def in_turn(names: list[str], turn: int) -> list[str]:
    """The contestants, starting with another one each turn, so that none always runs after the same one."""
    start = turn % max(len(names), 1)
    return names[start:] + names[:start]


def interleave(runs: dict[str, Callable[[int], float]], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns milliseconds per step of each contestant, one number per round.

    Args:
      runs: name -> function that runs so many steps and returns the seconds they took.
      rounds: how often each has its turn.
      seconds: about how long one turn lasts; at least one step is run.
    """
    steps = {}
    for name, run in runs.items():
        run(1)  # compiles, touches memory
        steps[name] = max(1, min(1000, int(seconds / max(run(2) / 2, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in in_turn(list(runs), turn):
            runs[name](1)  # the caches, and the threads of whoever ran before, settle
            times[name].append(1e3 * runs[name](steps[name]) / steps[name])
    return times


def timed(function: Callable[[], Any], before: Callable[[], None] | None = None) -> Callable[[int], float]:
    """Returns what `interleave` runs: so many steps, and the seconds they took without what comes before each."""

    def run(steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            if before:
                before()
            begin = time.perf_counter()
            function()
            total += time.perf_counter() - begin
        return total

    return run


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def about(packages: Iterable[str]) -> dict[str, Any]:
    """Date, machine and versions of the packages that are installed: what every number is committed with."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": {
            "cpu": cpu_name(),
            "cores": count_cores(),
            "load_before": os.getloadavg()[0],
        },
        "versions": versions,
    }


def warn_if_busy(facts: dict[str, Any]) -> None:
    """Says that times are not to be trusted if the machine had other things to do when `about` was asked."""
    if facts["device"]["load_before"] > 0.5:
        print(f"the machine was busy (load {facts['device']['load_before']:.1f}): don't trust the times")


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def say(text: str) -> None:
    """One line on standard error that the next one replaces, where somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="" if "\n" not in text else "\n", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
