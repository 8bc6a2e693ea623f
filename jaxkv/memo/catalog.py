"""What one process knows of a directory of segments, and how it learns what others did there.

Nothing here relies on clocks. The directory's time of change only says that it is worth listing again; as two changes
may carry the same time, it is listed now and then without a change, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from array import array
from collections.abc import Iterable

from jaxkv.logs import log
from jaxkv.memo.layout import is_ours
from jaxkv.memo.record import (
    ENTRY,
    HEADER_BYTES,
    index_limit,
    pack_entries,
    read_at,
    read_contents,
    segment_seed,
    unpack_entries,
)
from jaxkv.memo.segment import Handle, lock, write_whole

_LIST_EVERY = 64  # looks
_ROW_BITS = 32
_OPEN_MOST = 128


@dataclasses.dataclass
class Counts:
    """What went on in this process. See `DiskStats`."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    corrupt: int = 0
    lost: int = 0
    errors: int = 0


class Segment:
    """Where the records of one segment lie."""

    def __init__(self, stem: str, number: int) -> None:
        self.stem, self.number = stem, number
        self.sequence, self.seed = segment_seed(f"{stem}.seg")  # type: ignore[misc]
        self.keys: list[bytes] = []
        self.offsets, self.stored = array("Q"), array("Q")
        self.size = self.index_size = 0  # bytes of the files
        self.followed = 0  # bytes of the index that have been read, while another process appends
        self.live = False  # somebody appends to it, maybe we
        self.handles: tuple[Handle, Handle] | None = None  # segment and index, while another process appends


