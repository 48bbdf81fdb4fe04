"""What the owner says about a recorded file: `[assets.options]` of `adapter = "file"`."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from millhand.records import AssetState
from millhand.validation import StrictTable


class Column(StrictTable):
    name: str = Field(min_length=1)
    """The reading's name."""
    column: str | int = ""
    """Header name, or position from 1; empty means the same as `name`."""
    unit: str = "1"
    """UCUM-like unit of the reading."""
    type: Literal["number", "text"] = "number"
    """`text` hands the cell over as it stands."""
    scale: float = 1.0
    """value = cell * scale + offset."""
    offset: float = 0.0
    low: float = float("-inf")
    """A value below is absurd: quality BAD."""
    high: float = float("inf")
    """A value above is absurd: quality BAD."""

    @property
    def source(self) -> str | int:
        return self.column if self.column != "" else self.name


class FileOptions(StrictTable):
    path: Path
    """The file to read; gzip is recognised by its content."""
    delimiter: Literal["auto", ",", ";", "|", "tab", "space"] = "auto"
    """`space` is any run of blanks and tabs; `auto` looks at the first rows."""
    header: bool | tuple[str, ...] = True
    """true: the first row holds the names; false: they are c1, c2, ...; a list: these names, and no such row."""
    encoding: str = "utf-8"
    """Any encoding whose line feed is one byte (utf-8, latin-1, cp1252); a byte order mark is skipped."""
    comment: str = ""
    """Lines that start with this text are skipped; empty: none."""
    decimal: Literal[".", ","] = "."
    missing: tuple[str, ...] = ("", "NA", "N/A", "null", "none", "-", "?")
    """Cells that mean "not recorded" (any letter case): they give no reading."""
    columns: tuple[Column, ...] = ()
    """The readings to make; empty: every numeric column, with unit "1"."""
    time_column: str | int = ""
    """Header name or position from 1; empty (with `index` only): the row's number in the file, from 0."""
    time_format: str = "iso"
    """iso, epoch_s, epoch_ms, index (a running number), or a strptime pattern such as "%d.%m.%Y %H:%M:%S"."""
    time_unit_s: float = Field(default=1.0, gt=0)
    """index: seconds that one count stands for."""
    start: datetime = datetime(2000, 1, 1, tzinfo=UTC)
    """index: the time of count 0."""
    time_zone: str = "UTC"
    """The zone of times that name none."""
    where: dict[str, float | str] = {}
    """Only rows whose columns have these values, for example {unit = 7}."""
    state_column: str | int = ""
    """Header name or position from 1 of the column that tells the asset's state; empty: none."""
    state_map: dict[str, AssetState] = {}
    """Cell -> running, idle, setup or service; a cell that is not listed means unknown."""
    speed: Literal["full"] | float = "full"
    """full, or how many times faster than recorded (1.0 = real time by source time)."""
    batch_rows: int = Field(default=50, ge=1, le=10_000)
    """The most rows in one batch. A batch also ends where the asset's state changes."""
    follow: bool = False
    """Wait at the end for more rows (plain files only); only whole lines are taken then."""
    poll_ms: int = Field(default=500, ge=10)
    """follow: how often to look for more."""
    on_change: Literal["error", "restart"] = "error"
    """What to do when the file is not the one that was read before: stop with an error, or read the new one."""

    @field_validator("speed")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError("must be 'full' or a factor above 0")
        return value

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        _zone(value)
        return value

    @field_validator("encoding")
    @classmethod
    def _byte_lines(cls, value: str) -> str:
        try:
            if "\n".encode(value) != b"\n":
                raise ValueError("its line feed is not one byte; convert the file to utf-8")
        except LookupError:
            raise ValueError("is no encoding that is known here") from None
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> FileOptions:
        if self.time_column == "" and self.time_format != "index":
            raise ValueError("time_column is missing; name it, or set time_format = 'index' to count rows")
        if self.time_format not in ("iso", "epoch_s", "epoch_ms", "index") and "%" not in self.time_format:
            raise ValueError(
                f"time_format '{self.time_format}' is none of iso, epoch_s, epoch_ms, index, and no pattern"
            )
        if self.follow and self.path.suffix == ".gz":
            raise ValueError("a gzip file cannot be followed; set follow = false or name the plain file")
        names = [column.name for column in self.columns]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"two columns give the reading '{doubled}'; give each its own name")
        return self

    @property
    def zone(self) -> tzinfo:
        return _zone(self.time_zone)


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("is no time zone that is known here; write UTC or a name such as Europe/Berlin") from None
