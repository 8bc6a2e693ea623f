"""Packages that only some parts of jaxkv need, imported when they are."""

from __future__ import annotations

import importlib
from typing import Any

# By extra, so that who lacks one package is told of the other in the same breath.
_TOGETHER = {"models": "tokenizers jinja2"}


def need(package: str, what: str, extra: str) -> Any:
    """Returns a package that an extra of jaxkv installs.

    Args:
      package: its name, that of a module in it too.
      what: what needs it, as the message says it.
      extra: which one.

    Raises:
      ImportError: if it can't be imported, naming what needs it and the command that installs it. That names packages,
        not the extra: where jaxkv came from, a checkout or an address, nobody knows here.

    >>> need("no_such_package", 'compress="x"', "memo")
    Traceback (most recent call last):
    ImportError: no_such_package is not installed, and compress="x" needs it: pip install no_such_package
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        install = _TOGETHER.get(extra, name)
        raise ImportError(f"{name} is not installed, and {what} needs it: pip install {install}") from error
