"""A recorded file as a stream of good rows, each with the place behind it; what is bad is counted and named."""

from __future__ import annotations

import codecs
import threading
from typing import NamedTuple

import msgspec

from millhand.errors import AdapterError
from millhand.faults import Faults
from millhand_plugins.file.lines import Line, LineFile, Position
from millhand_plugins.file.options import FileOptions
from millhand_plugins.file.table import Parsed, Table

_SAMPLE_ROWS = 100
# Rows looked at in one go: a filter that matches nothing must not hold a thread for minutes.
_SCAN_ROWS = 20_000


class Row(NamedTuple):
    parsed: Parsed
    position: Position


class RowReader:
    """Blocking; one call at a time (a lock sees to it, since a cancelled task leaves its thread running)."""

    def __init__(self, options: FileOptions, faults: Faults) -> None:
        self._options = options
        self._faults = faults
        self._file = LineFile(options.path)
        self._table: Table | None = None
        self._header_ahead = True
        self._row = 0
        self._lock = threading.Lock()

    def open(self, cursor: bytes | None) -> None:
        """Open the file behind `cursor`. Raises AdapterError, also for a file that was replaced or cut."""
        with self._lock:
            self._file.close()
            self._file.open()
            if self._options.follow and self._file.packed:
                raise AdapterError(
                    f"file '{self._options.path}' is gzip and cannot be followed",
                    hint="set follow = false, or name the plain file",
                    retriable=False,
                )
            self._learn()
            if self._table is None and not self._options.follow:
                raise AdapterError(f"file '{self._options.path}' holds no rows", hint="check the option 'path'")
            self._resume(cursor)

    def take(self, count: int) -> tuple[list[Row], bool]:
        """Read on until `count` good rows are there; the flag says that the end of the file is reached."""
        with self._lock:
            rows: list[Row] = []
            if self._table is None:
                self._learn()
            if self._table is None:
                return rows, True
            for scanned, line in enumerate(self._file.lines(whole=self._options.follow), 1):
                parsed = self._parse(self._table, line)
                if parsed is not None:
                    rows.append(Row(parsed, self._file.position(self._row)))
                if len(rows) >= count or scanned >= _SCAN_ROWS:
                    return rows, False
            return rows, True

    def refresh(self) -> None:
        """At the end of a followed file: go over to a file that took its place. Raises AdapterError."""
        with self._lock:
            if not self._file.replaced():
                return
            here = msgspec.msgpack.encode(self._file.position(self._row))
        self.open(here)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _resume(self, cursor: bytes | None) -> None:
        self._row, self._header_ahead = 0, self._options.header is True
        if cursor is None:
            return
        try:
            position = msgspec.msgpack.decode(cursor, type=Position)
            grown = self._file.resume(position)
        except (msgspec.MsgspecError, ValueError) as error:
            reason = "its saved position cannot be read" if isinstance(error, msgspec.MsgspecError) else str(error)
            if self._options.on_change == "restart":
                self._faults.note(
                    "restarts", f"file '{self._options.path}' is another one: {reason}; read from its start"
                )
                self._file.seek_start()
                return
            raise AdapterError(
                f"file '{self._options.path}' is not the one that was read before: {reason}",
                hint="put the old file back, or set on_change = 'restart' to read the new one from its start",
                retriable=False,
            ) from error
        self._row, self._header_ahead = position.row, self._header_ahead and position.offset == 0
        if grown:
            self._bad_row(position.line, "it was taken before it was whole; set follow = true for a growing file")

    def _learn(self) -> None:
        """Look at the first rows and settle delimiter, header and columns; stays unsettled while there is no row."""
        self._file.seek_start()
        sample: list[str] = []
        for line in self._file.lines(whole=self._options.follow):
            text = self._text(line)
            if text and not line.long:
                sample.append(text)
            if len(sample) >= _SAMPLE_ROWS:
                break
        self._file.seek_start()
        if len(sample) > (self._options.header is True):
            self._table = Table(self._options, sample)

    def _parse(self, table: Table, line: Line) -> Parsed | None:
        text = self._text(line)
        if not text:
            return None
        if self._header_ahead:
            self._header_ahead = False
            return None
        row = self._row
        self._row += 1
        try:
            if line.long:
                raise ValueError(f"it is longer than {len(line.raw)} bytes")
            parsed = table.parse(text, row)
        except ValueError as error:
            self._bad_row(line.number, str(error))
            return None
        for cell in parsed.cells if parsed is not None else ():
            if cell.complaint:
                self._faults.note(
                    "bad_cells",
                    f"file '{self._options.path}', line {line.number}, column '{cell.name}': {cell.complaint}",
                )
        return parsed

    def _bad_row(self, number: int, reason: str) -> None:
        self._faults.note("bad_rows", f"file '{self._options.path}', line {number} is skipped: {reason}")

    def _text(self, line: Line) -> str:
        """The line as text; empty for a blank line or a comment."""
        raw = line.raw
        if line.number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise AdapterError(
                    f"file '{self._options.path}' is UTF-16",
                    hint="convert it: iconv -f utf-16 -t utf-8 OLD > NEW",
                    retriable=False,
                )
            raw = raw.removeprefix(codecs.BOM_UTF8)
        text = raw.decode(self._options.encoding, errors="replace").strip("\r\n")
        if not text.strip() or (self._options.comment and text.startswith(self._options.comment)):
            return ""
        return text
