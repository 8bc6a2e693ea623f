"""Packages that only some parts of jaxkv want, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def need(package: str, what: str, extra: str) -> Any:
    """Returns a package that an extra of jaxkv installs.

    Args:
      package: its name, that of a module in it too.
      what: what needs it, as the message says it.
      extra: which one.

    Raises:
      ImportError: if it can't be imported, naming all three and the command that installs it.

    >>> need("no_such_package", 'compress="x"', "memo")
    Traceback (most recent call last):
    ImportError: no_such_package is not installed, and compress="x" needs it: pip install "jaxkv[memo]"
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f'{name} is not installed, and {what} needs it: pip install "jaxkv[{extra}]"') from error
