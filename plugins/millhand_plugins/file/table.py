"""Lines of text -> rows of typed cells: delimiter, header, the columns to read, bad rows and bad cells."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from millhand.errors import AdapterError, suggestion
from millhand.records import AssetState, Quality
from millhand_plugins.file.options import Column, FileOptions
from millhand_plugins.file.times import time_parser

# No physical quantity in any common unit is larger: such a cell is damage, not a measurement.
ABSURD = 1e30

_DELIMITERS = {"tab": "\t", "space": " "}
_SNIFFED = (",", ";", "\t", "|", " ")  # blanks last: they also stand inside times and names


class Cell(NamedTuple):
    """A value to report; `complaint` says why a BAD one is bad."""

    name: str
    value: float | str | None
    unit: str
    quality: Quality
    complaint: str = ""


class Parsed(NamedTuple):
    """A good row."""

    time_ns: int
    cells: tuple[Cell, ...]
    state: AssetState | None


class Table:
    """How the rows of one file are read. `sample`: its first lines, header included; at least one row.

    Raises AdapterError naming file and column if the sample does not fit the options.
    """

    def __init__(self, options: FileOptions, sample: Sequence[str]) -> None:
        self._options = options
        self._missing = frozenset(text.lower() for text in options.missing)
        delimiter = self._delimiter(sample)
        self._split = _splitter(delimiter)
        rows = [row for row in map(self._try_split, sample) if row]
        self.names = self._names(rows)
        self._time = self._place("time_column", options.time_column) if options.time_column != "" else None
        self._parse_time = time_parser(options)
        self._state = self._place("state_column", options.state_column) if options.state_column != "" else None
        self._states = {self._key(cell): state for cell, state in options.state_map.items()}
        self._where = [(self._place("where", name), self._key(value)) for name, value in options.where.items()]
        self._columns = self._chosen(rows)

    def parse(self, text: str, row: int) -> Parsed | None:
        """Read one line that is no header; `row` counts from 0. None: `where` leaves it out.

        Raises ValueError, saying what is wrong, for a row that cannot be used.
        """
        cells = self._split(text)
        if len(cells) != len(self.names):
            cells = self._fitted(cells)
        for place, wanted in self._where:
            if self._key(cells[place]) != wanted:
                return None
        time_text = str(row) if self._time is None else cells[self._time].strip()
        try:
            time_ns = self._parse_time(self._point(time_text))
        except ValueError as error:
            raise ValueError(f"time '{time_text[:40]}' cannot be read: {error}") from error
        state = None
        if self._state is not None:
            state = self._states.get(self._key(cells[self._state]), AssetState.UNKNOWN)
        found = (self._cell(column, cells[place].strip()) for place, column in self._columns)
        return Parsed(time_ns, tuple(cell for cell in found if cell is not None), state)

    def _cell(self, column: Column, text: str) -> Cell | None:
        if text.lower() in self._missing:
            return None
        if column.type == "text":
            return Cell(column.name, text, column.unit, Quality.GOOD)
        try:
            value = self._number(text) * column.scale + column.offset
        except ValueError:
            return Cell(column.name, None, column.unit, Quality.BAD, f"'{text[:40]}' is no number")
        if not math.isfinite(value) or abs(value) > ABSURD or not column.low <= value <= column.high:
            return Cell(column.name, None, column.unit, Quality.BAD, f"'{text[:40]}' is absurd")
        return Cell(column.name, value, column.unit, Quality.GOOD)

    def _number(self, text: str) -> float:
        if "_" in text:  # Python's float() takes 1_000; a machine's log never means it
            raise ValueError(text)
        return float(self._point(text))

    def _point(self, text: str) -> str:
        return text.replace(",", ".") if self._options.decimal == "," else text

    def _key(self, value: float | str) -> float | str:
        """What two cells are compared by: 7, 7.0 and "7" are the same."""
        if isinstance(value, str):
            value = value.strip()
            try:
                return self._number(value)
            except ValueError:
                return value
        return float(value)

    def _fitted(self, cells: list[str]) -> list[str]:
        """Drop empty cells behind the last column (a delimiter at the end of each row). Raises ValueError."""
        width = len(self.names)
        if len(cells) < width or any(cell.strip() for cell in cells[width:]):
            raise ValueError(f"it has {len(cells)} cells instead of {width}")
        return cells[:width]

    def _delimiter(self, sample: Sequence[str]) -> str:
        if self._options.delimiter != "auto":
            return _DELIMITERS.get(self._options.delimiter, self._options.delimiter)
        for delimiter in _SNIFFED:
            if delimiter == "," and self._options.decimal == ",":
                continue
            split = _splitter(delimiter)
            widths = Counter(len(cells) for cells in (_attempt(split, text) for text in sample) if cells)
            width, votes = widths.most_common(1)[0] if widths else (0, 0)
            if width > 1 and votes >= 0.8 * len(sample):
                return delimiter
        return ";" if self._options.decimal == "," else ","

    def _try_split(self, text: str) -> list[str]:
        return _attempt(self._split, text)

    def _names(self, rows: Sequence[list[str]]) -> list[str]:
        header = self._options.header
        if header is True and rows:
            names = [name.strip() or f"c{place}" for place, name in enumerate(rows[0], 1)]
            while len(names) > 1 and rows[0][len(names) - 1].strip() == "":
                names.pop()  # a delimiter at the end of the header
            return names
        widths = Counter(len(row) for row in rows)
        width = widths.most_common(1)[0][0] if widths else 0
        if isinstance(header, tuple):
            if width < len(header) or not any(self._fits(row, len(header)) for row in rows):
                raise AdapterError(
                    f"file '{self._options.path}': 'header' names {len(header)} columns, its rows have {width}",
                    hint="name every column, or set 'delimiter'",
                    retriable=False,
                )
            return list(header)
        return [f"c{place}" for place in range(1, width + 1)]

    @staticmethod
    def _fits(row: list[str], width: int) -> bool:
        return len(row) >= width and not any(cell.strip() for cell in row[width:])

    def _place(self, key: str, column: str | int) -> int:
        if isinstance(column, int):
            if 1 <= column <= len(self.names):
                return column - 1
            problem = f"{key} = {column}, but there are {len(self.names)} columns"
        elif self.names.count(column) == 1:
            return self.names.index(column)
        elif column in self.names:
            problem = f"{key} = '{column}', but {self.names.count(column)} columns are called so"
        else:
            problem = f"{key} = '{column}' is no column{suggestion(column, self.names)}"
        shown = ", ".join(self.names)
        raise AdapterError(
            f"file '{self._options.path}': {problem}",
            hint=f"name one of: {shown[:300]}; or give its position from 1; or set 'delimiter' or 'header'",
            retriable=False,
        )

    def _chosen(self, rows: Sequence[list[str]]) -> list[tuple[int, Column]]:
        if self._options.columns:
            return [(self._place("columns", column.source), column) for column in self._options.columns]
        body = [row for row in (rows[1:] if self._options.header is True else rows) if self._fits(row, len(self.names))]
        taken = {self._time, self._state, *(place for place, _ in self._where)}
        free = [place for place in range(len(self.names)) if place not in taken]
        chosen = [place for place in free if self._is_numeric([row[place].strip() for row in body])]
        if not chosen:
            raise AdapterError(
                f"file '{self._options.path}': no column of its first rows is numeric",
                hint="set 'delimiter', 'decimal' or 'header', or name the 'columns'",
                retriable=False,
            )
        doubled = {name for name, count in Counter(self.names).items() if count > 1}
        return [
            (place, Column(name=f"{name}_{place + 1}" if name in doubled else name, column=place + 1))
            for place, name in ((place, self.names[place]) for place in chosen)
        ]

    def _is_numeric(self, cells: Sequence[str]) -> bool:
        """At least half of the cells that are not missing are numbers."""
        present = [cell for cell in cells if cell.lower() not in self._missing]
        return bool(present) and 2 * sum(isinstance(self._key(cell), float) for cell in present) >= len(present)


def _splitter(delimiter: str) -> Callable[[str], list[str]]:
    """Return a function from a line to its cells that raises ValueError for broken quotes."""

    def split(text: str) -> list[str]:
        if '"' not in text:
            return text.split() if delimiter == " " else text.split(delimiter)
        try:
            if delimiter == " ":
                text = text.strip().replace("\t", " ")
            cells = next(csv.reader([text], delimiter=delimiter, strict=True, skipinitialspace=True))
        except csv.Error as error:
            raise ValueError(f"broken quotes: {error}") from error
        return cells

    return split


def _attempt(split: Callable[[str], list[str]], text: str) -> list[str]:
    try:
        return split(text)
    except ValueError:
        return []
