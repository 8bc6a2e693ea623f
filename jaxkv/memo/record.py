"""What lies in a file of the disk tier: records, and the index beside them.

A segment `<sequence>-<random>.seg` is records one after the other, each a header and its payload. It is the truth. The
file `.idx` beside it is a redundancy, named as one: it says where the records lie, so that a million of them are found
without reading the segment. Nothing rests on it: whatever is read is held against the header's check and key and the
payload's checksum, and where the index is damaged, short or gone, the segment is searched.

The random half of the name goes into every check. So records and entries count only in the file that they were written
to, and a payload that happens to hold the bytes of another store's segment isn't taken for records.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkv.extras import need

KEY_BYTES = 32
NAMESPACE_BYTES = 16  # of a key, at its beginning: which function it is of
_MAGIC = b"JKV\x01"
# Magic, crc of what follows, flags, stored bytes, raw bytes, key, xxh3 of the payload.
_HEADER = struct.Struct("<4sIQQQ32sQ")
HEADER_BYTES = _HEADER.size
ENTRY = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("stored", "<u8"), ("check", "<u8")])
_NAME = re.compile(r"(\d{12})-([0-9a-f]{16})\.seg")
_WINDOW = 1 << 20
_READ_MOST = 1 << 30  # Linux reads at most 2 GiB at once


class Header(NamedTuple):
    flags: int
    stored: int  # bytes of the payload as it lies there
    raw: int  # bytes of the payload as it was given
    key: bytes
    check: int


class Contents(NamedTuple):
    """Where the records of a segment lie, in the order they were written."""

    keys: list[bytes]
    offsets: np.ndarray  # [N] uint64
    stored: np.ndarray  # [N] uint64
    damaged: int  # stretches that hold no record where there should be some
    lost: int  # records that the index knows and the segment no longer has
    mended: bool  # records were found that the index did not have


def checksum(payload: Any) -> int:
    """Returns the checksum of a payload."""
    return need("xxhash", "the disk tier", "memo").xxh3_64_intdigest(payload)


def segment_seed(name: str) -> tuple[int, int] | None:
    """Returns the sequence number and the seed in a segment's file name; None if it isn't one."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2], 16)) if match else None


def pack_header(header: Header, seed: int) -> bytes:
    body = _HEADER.pack(_MAGIC, 0, header.flags, header.stored, header.raw, header.key, header.check)
    return body[:4] + zlib.crc32(body[8:], seed & 0xFFFFFFFF).to_bytes(4, "little") + body[8:]


def unpack_header(data: Any, seed: int) -> Header | None:
    """Returns the header that lies at the beginning of `data`, None if there is no intact one."""
    if len(data) < HEADER_BYTES:
        return None
    magic, crc, *fields = _HEADER.unpack_from(data)
    if magic != _MAGIC or crc != zlib.crc32(data[8:HEADER_BYTES], seed & 0xFFFFFFFF):
        return None
    return Header(*fields)


def pack_entries(keys: Sequence[bytes], offsets: Any, stored: Any, seed: int) -> np.ndarray:
    """Returns the entries of an index. [N] ENTRY."""
    entries = np.zeros(len(keys), ENTRY)
    entries["key"] = np.frombuffer(b"".join(keys), f"V{KEY_BYTES}")
    entries["offset"] = offsets
    entries["stored"] = stored
    entries["check"] = _entry_checks(entries, seed)
    return entries


