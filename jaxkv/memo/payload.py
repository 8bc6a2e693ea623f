"""Payloads as they lie in a record: as they were given, or compressed."""

from __future__ import annotations

from typing import Any

from jaxkv.extras import need
from jaxkv.memo.record import Header, checksum

_ZSTD = 1  # flag of a header
_LEVEL = 1  # features are noise for the most part: more effort wins little


def pack_payload(key: bytes, payload: Any, compress: bool) -> tuple[Header, Any]:
    """Returns a payload with its header; compressed if that makes it smaller."""
    view = memoryview(payload)
    data: Any = view.cast("B") if view.nbytes else b""
    flags, raw = 0, view.nbytes
    if compress:
        packed = load_zstandard().ZstdCompressor(level=_LEVEL).compress(data)
        if len(packed) < raw:
            flags, data = _ZSTD, packed
    return Header(flags, len(data), raw, key, checksum(data)), data


def unpack_payload(header: Header, payload: memoryview) -> Any:
    """Returns what was packed, None if it can't be said."""
    if header.flags == 0:
        return payload if header.raw == header.stored else None
    if header.flags != _ZSTD:
        return None
    try:
        zstandard = load_zstandard()
    except ImportError:
        return None
    try:
        if zstandard.frame_content_size(payload) != header.raw:
            return None
        return zstandard.ZstdDecompressor().decompress(payload)
    except (MemoryError, zstandard.ZstdError):
        return None


def load_zstandard() -> Any:
    """Raises ImportError where it is missing."""
    return need("zstandard", 'compress="zstd"', "memo")
