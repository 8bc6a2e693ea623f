"""How many bytes a budget of the disk allows."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

from jaxkv.sizes import parse_bytes

SHARE = "50%"  # where nothing is said
LEAST = 1 << 16  # bytes


def allowed(budget: Any, directory: str, taken: int) -> int | None:
    """Returns bytes for a budget in bytes, or for a share of what is free on a directory's disk and of what is taken.

    Raises:
      ValueError: for anything else, less than `LEAST`, and shares below nothing and above all.

    >>> allowed("64 KiB", "/", 0), allowed(None, "/", 0)
    (65536, None)
    """
    if isinstance(budget, str) and budget.strip().endswith("%"):
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", budget)
        if not share or not 0 < float(share[1]) <= 100:
            raise ValueError(f'disk_budget is {budget!r}; give a share of the disk from "1%" to "100%", bytes, or None')
        while not os.path.exists(directory):
            directory = os.path.dirname(directory)
        return max(int(float(share[1]) / 100 * (shutil.disk_usage(directory).free + taken)), LEAST)
    if budget is not None and parse_bytes(budget) < LEAST:
        raise ValueError(f"disk_budget is {budget!r}; give {LEAST:,} bytes or more, a share of the disk, or None")
    return None if budget is None else parse_bytes(budget)