def unpack_entries(data: bytes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entries in the bytes of an index, and which of them are intact. [N] ENTRY, [N] bool."""
    entries = np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)
    return entries, entries["check"] == _entry_checks(entries, seed)


def index_limit(size: int) -> int:
    """Returns the most bytes that the index of a segment of this size has: a damaged file may be of any length."""
    return size // HEADER_BYTES * ENTRY.itemsize


def _entry_checks(entries: np.ndarray, seed: int) -> np.ndarray:
    """A word per entry. Each step can be undone, so a change within one word of the entry always shows."""
    words = entries.view("<u8").reshape(len(entries), ENTRY.itemsize // 8)
    checks = np.full(len(entries), seed, np.uint64)
    for column in range(words.shape[1] - 1):
        checks ^= words[:, column]
        checks *= np.uint64(0x9E3779B97F4A7C15)
        checks ^= checks >> np.uint64(29)
    return checks


def unpack_record(data: memoryview, seed: int, key: bytes) -> tuple[Header, memoryview] | None:
    """Returns header and payload of the record that `data` is all of, None if it is damaged or has another key."""
    header, payload = unpack_header(data, seed), data[HEADER_BYTES:]
    if header is None or (header.key, header.stored) != (key, len(payload)) or checksum(payload) != header.check:
        return None
    return header, payload


def read_at(fd: int, count: int, offset: int) -> bytes:
    """Returns `count` bytes of a file, fewer only where the file ends."""
    data = os.pread(fd, min(count, _READ_MOST), offset)
    if len(data) == count:
        return data
    parts = [data]
    while data and (count := count - len(data)) > 0:
        offset += len(data)
        data = os.pread(fd, min(count, _READ_MOST), offset)
        parts.append(data)
    return b"".join(parts)


def scan(fd: int, begin: int, end: int, seed: int) -> tuple[list[tuple[bytes, int, int]], int]:
    """Searches bytes [begin, end) of a segment for records, without reading what they hold.

    Returns:
      (key, offset, stored bytes) of each record, and how many stretches between them are no records.
    """
    found: list[tuple[bytes, int, int]] = []
    damaged, in_damage = 0, False
    window, start, at = b"", begin, begin
    while at < end:
        if at + HEADER_BYTES > start + len(window):
            window, start = read_at(fd, min(_WINDOW, end - at), at), at
        here = at - start
        header = unpack_header(window[here : here + HEADER_BYTES], seed)
        if header is not None and at + HEADER_BYTES + header.stored <= end:
            found.append((header.key, at, header.stored))
            at += HEADER_BYTES + header.stored
            in_damage = False
            continue
        damaged += not in_damage
        in_damage = True
        if len(window) - here < HEADER_BYTES:
            break
        following = window.find(_MAGIC, here + 1)
        at = start + following if following >= 0 else start + len(window) - len(_MAGIC) + 1
    return found, damaged


def read_contents(path: str, seed: int, *, search: bool = True) -> Contents:
    """Returns what lies in a segment: by its index, and by searching what that lacks.

    Args:
      path: of the segment.
      seed: of its name.
      search: False while somebody writes to it, where what the index doesn't have yet is no damage.

    Raises:
      OSError: if the segment can't be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        try:
            with open(os.path.splitext(path)[0] + ".idx", "rb") as file:
                data = file.read(index_limit(size))
        except OSError:
            data = b""
        entries, intact = unpack_entries(data, seed)
        limit = np.uint64(max(size - HEADER_BYTES, 0))
        inside = (entries["offset"] <= limit) & (entries["stored"] <= limit)
        inside &= entries["offset"] + entries["stored"] <= limit
        inside &= size >= HEADER_BYTES
        lost = int((intact & ~inside).sum())
        if not (intact & inside).all():
            entries = entries[intact & inside]
        offsets, stored = entries["offset"], entries["stored"]
        if (offsets[:-1] > offsets[1:]).any():
            entries = entries[np.argsort(offsets, kind="stable")]
            offsets, stored = entries["offset"], entries["stored"]
        ends = offsets + stored + np.uint64(HEADER_BYTES)
        begins = np.concatenate([np.zeros(1, np.uint64), ends])
        stops = np.concatenate([offsets, np.array([size], np.uint64)])
        keys = entries["key"].tolist()
        damaged, mended = 0, False
        gaps = np.flatnonzero(begins < stops) if search else np.zeros(0, np.intp)
        for gap in gaps[::-1]:  # from the back, so that places before stay what they are
            found, holes = scan(fd, int(begins[gap]), int(stops[gap]), seed)
            damaged += holes
            if found:
                mended = True
                keys[gap:gap] = [key for key, _, _ in found]
                offsets = np.insert(offsets, gap, [offset for _, offset, _ in found])
                stored = np.insert(stored, gap, [count for _, _, count in found])
    finally:
        os.close(fd)
    return Contents(keys, offsets, stored, damaged, lost, mended)
