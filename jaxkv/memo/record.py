"""One record of the disk tier: a row of the database, with its payload in it or, from 64 KB on, in a file beside it."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from jaxkv.extras import need

KEY_BYTES = 32
NAMESPACE_BYTES = 16  # of a key, at its beginning: which function it is of
LARGE = 1 << 16  # bytes from which a payload lies in a file
ZSTD = "zstandard", 'compress="zstd"', "memo"
_LEVEL = 1  # of zstd: features are noise for the most part, so more effort wins little
_NAME = re.compile(rb"[0-9a-f]{32}")


class Record(NamedTuple):
    """What a row says."""

    key: bytes
    raw: int  # bytes of the payload as it was given
    stored: int  # bytes of it as it lies there: fewer if it is compressed
    check: bytes  # of key, raw, and the payload as it lies there
    payload: Any  # that, or the name of its file


class DamagedError(Exception):
    """A record that isn't what was written."""


def pack(key: bytes, payload: Any, compress: bool) -> Record:
    """Returns a payload as a record: compressed if that makes it smaller, and not yet in its file."""
    view = memoryview(payload)
    data: Any = view.cast("B") if view.nbytes else b""
    if compress:
        data = min(data, need(*ZSTD).ZstdCompressor(level=_LEVEL).compress(data), key=len)
    return Record(key, view.nbytes, len(data), _check(key, view.nbytes, data), data)


def put_aside(record: Record, path: str) -> Record:
    """Writes the payload to a file, and returns the record that names it: nobody reads it before that is in its row."""
    with open(path, "xb") as file:
        file.write(record.payload)
    return record._replace(payload=os.path.basename(path).encode())


def path_of_file(name: Any, folder: str) -> str | None:
    """Returns the path of a payload's file, None if that can't be its name."""
    return os.path.join(folder, name.decode()) if isinstance(name, bytes) and _NAME.fullmatch(name) else None


def unpack(record: Record, folder: str) -> Any:
    """Returns the payload as it was given.

    Raises DamagedError if it isn't what was written under this key, OSError if its file can't be read.
    """
    if list(map(type, record)) != [bytes, int, int, bytes, bytes]:
        raise DamagedError
    data: Any = record.payload
    if len(data) != record.stored:
        if (path := path_of_file(data, folder)) is None:
            raise DamagedError
        # A FIFO would be waited for.
        with open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if os.fstat(file.fileno()).st_size != record.stored:
                raise DamagedError
            data = file.read(record.stored) if record.stored < 1 << 30 else file.readall()  # which reads in parts
    if _check(record.key, record.raw, data) != record.check:
        raise DamagedError
    return data if record.stored == record.raw else need(*ZSTD).ZstdDecompressor().decompress(data)


def _check(key: bytes, raw: int, data: Any) -> bytes:
    import xxhash  # `need` would take as long as the checksum of 4 KB

    return xxhash.xxh3_64_digest(data, xxhash.xxh3_64_intdigest(b"%b%d" % (key, raw)))  # the latter is the seed
