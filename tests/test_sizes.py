"""One way to say sizes."""

from __future__ import annotations

import numpy as np
import pytest

from jaxkv.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("1GiB", 2**30),
        ("1 gib", 2**30),
        ("1GB", 10**9),
        ("64k", 64_000),
        ("0.5MiB", 2**19),
        ("12", 12),
        ("3B", 3),
        (7, 7),
        (np.int64(7), 7),
        (" 2TiB ", 2**41),
    ],
)
def test_sizes_are_read(said, meant):
    assert parse_bytes(said) == meant


@pytest.mark.parametrize("wrong", ["", "GiB", "-1GB", "1 GiB extra", "0", 0, -5, 1.5, True, None, "1e3", np.True_])
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match="is not a size; give one such as 8GB"):
        parse_bytes(wrong)


@pytest.mark.parametrize("size", [1, 1023, 1024, 10**6, 2**30, 5 * 2**41])
def test_what_is_said_can_be_read_again(size):
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.05 * size
