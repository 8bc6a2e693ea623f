"""The command `jaxkv`: models that continue text, out of a compiled loop that reads its past from a cache.

Text goes to standard output, everything about it to standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from jaxkv.cli.options import Failure, UsageError, parser
from jaxkv.cli.terminal import complain, said_of
from jaxkv.errors import CacheError

_MOST_LINES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for failures, 2 for wrong use, 130 after Ctrl-C, 141 when nobody reads any more.

    Args:
      argv: what follows the name of the command; None means that of this process.

    Raises:
      SystemExit: after --help and --version, and for options that can't be read.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character shows "?"
    try:
        args = parser().parse_args(argv)
        return importlib.import_module(f"jaxkv.cli.{args.command}").run(args)
    except UsageError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CacheError, Failure, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _complain("there is not enough memory; jaxkv info DIR shows the size of the model and its cache", 1)
        if not isinstance(error, CacheError | Failure | OSError):
            raise
        return _complain(error, 1)


def _complain(what: Exception | str, status: int) -> int:
    """Says what is wrong on one line, or what is wrong with many things on a few."""
    lines = [" ".join(line.split()) for line in (what if isinstance(what, str) else said_of(what)).splitlines()]
    complain(lines[0] if lines else "unknown")
    for line in lines[1 : _MOST_LINES + 1]:
        print(f"  {line}", file=sys.stderr)
    if len(lines) > _MOST_LINES + 1:
        print(f"  and {len(lines) - _MOST_LINES - 1:,} more", file=sys.stderr)
    return status
