"""How much of a disk a memo takes, where it is given a share of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

from jaxkv.memo.disk import BUDGET_LEAST

SHARE = 0.5  # where nothing is said


def parse_share(budget: Any) -> float | None:
    """Returns the share of the disk that is meant by a text such as "50%", None if that is none.

    Raises:
      ValueError: for shares below nothing and above all.

    >>> parse_share("50%"), parse_share("8GB")
    (0.5, None)
    """
    if not isinstance(budget, str) or not budget.strip().endswith("%"):
        return None
    with contextlib.suppress(ValueError):
        share = float(budget.strip()[:-1]) / 100
        if 0 < share <= 1:
            return share
    raise ValueError(f'disk_budget is {budget!r}; give a share of the disk from "1%" to "100%", bytes, or None')


def share_of_disk(directory: str, share: float, taken: int) -> int:
    """Returns the bytes of a share of what is free on a directory's disk, and of what a store there has taken."""
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    return max(int(share * (shutil.disk_usage(directory).free + taken)), BUDGET_LEAST)