class Catalog:
    """The records of a directory: where each lies, and how many bytes all files take.

    Its methods are called under one lock.
    """

    def __init__(self, directory: str, counts: Counts) -> None:
        self.directory, self._counts = directory, counts
        self.segments: dict[str, Segment] = {}  # by stem
        self.places: dict[bytes, int] = {}  # key -> number of the segment << 32 | row
        self.nbytes = 0  # of all files
        self.small_bytes = 0  # of those that aren't segments
        self._numbers: dict[int, Segment] = {}
        self._next = 0
        self._mark: object = None
        self._looks = 0
        self._files: dict[str, Handle] = {}  # open for reading, the latest last

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def refresh(self, *, force: bool = False) -> None:
        """Learns what other processes did: new, grown and vanished segments. A few microseconds if they did nothing."""
        self._looks += 1
        try:
            about = os.stat(self.directory)
        except FileNotFoundError:
            self.drop_all()
            return
        except OSError:
            return
        mark = (about.st_mtime_ns, about.st_ino, about.st_dev)
        if force or mark != self._mark or self._looks % _LIST_EVERY == 0:
            self._mark = mark
            with contextlib.suppress(OSError):
                self._list()
        for segment in [segment for segment in self.segments.values() if segment.handles is not None]:
            self._follow(segment)

    def look_again(self) -> None:
        """Has the next look list the directory."""
        self._mark = None

    def _list(self) -> None:
        stems, small_bytes = [], 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if segment_seed(entry.name):
                    stems.append(entry.name[:-4])
                elif is_ours(entry.name) and not entry.name.endswith(".idx"):
                    with contextlib.suppress(OSError):
                        small_bytes += entry.stat(follow_symlinks=False).st_size
        self.nbytes += small_bytes - self.small_bytes
        self.small_bytes = small_bytes
        for stem in sorted(set(stems) - set(self.segments)):  # later ones win
            self._load(stem)
        for stem in set(self.segments) - set(stems):  # after what may have taken their place
            self._counts.lost += self.drop(stem)

    def _load(self, stem: str) -> None:
        path, index_path = self.path(f"{stem}.seg"), self.path(f"{stem}.idx")
        with contextlib.suppress(OSError):  # gone again
            handle = Handle(path, os.O_RDONLY)
            if lock(handle, shared=True):
                handle.close()
                self._load_sealed(stem)
            else:
                segment = self.new(stem)
                segment.live = True
                # A moment lies between the two files of a new segment: without the second, look again next time.
                try:
                    segment.handles = handle, Handle(index_path, os.O_RDONLY)
                except OSError:
                    self.drop(stem)
                    self._mark = None
                else:
                    self._follow(segment)

    def _load_sealed(self, stem: str) -> None:
        path, index_path = self.path(f"{stem}.seg"), self.path(f"{stem}.idx")
        _, seed = segment_seed(f"{stem}.seg")  # type: ignore[misc]
        contents = read_contents(path, seed)
        segment = self.new(stem)
        self._counts.corrupt += contents.damaged
        self._counts.lost += contents.lost
        if contents.damaged or contents.lost:
            log.warning("%s: %d damaged places, %d records lost", path, contents.damaged, contents.lost)
        if contents.mended:
            entries = pack_entries(contents.keys, contents.offsets, contents.stored, seed)
            with contextlib.suppress(OSError):
                write_whole(index_path, entries.tobytes())
        self.add(segment, contents.keys, contents.offsets.tolist(), contents.stored.tolist())
        with contextlib.suppress(OSError):
            self.resize(segment, os.stat(path).st_size, segment.index_size)
            self.resize(segment, segment.size, os.stat(index_path).st_size)

    def _follow(self, segment: Segment) -> None:
        """Reads what another process appended since the last look."""
        if segment.handles is None:
            return
        handle, index = segment.handles
        try:
            if lock(handle, shared=True):  # its owner is gone: now all of it can be read
                handle.close()
                self.drop(segment.stem)
                self._load(segment.stem)
                return
            self.resize(segment, os.fstat(handle.fd).st_size, os.fstat(index.fd).st_size)
            end = min(segment.index_size, index_limit(segment.size))
            whole = (end - segment.followed) // ENTRY.itemsize * ENTRY.itemsize
            if whole <= 0:
                return
            entries, intact = unpack_entries(read_at(index.fd, whole, segment.followed), segment.seed)
        except OSError:
            return
        # The last ones may be there by half, and are read again. Damage before them hides its records until they are
        # searched for, once the segment is sealed.
        count = len(intact) - int(intact[::-1].argmax()) if intact.any() else 0
        segment.followed += count * ENTRY.itemsize
        self._counts.corrupt += count - int(intact[:count].sum())
        entries = entries[:count][intact[:count]]
        self.add(segment, entries["key"].tolist(), entries["offset"].tolist(), entries["stored"].tolist())

    def new(self, stem: str) -> Segment:
        segment = Segment(stem, self._next)
        self._next += 1
        self.segments[stem] = self._numbers[segment.number] = segment
        return segment

    def disown(self, stem: str) -> None:
        """Goes on with this process's segment as with another's."""
        segment = self.segments.get(stem)
        try:
            handles = (Handle(self.path(f"{stem}.{ending}"), os.O_RDONLY) for ending in ("seg", "idx"))
            if segment is not None:
                segment.handles = next(handles), next(handles)
                segment.followed = segment.index_size
        except OSError:
            self._counts.lost += self.drop(stem)

    def add(self, segment: Segment, keys: list[bytes], offsets: Iterable[int], stored: Iterable[int]) -> None:
        first = segment.number << _ROW_BITS | len(segment.keys)
        segment.keys += keys
        segment.offsets.extend(offsets)
        segment.stored.extend(stored)
        self.places.update(zip(keys, range(first, first + len(keys)), strict=True))

    def resize(self, segment: Segment, size: int, index_size: int) -> None:
        self.nbytes += size + index_size - segment.size - segment.index_size
        segment.size, segment.index_size = size, index_size

    def drop(self, stem: str) -> int:
        """Forgets a segment, and returns how many records are no longer known."""
        segment = self.segments.pop(stem, None)
        if segment is None:
            return 0
        self._numbers.pop(segment.number)
        self._files.pop(stem, None)
        self.nbytes -= segment.size + segment.index_size
        before = len(self.places)
        for place, key in enumerate(segment.keys, segment.number << _ROW_BITS):
            if self.places.get(key) == place:
                del self.places[key]
        return before - len(self.places)

    def drop_all(self) -> None:
        """Forgets everything: the directory is gone."""
        self._counts.lost += len(self.places)
        for table in (self.segments, self._numbers, self.places, self._files):
            table.clear()
        self.nbytes = self.small_bytes = 0
        self._mark = None

    def find(self, key: bytes) -> tuple[Segment, int, int] | None:
        """Returns the segment of a record, its offset, and the bytes of its payload there."""
        place = self.places.get(key)
        if place is None:
            return None
        segment = self._numbers[place >> _ROW_BITS]
        row = place & (1 << _ROW_BITS) - 1
        return segment, segment.offsets[row], segment.stored[row]

    def forget(self, key: bytes, segment: Segment, offset: int) -> bool:
        """Forgets a record unless another one has taken its place."""
        found = self.find(key)
        if found is None or found[0] is not segment or found[1] != offset:
            return False
        del self.places[key]
        return True

    def file(self, segment: Segment) -> Handle:
        """Returns a segment, open for reading.

        Raises:
          OSError: if it can't be opened.
        """
        handle = self._files.pop(segment.stem, None) or Handle(self.path(f"{segment.stem}.seg"), os.O_RDONLY)
        self._files[segment.stem] = handle
        if len(self._files) > _OPEN_MOST:
            self._files.pop(next(iter(self._files)))
        return handle

    def close_files(self) -> None:
        self._files.clear()

    def next_sequence(self) -> int:
        return 1 + max((segment.sequence for segment in self.segments.values()), default=0)


def record_bytes(stored: int) -> int:
    """Returns the bytes that a record takes, with its entry in the index."""
    return HEADER_BYTES + stored + ENTRY.itemsize
