"""Text files of a checkpoint directory."""

from __future__ import annotations

import os

from jaxkv import regular

_MOST = 1 << 30  # bytes: ten times the largest tokenizer.json that there is


def read_text(path: str | os.PathLike[str], most: int = _MOST) -> str:
    """Returns the text of a UTF-8 file, without the mark that some editors put at its beginning.

    Args:
      path: a regular file.
      most: bytes that it may have.

    Raises:
      OSError: if it can't be opened.
      ValueError: if it isn't a regular file, is larger, or isn't UTF-8.
    """
    try:
        return regular.read(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}; fetch the file again, or "
            "save it as UTF-8"
        ) from None
