"""How sizes in bytes are said, everywhere."""

from __future__ import annotations


def format_bytes(size: int) -> str:
    """Returns a size as people read it, in powers of 1024.

    >>> format_bytes(3_500_000)
    '3.3 MiB'
    """
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = "TiB"
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
