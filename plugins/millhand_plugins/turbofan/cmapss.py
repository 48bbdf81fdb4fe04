"""Files of NASA's C-MAPSS turbofan set: 26 numbers a row, one row a flight cycle, no header."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError
from millhand.pipeline.windows import Window

SUBSETS = ("FD001", "FD002", "FD003", "FD004")
COLUMNS = ("unit", "cycle", "setting_1", "setting_2", "setting_3", *(f"s{place}" for place in range(1, 22)))
CYCLE_NS = 3600 * 10**9
"""The set has no clock: one flight cycle counts as an hour."""
LONGEST_RUL_CYCLES = {"FD001": 145, "FD002": 195, "FD003": 145, "FD004": 195}
"""The test sets are cut at most this long before failure (table of ranges published with the set), ..."""
SHORTEST_RUL_CYCLES = 6
SHORTEST_HISTORY_CYCLES = 19
"""... at least this long before failure, and never earlier than this in an engine's life."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's life as recorded: `table` is [cycle, 26] float64, columns as in COLUMNS."""

    subset: str
    unit: int
    table: NDArray[np.float64]

    def window(self, cycle: int, length: int) -> Window:
        """The window that closes with the `cycle`-th row (from 1) and holds at most `length` rows."""
        rows = self.table[max(0, cycle - length) : cycle]
        times = (rows[:, 1] * CYCLE_NS).astype(np.int64)
        signals = {name: rows[:, place] for place, name in enumerate(COLUMNS) if place >= 2}
        name = f"{self.subset}-{self.unit}"
        return Window(name, int(times[0]), int(times[-1]), times, signals, complete=len(rows) == length)


def read_table(folder: Path, name: str) -> NDArray[np.float64]:
    """Read `folder/name`, or `name`.gz beside it, as [row, column]. Raises InputError where neither exists."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.exists():
        return np.loadtxt(plain, ndmin=2)
    if packed.exists():
        with gzip.open(packed, "rt") as file:
            return np.loadtxt(file, ndmin=2)
    raise InputError(f"'{plain}' does not exist", hint="give the folder that holds the C-MAPSS files, plain or .gz")


def read_engines(folder: Path, part: str, subset: str) -> list[Engine]:
    """Read every engine of `<part>_<subset>.txt`; `part` is "train" or "test"."""
    table = read_table(folder, f"{part}_{subset}.txt")
    return [Engine(subset, int(unit), table[table[:, 0] == unit]) for unit in np.unique(table[:, 0])]


def score(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """The PHM08 score, late predictions cost more: exp(-d/13)-1 for d<0, exp(d/10)-1 else (Saxena et al. 2008)."""
    error = predicted - true
    return float(np.where(error < 0, np.exp(-error / 13), np.exp(error / 10)).sum() - len(error))
