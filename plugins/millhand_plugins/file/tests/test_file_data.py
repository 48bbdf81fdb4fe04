"""The adapter on public data sets: every row is read, none is bad."""

import asyncio
import gzip
import os
from pathlib import Path

import pytest

from millhand.validation import validate
from millhand_plugins.file.adapter import FileAdapter
from millhand_plugins.file.options import FileOptions

DATA = os.environ.get("MILLHAND_DATA", "")
pytestmark = [pytest.mark.data, pytest.mark.skipif(not DATA, reason="MILLHAND_DATA names no folder of data sets")]


async def replay(path: Path, **options) -> tuple[list, FileAdapter]:
    reader = FileAdapter("asset", validate(FileOptions, {"path": str(path), **options}, "test"))
    try:
        await reader.open(None)
        return [reading async for batch in reader.batches() for reading in batch.readings], reader
    finally:
        await reader.close()


async def test_cmapss_unit_7():
    path = Path(DATA) / "cmapss" / "test_FD001.txt.gz"
    with gzip.open(path, "rt") as file:
        rows = [line.split() for line in file if line.split()[0] == "7"]
    names = ["unit", "cycle", "o1", "o2", "o3", *(f"s{place}" for place in range(1, 22))]
    options = {"header": names, "time_column": "cycle", "time_format": "index", "time_unit_s": 3600}
    readings, reader = await replay(path, where={"unit": 7}, **options)
    assert [reading.value for reading in readings] == [float(cell) for row in rows for cell in row[2:]]
    assert (readings[-1].clock.source_ns - readings[0].clock.source_ns) == (len(rows) - 1) * 3600 * 10**9
    assert not reader.counts


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("skab/**/*.csv.gz", {"time_column": "datetime"}),
        ("nab/**/*.csv*", {"time_column": "timestamp"}),
        ("nasa_battery/**/*.csv*", {"time_column": "Time", "time_format": "index"}),
        ("ai4i2020/*.csv*", {"time_format": "index"}),
    ],
)
def test_public_tables_hold_no_bad_row(pattern, options):
    paths = sorted(Path(DATA).glob(pattern))
    assert paths, f"no file matches {pattern}"
    for path in paths[::8]:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            rows = sum(1 for line in file if line.strip()) - 1
        readings, reader = asyncio.run(replay(path, **options))
        assert len({reading.name for reading in readings}) * rows == len(readings), path
        assert not reader.counts, path
