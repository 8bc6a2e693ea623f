"""How sizes in bytes are said and read, everywhere."""

from __future__ import annotations

import operator
import re


def format_bytes(size: int) -> str:
    """Returns a size as people read it, in powers of 1024.

    >>> format_bytes(3_500_000)
    '3.3 MiB'
    """
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def parse_bytes(size: int | str) -> int:
    """Returns the bytes that are meant by a number, or by a text such as "1GiB", "500 MB" or "64k".

    An i says powers of 1024 (KiB, MiB, GiB, TiB); without it they are powers of 1000.

    Raises:
      ValueError: for anything else, and for sizes below one byte.

    >>> parse_bytes("1.5 GiB"), parse_bytes("8GB"), parse_bytes(4096)
    (1610612736, 8000000000, 4096)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
        count = (
            int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
            if match
            else 0
        )
    else:
        try:
            count = 0 if isinstance(size, bool) else operator.index(size)
        except TypeError:
            count = 0
    if count < 1:
        raise ValueError(f"{size!r} is not a size; give one such as 8GB (powers of 1,000) or 8GiB (of 1,024), or bytes")
    return count
