"""The one logger of the library, `logging.getLogger("jaxkv")`, and what the environment says about it.

    JAXKV_LOG_LEVEL    DEBUG, INFO, WARNING (the default), ERROR or CRITICAL
    JAXKV_LOG_FILE     a file that is appended to, instead of standard error
    JAXKV_LOG_FMT      default: [jaxkv] - %(asctime)s - %(name)s - %(levelname)s - %(message)s
    JAXKV_LOG_DATEFMT  default: %Y-%m-%d %H:%M:%S

They are read when jaxkv is imported. If none is set, nothing is configured: the program's own settings hold.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

log = logging.getLogger("jaxkv")

_FMT = "[jaxkv] - %(asctime)s - %(name)s - %(levelname)s - %(message)s"
_DATEFMT = "%Y-%m-%d %H:%M:%S"
_ANY = log.makeRecord(log.name, logging.INFO, "", 0, "", (), None)


def configure(environment: Mapping[str, str] = os.environ) -> None:
    """Sets the logger up as the environment says; a setting that can't be followed is warned of and left out."""
    said = {name: environment.get(f"JAXKV_LOG_{name}") for name in ("LEVEL", "FMT", "DATEFMT", "FILE")}
    if not any(said.values()):
        return
    problems = []
    handler: logging.Handler = logging.StreamHandler()
    if said["FILE"]:
        try:
            handler = logging.FileHandler(os.path.expanduser(said["FILE"]), mode="a", encoding="utf-8")
        except OSError as error:
            problems.append(f"JAXKV_LOG_FILE: {error}; logging to standard error")
    chosen = {"FMT": _FMT, "DATEFMT": _DATEFMT}
    for setting in chosen:
        try:
            tried = chosen | {setting: said[setting] or chosen[setting]}
            logging.Formatter(tried["FMT"], tried["DATEFMT"]).format(_ANY)
            chosen = tried
        except (ValueError, TypeError) as error:
            problems.append(f"JAXKV_LOG_{setting}: {error}; using the default")
    handler.setFormatter(logging.Formatter(chosen["FMT"], chosen["DATEFMT"]))
    levels = logging.getLevelNamesMapping()
    name = (said["LEVEL"] or "WARNING").upper()
    if name not in levels:
        problems.append(f"JAXKV_LOG_LEVEL: there is no {said['LEVEL']!r}; levels are {', '.join(levels)}")
    log.setLevel(levels.get(name, logging.WARNING))
    log.handlers = [handler]
    log.propagate = False  # the program's own handlers would say it twice
    for problem in problems:
        log.warning(problem)
