"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the block ends, and that is gone if the block fails.

    Raises:
      OSError: if it can't be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")  # others may be writing there too
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power failure might leave a file under the new name that is empty
        partial.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # nobody gave the other name
    finally:
        partial.unlink(missing_ok=True)
