"""Records out of segments: many by few reads, each held against its header, key and checksum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxkv.memo.catalog import Segment
from jaxkv.memo.payload import unpack_payload
from jaxkv.memo.record import HEADER_BYTES, read_at, unpack_record
from jaxkv.memo.segment import Handle

_RUN_MOST = 1 << 20  # bytes read at once; whoever keeps one payload of a run keeps all
Place = tuple[Segment, int, int, int]  # offset, bytes of the payload there, which key was asked for


@dataclasses.dataclass
class Outcome:
    """What became of the places that were read."""

    values: dict[int, Any]  # which key -> its payload
    used: set[str]  # segments that gave something
    gone: list[Place]  # cut off, or unreadable
    damaged: list[Place]
    problem: Exception | None  # why something could not be read


def read_places(places: Sequence[Place], files: Mapping[str, Handle], keys: Sequence[bytes], nbytes: int) -> Outcome:
    """Reads records of the size `nbytes`; those of another size are left out.

    Args:
      places: where they lie.
      files: each segment of them, open.
      keys: what was asked for.
      nbytes: of each payload as it was given.
    """
    outcome = Outcome({}, set(), [], [], None)
    for run in _runs(sorted(places, key=lambda place: (place[0].number, place[1]))):
        segment, begin = run[0][0], run[0][1]
        end = run[-1][1] + HEADER_BYTES + run[-1][2]
        try:
            data = memoryview(read_at(files[segment.stem].fd, end - begin, begin))
        except (OSError, MemoryError) as error:
            outcome.problem = error
            outcome.gone += run
            continue
        for place in run:
            _, offset, stored, i = place
            size = HEADER_BYTES + stored
            part = data[offset - begin :][:size]
            if len(part) < size:
                outcome.gone.append(place)
            elif (record := unpack_record(part, segment.seed, keys[i])) is None:
                outcome.damaged.append(place)
            elif record[0].raw == nbytes:
                outcome.values[i] = unpack_payload(*record)
                outcome.used.add(segment.stem)
    return outcome


def _runs(places: Sequence[Place]) -> list[list[Place]]:
    """Returns sorted places in runs that one read can fetch."""
    runs: list[list[Place]] = []
    segment, end, left = None, -1, 0
    for place in places:
        size = HEADER_BYTES + place[2]
        if place[0] is segment and place[1] == end and size <= left:
            runs[-1].append(place)
        else:
            runs.append([place])
            left = _RUN_MOST
        segment, end, left = place[0], place[1] + size, left - size
    return runs
