"""A CSV file as a model's input tensors, and tensors as CSV. One line is one row of the batch.

A header names inputs: `speed` for an input of one value a row, `features[0]`, `features[1]`, … (row-major) for one of
several. A model with one input takes a file without a header, or with names of its own, in the columns' order.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.serving.tensors import DATATYPES

_INDEXED = re.compile(r"(.+)\[(\d{1,9})\]")
_GAPS = ("", "nan", "na", "null", "none")
"""What programs write where a value is missing."""
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


class Spec(NamedTuple):
    """An input tensor as the model declares it; -1 is a free dimension, the first is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def row_size(self) -> int:
        """Values in one row; 0 where a dimension is free."""
        return math.prod(self.shape[1:]) if -1 not in self.shape[1:] else 0


Row = tuple[int, list[str]]
"""(line number, cells)."""


def read_csv(text: str, specs: Sequence[Spec], label: str) -> dict[str, NDArray[Any]]:
    """Read `text` into arrays of the models' dtypes. Raises InputError naming `label`, line, column and cell."""
    try:
        reader = csv.reader(io.StringIO(text), strict=True)
        rows: list[Row] = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(f"'{label}' is not valid CSV: {error}", hint="separate cells with commas") from error
    header: list[str] = []
    if rows and _is_header(rows[0][1], specs):
        header = [cell.strip() for cell in rows.pop(0)[1]]
    width = len(header or (rows[0][1] if rows else ()))
    columns = _columns(header, width, specs, label) if width else {}
    if not rows:
        raise InputError(f"'{label}' holds no row of values", hint="give one line for each row of the request")
    for line, cells in rows:
        if len(cells) != width:
            raise InputError(
                f"'{label}' line {line} has {len(cells)} cells, the first line has {width}",
                hint="give every line one cell a column, separated by commas",
            )
    return {spec.name: _tensor(spec, columns[spec.name], rows, header, label) for spec in specs}


def write_csv(tensors: Mapping[str, NDArray[Any]], more: Mapping[str, Sequence[Any]]) -> str:
    """One line a row, a header as `read_csv` takes it; `more`: further columns of as many values as rows."""
    rows = len(next(iter(tensors.values())))
    columns: dict[str, list[Any]] = {}
    for name, array in tensors.items():
        flat = array.reshape(rows, -1)
        for index in range(flat.shape[1]):
            columns[name if flat.shape[1] == 1 else f"{name}[{index}]"] = flat[:, index].tolist()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*columns, *more])
    writer.writerows(zip(*columns.values(), *more.values(), strict=True))
    return buffer.getvalue()


def _is_header(cells: list[str], specs: Sequence[Spec]) -> bool:
    """Whether the first line names things: all are names of inputs, or none is a value of any."""
    names = {spec.name for spec in specs}
    if all(_named(cell, names)[0] in names for cell in cells):
        return True
    if len(specs) > 1:
        return True  # it must be one; what it names wrongly is said where columns are sought
    return specs[0].datatype != "BYTES" and not any(_is_value(cell) for cell in cells)


def _named(cell: str, names: set[str]) -> tuple[str, int]:
    """(input, index) of a column's name; ("", 0) for one that is no input's."""
    name = cell.strip()
    if name in names:
        return name, 0
    match = _INDEXED.fullmatch(name)
    return (match[1], int(match[2])) if match and match[1] in names else ("", 0)


