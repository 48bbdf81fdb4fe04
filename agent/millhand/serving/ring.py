"""A ring of slots in one memfd, in which tensors travel between two processes without passing through the socket.

The client makes it, hands it over once by descriptor, and alone decides which slot is leased: it writes the inputs,
the worker writes the outputs over them, the client reads and frees the slot. So a death on either side leaks
nothing: the memory goes when the last descriptor and mapping go. Imported by workers: Python 3.10.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from millhand.errors import InputError

SLOTS_CAP = 1024
RING_BYTES_CAP = 1 << 32


class Ring:
    """`slots` pieces of `slot_bytes` each."""

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(fd, slots * slot_bytes)
        view = memoryview(self._map)
        self._slots = [view[start : start + slot_bytes] for start in range(0, slots * slot_bytes, slot_bytes)]
        # Last in, first out: the slot that is warm in the cache is used again, and untouched ones take no memory.
        self._free = list(range(slots - 1, -1, -1))

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> tuple[Ring, int]:
        """Make a new ring; returns it with the descriptor to hand over (the caller closes it)."""
        fd = os.memfd_create("millhand-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            # The other side would die of SIGBUS if this file could shrink under it; it checks this seal.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(fd, slots, slot_bytes), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Ring:
        """Map a ring that a client handed over. Raises InputError where it is not what the client says."""
        if not (0 < slots <= SLOTS_CAP and slot_bytes > 0 and slots * slot_bytes <= RING_BYTES_CAP):
            raise InputError(f"a ring of {slots} slots of {slot_bytes} bytes is not allowed", hint="ask for less")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0  # not a memfd
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != slots * slot_bytes:
            raise InputError(
                "the descriptor is no sealed memfd of the announced size",
                hint="create it with F_SEAL_SHRINK and slots * slot_bytes bytes",
            )
        return cls(fd, slots, slot_bytes)

    def lease(self) -> int:
        """A free slot's number, -1 where none is free."""
        return self._free.pop() if self._free else -1

    def release(self, slot: int) -> None:
        """Give a leased slot back."""
        if slot >= 0:
            self._free.append(slot)

    @property
    def leased(self) -> int:
        return self.slots - len(self._free)

    def slot(self, number: int) -> memoryview:
        """The bytes of one slot. Raises InputError for a number that the ring does not have."""
        if not 0 <= number < self.slots:
            raise InputError(f"slot {number} does not exist, the ring has {self.slots}", hint="mend the client")
        return self._slots[number]
