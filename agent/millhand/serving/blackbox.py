"""What a worker is doing right now, written where its death does not take it along.

The pool makes the memory and hands it to the worker by descriptor. After a crash it says which model version ran;
while the worker lives it says for how long. Imported by workers: Python 3.10.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

RECORD = struct.Struct("<QI124s")  # since (CLOCK_MONOTONIC ns, 0 = idle), version, model name in UTF-8
NAME_BYTES_CAP = 124


LOAD, RUN = 0, 1
RUNNERS_CAP = mmap.PAGESIZE // RECORD.size - RUN


class Blackbox:
    """A record LOAD, and from RUN on one a runner; each has one writer at a time in the worker, and the pool reads."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, mmap.PAGESIZE)

    @classmethod
    def create(cls) -> tuple[Blackbox, int]:
        """Make a new one; returns it with the descriptor to hand over (the caller closes it)."""
        fd = os.memfd_create("millhand-blackbox", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            return cls(fd), fd
        except BaseException:
            os.close(fd)
            raise

    def begin(self, record: int, model: str, version: int) -> None:
        """Say that this version runs, or is loaded, from now on."""
        RECORD.pack_into(self._map, record * RECORD.size, time.monotonic_ns(), version, model.encode()[:NAME_BYTES_CAP])

    def end(self, record: int) -> None:
        """Say that it is done."""
        RECORD.pack_into(self._map, record * RECORD.size, 0, 0, b"")

    def loading(self) -> tuple[str, int, int] | None:
        """(model, version, nanoseconds since it began) of the load under way, or None."""
        return self._read(LOAD)

    def running(self) -> tuple[str, int, int] | None:
        """The same of the batch that has run for longest, or None where none runs."""
        records = filter(None, map(self._read, range(RUN, RUN + RUNNERS_CAP)))
        return max(records, key=lambda record: record[2], default=None)

    def _read(self, record: int) -> tuple[str, int, int] | None:
        since_ns, version, name = RECORD.unpack_from(self._map, record * RECORD.size)
        if since_ns == 0:
            return None
        return name.rstrip(b"\0").decode(errors="replace"), version, time.monotonic_ns() - since_ns

    def close(self) -> None:
        self._map.close()