def _is_value(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() in (*_BOOLS, "")
    return True


def _columns(header: list[str], width: int, specs: Sequence[Spec], label: str) -> dict[str, list[int]]:
    """Input -> the columns that hold its row, in row-major order."""
    names = {spec.name for spec in specs}
    found = [_named(cell, names) for cell in header]
    if len(specs) == 1 and not (found and all(name for name, _ in found)):
        return {specs[0].name: list(range(width))}
    places: dict[str, dict[int, int]] = {name: {} for name in names}
    for column, (cell, (name, index)) in enumerate(zip(header, found, strict=True)):
        if not name:
            raise InputError(
                f"'{label}' column {column + 1}: '{cell}' is no input of the model{suggestion(cell, names)}",
                hint=f"name the columns in the first line: {_example(specs)}",
            )
        if index in places[name]:
            raise InputError(f"'{label}' has two columns '{cell}'", hint="name each column once")
        places[name][index] = column
    for spec in specs:
        size = spec.row_size or len(places[spec.name])
        missing = [index for index in range(max(size, 1)) if index not in places[spec.name]]
        if missing or len(places[spec.name]) > size:
            raise InputError(
                f"'{label}' gives {len(places[spec.name])} columns for input '{spec.name}', a row of it takes {size}"
                + (f"; '{_column(spec, missing[0])}' is missing" if missing else ""),
                hint=f"name the columns in the first line: {_example(specs)}",
            )
    return {name: [found[index] for index in sorted(found)] for name, found in places.items()}


def _column(spec: Spec, index: int) -> str:
    return spec.name if spec.row_size == 1 else f"{spec.name}[{index}]"


def _example(specs: Sequence[Spec]) -> str:
    parts = []
    for spec in specs:
        last = _column(spec, spec.row_size - 1) if spec.row_size > 1 else ""
        parts.append(f"{_column(spec, 0)},…,{last}" if last else _column(spec, 0))
    return ",".join(parts)


def _tensor(spec: Spec, columns: list[int], rows: list[Row], header: list[str], label: str) -> NDArray[Any]:
    shape = _row_shape(spec, len(columns), label)
    parse = _parser(spec.datatype)
    values: list[Any] = []
    for line, cells in rows:
        for column in columns:
            try:
                values.append(parse(cells[column]))
            except ValueError as error:
                name = f" ({header[column]})" if header else ""
                cell = cells[column].strip()
                raise InputError(
                    f"'{label}' line {line}, column {column + 1}{name}: '{cell}' {error}",
                    hint=f"input '{spec.name}' takes {spec.datatype}{_gap_hint(cell, spec.datatype)}",
                ) from None
    return np.array(values, dtype=DATATYPES[spec.datatype]).reshape(len(rows), *shape)


def _gap_hint(cell: str, datatype: str) -> str:
    if cell.lower() not in _GAPS:
        return ""
    return "; fill gaps" + (", or send them as NaN in .npy or .npz" if datatype.startswith("FP") else "")


def _row_shape(spec: Spec, width: int, label: str) -> tuple[int, ...]:
    """The shape of one row of `width` values. Raises InputError where they do not fit the input."""
    shape = spec.shape[1:]
    if shape.count(-1) > 1:
        raise InputError(
            f"'{label}': input '{spec.name}' has several free dimensions, {list(spec.shape)}; CSV cannot tell them",
            hint="send .npy, .npz or JSON",
        )
    known = math.prod(size for size in shape if size != -1)
    if (width != known) if -1 not in shape else (width % known or not width):
        raise InputError(
            f"'{label}' has {width} columns, input '{spec.name}' of shape {list(spec.shape)} takes {known} a row"
            + (" or a multiple of it" if -1 in shape else ""),
            hint="give one line for each row of the request",
        )
    return tuple(width // known if size == -1 else size for size in shape)


def _parser(datatype: str) -> Callable[[str], Any]:
    """Cell -> value. The parser raises ValueError with what is wrong."""
    if datatype == "BYTES":
        return str.encode
    if datatype == "BOOL":
        return _bool
    dtype = np.dtype(DATATYPES[datatype])
    if dtype.kind == "f":
        return lambda cell: _float(cell, datatype, float(np.finfo(dtype).max))
    limits = np.iinfo(dtype)
    return lambda cell: _integer(cell, datatype, int(limits.min), int(limits.max))


def _bool(cell: str) -> bool:
    try:
        return _BOOLS[cell.strip().lower()]
    except KeyError:
        raise ValueError("is neither true nor false") from None


def _float(cell: str, datatype: str, largest: float) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise ValueError("is no number") from None
    if not math.isfinite(value):
        raise ValueError("is no finite number")
    if abs(value) > largest:
        raise ValueError(f"is too large for {datatype}")
    return value


def _integer(cell: str, datatype: str, least: int, largest: int) -> int:
    try:
        value = int(cell)
    except ValueError:
        number = _float(cell, datatype, math.inf)
        if not number.is_integer():
            raise ValueError("is no whole number") from None
        value = int(number)
    if not least <= value <= largest:
        raise ValueError(f"does not fit {datatype}, {least} to {largest}")
    return value
