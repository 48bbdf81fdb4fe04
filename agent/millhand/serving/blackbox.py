"""What a worker is doing right now, written where its death does not take it along.

The pool makes the memory and hands it to the worker by descriptor. After a crash it says which model version ran;
while the worker lives it says for how long. Imported by workers: Python 3.10.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import struct
import threading
import time
from typing import NamedTuple

# since (CLOCK_MONOTONIC ns, 0 = idle), version, thread, model name in UTF-8
RECORD = struct.Struct("<QIQ116s")
NAME_BYTES_CAP = 116
CRASH_BYTES_CAP = 1 << 16


LOAD, RUN = 0, 1
RUNNERS_CAP = mmap.PAGESIZE // RECORD.size - RUN


class Activity(NamedTuple):
    """What one thread of the worker does."""

    model: str
    version: int
    since_ns: int
    """Nanoseconds since it began."""
    thread: int
    """As `threading.get_ident` says, and as faulthandler prints it."""


class Blackbox:
    """A record LOAD, and from RUN on one a runner; each has one writer at a time in the worker, and the pool reads."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor of the memory."""
        self._fd = fd
        self._map = mmap.mmap(fd, mmap.PAGESIZE)

    @classmethod
    def create(cls) -> tuple[Blackbox, int]:
        """Make a new one; returns it with the descriptor to hand over (the caller closes it)."""
        fd = os.memfd_create("millhand-blackbox", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            return cls(os.dup(fd)), fd
        except BaseException:
            os.close(fd)
            raise

    def catch_crash(self) -> None:
        """In the worker: from now on a crash writes its traceback behind the records."""
        os.lseek(self._fd, mmap.PAGESIZE, os.SEEK_SET)
        faulthandler.enable(self._fd, all_threads=True)

    def crash(self) -> tuple[int, str]:
        """The thread that crashed and its Python stack; (0, "") where nothing did, or outside Python's threads."""
        text = os.pread(self._fd, CRASH_BYTES_CAP, mmap.PAGESIZE).decode(errors="replace")
        found = re.search(r"^Current thread 0x([0-9a-f]+)[^\n]*\n((?:  File [^\n]*\n)*)", text, re.MULTILINE)
        return (int(found[1], 16), found[2].rstrip()) if found else (0, "")

    def begin(self, record: int, model: str, version: int) -> None:
        """Say that this version runs, or is loaded, from now on."""
        name = model.encode()[:NAME_BYTES_CAP]
        place = record * RECORD.size
        RECORD.pack_into(self._map, place, time.monotonic_ns(), version, threading.get_ident(), name)

    def end(self, record: int) -> None:
        """Say that it is done."""
        RECORD.pack_into(self._map, record * RECORD.size, 0, 0, 0, b"")

    def loading(self) -> Activity | None:
        """The load under way, or None."""
        return self._read(LOAD)

    def running(self) -> Activity | None:
        """The batch that has run for longest, or None where none runs."""
        return max(self.runs(), key=lambda run: run.since_ns, default=None)

    def suspects(self) -> list[Activity]:
        """What may have killed the worker: what runs, the longest first, then what is loaded."""
        loading = self.loading()
        return sorted(self.runs(), key=lambda run: -run.since_ns) + ([] if loading is None else [loading])

    def runs(self) -> list[Activity]:
        """Every batch that runs."""
        return [record for record in map(self._read, range(RUN, RUN + RUNNERS_CAP)) if record is not None]

    def _read(self, record: int) -> Activity | None:
        since_ns, version, thread, name = RECORD.unpack_from(self._map, record * RECORD.size)
        if since_ns == 0:
            return None
        model = name.rstrip(b"\0").decode(errors="replace")
        return Activity(model, version, time.monotonic_ns() - since_ns, thread)

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)
