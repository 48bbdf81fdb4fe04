"""A file as numbered lines, with a position that outlives restarts and notices another file under the same name."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import msgspec

from millhand.errors import AdapterError

# A longer line is no table row: it is skipped, so that a file without line feeds cannot fill the memory.
LINE_BYTES = 1 << 20
HEAD_BYTES = 4096


class Position(msgspec.Struct, frozen=True, array_like=True):
    """A place between two lines; its MessagePack is the cursor.

    offset: bytes before it (of the unpacked text). line: lines before it. row: table rows before it, good or bad.
    head: digest of the first min(offset, 4096) bytes. tail: digest of the `tail_bytes` before the place.
    cut: the line before the place had no line feed yet.
    """

    offset: int
    line: int
    row: int
    head: bytes
    tail: bytes
    tail_bytes: int
    cut: bool = False


class Line(NamedTuple):
    """One line. `raw` keeps its line feed; `number` counts from 1; `long` marks one cut at LINE_BYTES."""

    raw: bytes
    number: int
    long: bool


class LineFile:
    """Reads lines of a plain or gzip file. All methods block: call them in a thread.

    Raises AdapterError naming the file for everything the file system or gzip may raise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.number = 0
        self._head = b""  # the first HEAD_BYTES of the file, or what there is of them
        self._last = b""  # the end of the last line
        self._cut = False
        self._file: BinaryIO | None = None
        self.packed = False

    def open(self) -> None:
        """Open at the start."""
        try:
            with self.path.open("rb") as probe:
                self.packed = probe.read(2) == b"\x1f\x8b"
            opener = gzip.open if self.packed else open
            self._file = cast(BinaryIO, opener(self.path, "rb"))
        except FileNotFoundError as error:
            raise AdapterError(f"file '{self.path}' does not exist", hint="check the option 'path'") from error
        except OSError as error:
            raise AdapterError(
                f"file '{self.path}' cannot be read: {error.strerror}",
                hint="check that it is a file and that millhand's user may read it",
            ) from error
        self._head = self._read(HEAD_BYTES)
        self.seek_start()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def seek_start(self) -> None:
        self._seek(0)
        self.offset, self.number, self._last, self._cut = 0, 0, b"", False

    def position(self, row: int) -> Position:
        """The place behind the last line that was read."""
        head = self._head[: min(self.offset, HEAD_BYTES)]
        return Position(self.offset, self.number, row, _digest(head), _digest(self._last), len(self._last), self._cut)

    def resume(self, position: Position) -> bool:
        """Go to `position`; True if a line that was taken without its line feed has grown since.

        Raises ValueError, saying what differs, if this is not the file that the position was taken from.
        """
        length = min(position.offset, HEAD_BYTES)
        if len(self._head) < length:
            raise ValueError("it is shorter than what was read before")
        if _digest(self._head[:length]) != position.head:
            raise ValueError("its first bytes differ from what was read before")
        self._seek(position.offset - position.tail_bytes)
        tail = self._read(position.tail_bytes)
        if len(tail) < position.tail_bytes:
            raise ValueError("it is shorter than what was read before")
        if _digest(tail) != position.tail:
            raise ValueError("the last row that was read before is another one now")
        self.offset, self.number, self._last, self._cut = position.offset, position.line, tail, position.cut
        if not position.cut or not (rest := self._readline()):
            return False
        self._advance(rest)
        self._cut = not rest.endswith(b"\n")
        return bool(rest.strip())

    def replaced(self) -> bool:
        """Whether the open file was cut short, or another file stands under its name now."""
        try:
            now = self.path.stat()
        except OSError:
            return False  # between a rotation's two renames there is no file; the next look decides
        opened = os.fstat(self._opened.fileno())
        return (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino) or now.st_size < self.offset

    def lines(self, *, whole: bool) -> Iterator[Line]:
        """Yield the lines from here to the end. `whole` leaves a last line without line feed for later."""
        while raw := self._readline():
            ended = raw.endswith(b"\n")
            long = not ended and len(raw) == LINE_BYTES
            if whole and not ended and not long:
                self._seek(self.offset)
                return
            self._advance(raw)
            if long:
                ended = self._skip_line()
            self.number += 1
            self._cut = not ended
            yield Line(raw, self.number, long)

    def _skip_line(self) -> bool:
        """Move behind the next line feed; False if the file ends before one."""
        while part := self._readline():
            self._advance(part)
            if part.endswith(b"\n"):
                return True
        return False

    def _advance(self, raw: bytes) -> None:
        if len(self._head) < HEAD_BYTES and self.offset + len(raw) > len(self._head):
            self._head = (self._head[: self.offset] + raw)[:HEAD_BYTES]  # the file grew since it was opened
        self.offset += len(raw)
        self._last = raw[-HEAD_BYTES:]

    def _readline(self) -> bytes:
        try:
            return self._opened.readline(LINE_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(error) from error

    def _read(self, size: int) -> bytes:
        try:
            return self._opened.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(error) from error

    def _seek(self, offset: int) -> None:
        try:
            self._opened.seek(offset)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(error) from error

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise AdapterError(f"file '{self.path}' is closed", hint="open the adapter before its batches are read")
        return self._file

    def _damaged(self, error: Exception) -> AdapterError:
        hint = "it is cut or damaged gzip; copy it again" if self.packed else "check the disk or network share"
        return AdapterError(f"file '{self.path}' cannot be read behind byte {self.offset}: {error}", hint=hint)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
