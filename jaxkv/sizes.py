"""How sizes in bytes are said, everywhere."""

from __future__ import annotations


def format_bytes(size: int) -> str:
    """Returns a size as people read it, in powers of 1024.

    >>> format_bytes(3_500_000)
    '3.3 MiB'
    """
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
