"""`jaxkv memo`: what a memo keeps on disk, looked at, checked and shrunk."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from jaxkv.cli.options import UsageError
from jaxkv.cli.terminal import counted, note, printable, progress_bar, write
from jaxkv.memo import upkeep
from jaxkv.memo.budget import SHARE, allowed
from jaxkv.sizes import format_bytes

_SHORT = 12  # characters of a namespace that are shown
_MOST_DAMAGES = 20
_MOST_NAMES = 5


def run(args: argparse.Namespace) -> int:
    action = {"ls": _list, "stat": _stat, "verify": _verify, "prune": _prune}[args.action]
    try:
        return action(args)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _list(args: argparse.Namespace) -> int:
    found = upkeep.survey(args.directory)
    if not found.namespaces:
        note(f"{args.directory} is an empty store")
        return 0
    rows = [("namespace", "items", "size", "last used", "function")]
    for space in found.namespaces:
        name, size = space.key.hex()[:_SHORT], format_bytes(space.nbytes)
        rows.append((name, f"{space.items:,}", size, _date(space.used), _told(space.about)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cut = False
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, items, size, used, function in rows:
        line = f"{name:<{widths[0]}}  {items:>{widths[1]}}  {size:>{widths[2]}}  {used:<{widths[3]}}  {function}"
        if width is not None and len(line) > width:
            line, cut = f"{line[: max(width - 3, 0)]}...", True
        write(f"{line}\n")
    if cut:
        note("lines are cut to the terminal's width; in a file or a pipe they are whole")
    return 0


def _stat(args: argparse.Namespace) -> int:
    found = upkeep.survey(args.directory)
    most = allowed(SHARE, args.directory, found.nbytes) or 0
    facts = {
        "size": format_bytes(found.nbytes),
        "items": f"{sum(space.items for space in found.namespaces):,} of {counted(len(found.namespaces), 'namespace')}",
        "budget": f"{format_bytes(most)} now, unless a memo is given a disk_budget ({SHARE} of this size and "
        "of what is free)",
        "left over": f"{format_bytes(found.strays)}{', which prune --damaged removes' if found.strays else ''}",
    }
    for name, fact in facts.items():
        write(f"{name:<11} {fact}\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
    with progress_bar("verify", show=sys.stderr.isatty()) as progress:
        whole, damages = upkeep.verify(args.directory, progress)
    for damage in damages[:_MOST_DAMAGES]:
        write(f"{printable(damage)}\n")
    if len(damages) > _MOST_DAMAGES:
        write(f"and {len(damages) - _MOST_DAMAGES:,} more\n")
    write(f"{counted(whole, 'record')} whole, {counted(len(damages), 'damaged place')}\n")
    if damages:
        note("damaged records count as misses, and are computed again; prune --damaged removes them")
    return 1 if damages else 0


def _prune(args: argparse.Namespace) -> int:
    if args.to is None and not args.namespace and not args.damaged:
        raise UsageError("choose what to remove: --to SIZE, --namespace NAME or --damaged")
    before = upkeep.survey(args.directory)
    names = [_meant(name, [space.key for space in before.namespaces]) for name in args.namespace]
    with progress_bar("prune", show=sys.stderr.isatty()) as progress:
        items, damaged = upkeep.prune(args.directory, args.to, names, args.damaged, progress)
    after = upkeep.survey(args.directory)
    write(f"{format_bytes(before.nbytes)} before, {format_bytes(after.nbytes)} now; removed: {counted(items, 'item')}")
    write(f", {counted(damaged, 'damaged place')}\n" if damaged else "\n")
    if args.to is None or after.nbytes <= args.to:
        return 0
    if not after.namespaces and not after.strays:
        note(f"the empty database, {format_bytes(after.nbytes)}, stays")
        return 0
    cure = (
        "--damaged removes bytes that belong to no item"
        if after.strays
        else "run it again when the other programs have ended"
    )
    note(f"this is more than {format_bytes(args.to)}; {cure}")
    return 1


def _meant(name: str, known: Sequence[bytes]) -> bytes:
    """Returns the namespace that begins so."""
    names = [key.hex() for key in known]
    found = [other for other in names if other.startswith(name.lower())]
    if len(found) == 1 and name:
        return bytes.fromhex(found[0])
    if found:
        what, cure = f"{counted(len(found), 'namespace')} begin", f"; give more of it: {_among(found, len(name) + 1)}"
    else:
        what, cure = "no namespace begins", f"; there are {_among(names)}" if names else ": the store is empty"
    raise UsageError(f"{what} with {name!r}{cure}")


def _among(names: Sequence[str], least: int = _SHORT) -> str:
    """Returns names for a message, of so many characters that all of them differ."""
    length = max(least, _SHORT)
    while len({name[:length] for name in names}) < len(names):
        length += 1
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name[:length] for name in names[:_MOST_NAMES]) + more


def _date(used: int) -> str:
    """Returns a file's time as people read it, to the second: two runs may follow closely."""
    try:
        return datetime.datetime.fromtimestamp(used // 10**9).isoformat(" ")
    except (OverflowError, OSError, ValueError):  # a file may say any time
        return "?"


def _told(said: bytes | None) -> str:
    """Returns what a namespace is, in one line; whoever wrote it may have written anything."""
    try:
        about = json.loads(said or b"")
    except (TypeError, ValueError, RecursionError):
        about = {}
    if not about or not isinstance(about, dict):
        return "not described"
    version = f", version {about['version']}" if about.get("version") is not None else ""
    sides = " -> ".join(_arrays(about.get(side)) for side in ("inputs", "outputs"))
    return printable(f"{about.get('function', 'a function')}{version}: {sides}".replace("\n", " "))


def _arrays(leaves: Any) -> str:
    if isinstance(leaves, str):
        return leaves
    if not isinstance(leaves, list):
        return "?"
    return ", ".join(_array(leaf) for leaf in leaves) or "nothing"


def _array(leaf: Any) -> str:
    if not isinstance(leaf, dict):
        return str(leaf)
    shape = leaf.get("shape")
    sizes = ",".join(map(str, shape)) if isinstance(shape, list) else "?"
    return f"{leaf.get('path') or ''} {leaf.get('dtype', '?')}[{sizes}]".strip()
