import asyncio
import gzip
import random
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millhand.errors import AdapterError, ConfigError
from millhand.records import AssetState, Batch, Quality
from millhand.validation import validate
from millhand_plugins.file.adapter import FileAdapter
from millhand_plugins.file.options import FileOptions


def adapter(path: Path, **options) -> FileAdapter:
    defaults = {"time_column": "t", "time_format": "epoch_s"} if "time_format" not in options else {}
    return FileAdapter("pump-1", validate(FileOptions, {"path": str(path), **defaults, **options}, "test"))


async def drain(reader: FileAdapter, cursor: bytes | None = None) -> list[Batch]:
    try:
        await reader.open(cursor)
        return [batch async for batch in reader.batches()]
    finally:
        await reader.close()


def values(batches: list[Batch]) -> list[tuple]:
    return [
        (reading.clock.source_ns, reading.name, reading.value, reading.quality.name)
        for batch in batches
        for reading in batch.readings
    ]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


PLAIN = "t,temp,press\n1,20.5,3\n2,20.75,4\n3,21,5\n"


async def test_every_numeric_column_becomes_a_reading(tmp_path):
    batches = await drain(adapter(write(tmp_path / "a.csv", PLAIN)))
    assert values(batches)[:3] == [
        (10**9, "temp", 20.5, "GOOD"),
        (10**9, "press", 3.0, "GOOD"),
        (2 * 10**9, "temp", 20.75, "GOOD"),
    ]
    assert len(batches) == 1
    clock = batches[0].readings[0].clock
    assert clock.synced
    assert abs(clock.receive_ns - time.time_ns()) < 60e9


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (PLAIN.replace(",", ";"), {}),
        (PLAIN.replace(",", "\t"), {}),
        (PLAIN.replace(",", "  "), {}),
        (PLAIN.replace(",", "|"), {}),
        (PLAIN.replace("\n", "\r\n"), {}),
        ("\ufeff" + PLAIN, {}),
        (PLAIN.replace("\n", "\n\n \n"), {}),
        (PLAIN.replace("\n", ",\n"), {}),
        (PLAIN.rstrip("\n"), {}),
        ("# made by a logger\n" + PLAIN, {"comment": "#"}),
        (PLAIN.replace(",", ";").replace(".", ","), {"decimal": ","}),
        ('"t","temp","press"\n"1","20.5","3"\n"2","20.75","4"\n3,21,5\n', {}),
        (PLAIN.split("\n", 1)[1], {"header": ["t", "temp", "press"]}),
        (
            PLAIN.split("\n", 1)[1],
            {
                "header": False,
                "time_column": 1,
                "time_format": "epoch_s",
                "columns": [{"name": "temp", "column": "c2"}, {"name": "press", "column": 3}],
            },
        ),
    ],
)
async def test_dialects_read_the_same(tmp_path, text, options):
    expected = values(await drain(adapter(write(tmp_path / "plain.csv", PLAIN))))
    assert values(await drain(adapter(write(tmp_path / "other.csv", text), **options))) == expected
    packed = tmp_path / "other.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert values(await drain(adapter(packed, **options))) == expected


async def test_blanks_inside_times_do_not_split_a_row(tmp_path):
    text = "when,value\n2020-03-09 10:14:33,1\n2020-03-09 10:14:34,2\n"
    path = write(tmp_path / "a.csv", text)
    found = values(await drain(adapter(path, time_column="when", time_format="iso")))
    start = int(datetime(2020, 3, 9, 10, 14, 33, tzinfo=UTC).timestamp()) * 10**9
    assert found == [(start, "value", 1.0, "GOOD"), (start + 10**9, "value", 2.0, "GOOD")]


@pytest.mark.parametrize(
    ("cell", "options", "expected_ns"),
    [
        ("2026-01-02T03:04:05.000006Z", {"time_format": "iso"}, 1767323045000006000),
        ("2026-01-02 03:04:05", {"time_format": "iso", "time_zone": "Europe/Berlin"}, 1767319445000000000),
        ("1767323045.123456789", {"time_format": "epoch_s"}, 1767323045123456789),
        ("1767323045123.25", {"time_format": "epoch_ms"}, 1767323045123250000),
        ("02.01.2026 03:04", {"time_format": "%d.%m.%Y %H:%M"}, 1767323040000000000),
        ("3", {"time_format": "index", "time_unit_s": 3600.0}, 946684800000000000 + 3 * 3600 * 10**9),
        ("3", {"time_format": "index", "start": "1970-01-02T00:00:00Z"}, 86403 * 10**9),
    ],
)
async def test_time_formats(tmp_path, cell, options, expected_ns):
    path = write(tmp_path / "a.csv", f"t;v\n{cell};1\n{cell};1\n")
    found = values(await drain(adapter(path, time_column="t", **options)))
    assert [item[0] for item in found] == [expected_ns] * 2


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("0001-01-01 00:00:00", {"time_format": "iso", "time_zone": "Asia/Tokyo"}),
        ("1e999999999", {"time_format": "epoch_s"}),
        ("1e999999", {"time_format": "epoch_ms"}),
        ("sNaN", {"time_format": "epoch_ms"}),
        ("Infinity", {"time_format": "index"}),
        ("31.02.2026", {"time_format": "%d.%m.%Y"}),
        ("", {"time_format": "iso"}),
    ],
)
async def test_a_row_with_an_impossible_time_is_skipped(tmp_path, cell, options):
    reader = adapter(write(tmp_path / "a.csv", f"t;v\n{cell};1\n"), time_column="t", **options)
    assert await drain(reader) == []
    assert reader.counts == {"bad_rows": 1}


async def test_absurd_numbers_are_bad_without_any_limit(tmp_path):
    path = write(tmp_path / "a.csv", "t,v\n1,1e31\n2,-1e31\n3,1e29\n4,0\n")
    assert [item[2] for item in values(await drain(adapter(path)))] == [None, None, 1e29, 0.0]


async def test_rows_without_a_time_column_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", "v\n5\nbad row, here\n7\n")
    reader = adapter(path, time_format="index", time_unit_s=0.5)
    base = 946684800 * 10**9
    assert values(await drain(reader)) == [(base, "v", 5.0, "GOOD"), (base + 10**9, "v", 7.0, "GOOD")]
    assert reader.counts["bad_rows"] == 1


async def test_bad_cells_are_bad_readings_and_bad_rows_are_counted_and_named(tmp_path, caplog):
    text = (
        "t,temp,press\n1,nan,1\n2,inf,1\n3,1e99,1\n4,hot,1\n5,1_000,1\n6,500,1\n7,NA,1\n8,1\n9,1,1,1\nnever,1,1\n"
        '10,"1,1\n-5,1,1\n1e40,1,1\n11,20,1\n'
    )
    reader = adapter(
        write(tmp_path / "a.csv", text),
        columns=[{"name": "temp", "unit": "Cel", "low": -40, "high": 150}, {"name": "press", "unit": "bar"}],
    )
    batches = await drain(reader)
    temps = [(r.clock.source_ns // 10**9, r.value, r.quality) for r in batches[0].readings if r.name == "temp"]
    assert temps == [(second, None, Quality.BAD) for second in range(1, 7)] + [(11, 20.0, Quality.GOOD)]
    pressures = [r.value for r in batches[0].readings if r.name == "press"]
    assert pressures == [1.0] * 8  # the missing temperature of second 7 drops nothing else
    assert reader.counts == {"bad_cells": 6, "bad_rows": 6}
    for line in (9, 10, 11, 12, 13, 14):
        assert f"line {line} is skipped" in caplog.text
    assert "line 5, column 'temp': 'hot' is no number" in caplog.text


async def test_a_thousand_bad_cells_fill_no_log(tmp_path, caplog):
    text = "t,v,w\n" + "".join(f"{second},x,1\n" for second in range(1, 1001))
    reader = adapter(write(tmp_path / "a.csv", text), columns=[{"name": "v"}])
    await drain(reader)
    assert reader.counts["bad_cells"] == 1000
    assert len(caplog.records) == 12  # the first ten, the hundredth, the thousandth


async def test_where_scale_text_and_state(tmp_path):
    text = "unit cycle mode note raw\n1 1 0 a 10\n2 1 0 b 20\n2 2 0 c 30\n2 3 1.0 d 40\n2 4 9 e 50\n"
    reader = adapter(
        write(tmp_path / "a.txt", text),
        time_column="cycle",
        time_format="index",
        where={"unit": 2},
        state_column="mode",
        state_map={"0": "idle", "1": "running"},
        columns=[{"name": "v", "column": "raw", "scale": 0.1, "offset": 1}, {"name": "note", "type": "text"}],
    )
    batches = await drain(reader)
    assert [batch.state for batch in batches] == [AssetState.IDLE, AssetState.RUNNING, AssetState.UNKNOWN]
    assert [r.value for batch in batches for r in batch.readings] == [3.0, "b", 4.0, "c", 5.0, "d", 6.0, "e"]


async def test_latin_1_header_and_undecodable_bytes(tmp_path):
    path = write(tmp_path / "a.csv", "t;temp °C;x\n1;5;\xff\n2;6;7\n", "latin-1")
    assert [r[2] for r in values(await drain(adapter(path, encoding="latin-1", columns=[{"name": "temp °C"}])))] == [
        5,
        6,
    ]
    found = values(await drain(adapter(path, columns=[{"name": "x"}])))
    assert [(r[2], r[3]) for r in found] == [(None, "BAD"), (7.0, "GOOD")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_format": "iso"}, "time_column"),
        ({"time_format": "epoch", "time_column": "t"}, "epoch_s"),
        ({"speed": 0}, "factor above 0"),
        ({"speed": "fast"}, "speed"),
        ({"time_zone": "Mars/Olympus"}, "Europe/Berlin"),
        ({"encoding": "utf-16"}, "utf-8"),
        ({"encoding": "klingon"}, "encoding"),
        ({"colums": []}, "did you mean 'columns'"),
        ({"columns": [{"name": "a"}, {"name": "a"}]}, "two columns give the reading 'a'"),
        ({"path": "x.csv.gz", "follow": True}, "gzip"),
    ],
)
def test_options_are_checked(options, words):
    table = {"path": "x.csv", "time_column": "t", **options}
    if "time_column" not in options and "time_format" in options:
        del table["time_column"]
    with pytest.raises(ConfigError, match=words):
        validate(FileOptions, table, "test")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", {}, "holds no rows"),
        (b"t,v\n", {}, "holds no rows"),
        (b"time,v\n1,2\n", {}, "time_column = 't' is no column"),
        (b"t,v\n1,2\n", {"columns": [{"name": "w"}]}, "'w' is no column"),
        (b"t,v\n1,2\n", {"columns": [{"name": "w", "column": 3}]}, "there are 2 columns"),
        (b"t,v,v\n1,2,3\n", {"columns": [{"name": "v"}]}, "2 columns are called so"),
        (b"t,v\n1,x\n", {}, "no column of its first rows is numeric"),
        (b"1,2,3\n", {"header": ["t", "v"]}, "'header' names 2 columns, its rows have 3"),
        ("t,v\n1,2\n".encode("utf-16"), {}, "UTF-16"),
        (gzip.compress(PLAIN.encode(), mtime=0), {"follow": True}, "cannot be followed"),
    ],
)
async def test_files_that_do_not_fit_are_refused_with_a_remedy(tmp_path, content, options, words):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=words) as caught:
        await drain(adapter(path, **options), None)
    assert caught.value.hint
    assert str(path) in caught.value.message


async def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        await drain(adapter(tmp_path / "none.csv"), None)
    with pytest.raises(AdapterError, match="cannot be read"):
        await drain(adapter(tmp_path), None)


async def test_cut_gzip_gives_its_whole_rows_then_an_error(tmp_path):
    rng = random.Random(1)
    text = "t,v\n" + "".join(f"{second},{rng.random()}\n" for second in range(20_000))
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(text.encode())[:-5_000])
    reader = adapter(path)
    await reader.open(None)
    seen = 0
    with pytest.raises(AdapterError, match=r"cannot be read behind byte \d+"):
        async for batch in reader.batches():
            seen += len(batch.readings)
    assert 10_000 < seen < 20_000
    await reader.close()
    await reader.close()


ROW = st.one_of(
    st.tuples(st.integers(0, 10**6), st.floats(allow_nan=True, allow_infinity=True)).map(
        lambda row: f"{row[0]},{row[1]}"
    ),
    st.sampled_from(
        [
            "",
            "  ",
            "1",
            "1,2,3",
            '"',
            "1,x",
            "x,1",
            "# note",
            "1e999999999,1",
            "1e999999,1",
            "nan,1",
            "-inf,1",
            '"3","4"',
            ",",
            "\x00,\x00",
        ]
    ),
    st.sampled_from(["1e999999999,1", "1e999999,1", "nan,1", "-inf,1", "1_0,1"]),
    st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=("Cs",)), max_size=20),
)
LINES = st.lists(st.tuples(ROW, st.sampled_from(["\n", "\r\n"])), max_size=25)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=LINES,
    last=st.booleans(),
    packed=st.booleans(),
    size=st.integers(1, 7),
)
def test_resuming_anywhere_gives_exactly_the_rest(tmp_path, rows, last, packed, size):
    text = "t,v\n7,7\n" + "".join(row + end for row, end in rows)
    text = text if last else text.rstrip("\r\n")
    path = tmp_path / "a.csv"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    options = {"delimiter": ",", "columns": [{"name": "v"}], "comment": "#", "batch_rows": size}

    async def check() -> None:
        whole = await drain(adapter(path, **options))
        assert whole
        for index, batch in enumerate(whole):
            rest = await drain(adapter(path, **options), batch.cursor)
            assert values(rest) == values(whole[index + 1 :])
            assert [item.cursor for item in rest] == [item.cursor for item in whole[index + 1 :]]

    asyncio.run(check())


async def test_a_grown_file_continues(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    first = await drain(adapter(path))
    with path.open("a") as file:
        file.write("4,22,6\n")
    assert values(await drain(adapter(path), first[-1].cursor))[0] == (4 * 10**9, "temp", 22.0, "GOOD")


async def test_a_row_taken_before_it_was_whole_is_said(tmp_path, caplog):
    path = write(tmp_path / "a.csv", PLAIN + "4,22,6")
    first = await drain(adapter(path))
    assert values(first)[-1] == (4 * 10**9, "press", 6.0, "GOOD")
    with path.open("a") as file:
        file.write("5\n5,23,7\n")
    reader = adapter(path)
    rest = await drain(reader, first[-1].cursor)
    assert [item[:2] for item in values(rest)] == [(5 * 10**9, "temp"), (5 * 10**9, "press")]
    assert reader.counts["bad_rows"] == 1
    assert "line 5 is skipped: it was taken before it was whole" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN[:20], "shorter"),
        (PLAIN.replace("20.5", "99.5"), "first bytes differ"),
        (PLAIN.replace("press", "power"), "first bytes differ"),
    ],
)
async def test_a_changed_file_is_an_error_or_a_restart(tmp_path, text, words):
    path = write(tmp_path / "a.csv", PLAIN)
    cursor = (await drain(adapter(path)))[-1].cursor
    write(path, text)
    with pytest.raises(AdapterError, match=words) as caught:
        await drain(adapter(path), cursor)
    assert not caught.value.retriable
    assert "on_change = 'restart'" in caught.value.hint
    reader = adapter(path, on_change="restart")
    assert values(await drain(reader, cursor)) == values(await drain(adapter(path)))
    assert reader.counts["restarts"] == 1


async def test_a_change_far_behind_the_head_is_seen(tmp_path):
    lines = ["t,v"] + [f"{second},1" for second in range(5000)]
    path = write(tmp_path / "a.csv", "\n".join(lines) + "\n")
    cursor = (await drain(adapter(path)))[-1].cursor
    write(path, "\n".join([*lines[:-1], "4999,2"]) + "\n")
    with pytest.raises(AdapterError, match="last row that was read before is another one"):
        await drain(adapter(path), cursor)


async def test_a_foreign_cursor_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    with pytest.raises(AdapterError, match="saved position cannot be read"):
        await drain(adapter(path), b"\xc1 nonsense")


class Follower:
    """Collects what a following adapter yields, so that a test can wait for it."""

    def __init__(self, reader: FileAdapter) -> None:
        self.reader = reader
        self.batches: list[Batch] = []
        self.task: asyncio.Task | None = None
        self.news = asyncio.Event()

    async def __aenter__(self) -> "Follower":
        await self.reader.open(None)
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.reader.close()

    async def _run(self) -> None:
        async for batch in self.reader.batches():
            self.batches.append(batch)
            self.news.set()

    async def until(self, count: int) -> list[tuple]:
        async with asyncio.timeout(30):
            while len(values(self.batches)) < count:
                self.news.clear()
                news = asyncio.ensure_future(self.news.wait())
                await asyncio.wait([self.task, news], return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                if self.task.done():
                    self.task.result()
        return values(self.batches)


async def test_following_takes_whole_lines_only_and_survives_rotation(tmp_path):
    path = write(tmp_path / "a.csv", "")
    options = {"follow": True, "poll_ms": 10, "on_change": "restart"}
    async with Follower(adapter(path, **options)) as follower:
        with path.open("a") as file:
            for part in ("t,v", "\n", "1,", "5\n2,", "6"):
                file.write(part)
                file.flush()
                await asyncio.sleep(0.02)  # lets the follower see the half line; the result must not depend on it
            assert [item[2] for item in await follower.until(1)] == [5.0]
            file.write("7\n")
            file.flush()
            assert [item[2] for item in await follower.until(2)] == [5.0, 67.0]
        fresh = write(tmp_path / "b.csv", "t,v\n9,99\n")
        fresh.replace(path)
        assert [item[2] for item in await follower.until(3)] == [5.0, 67.0, 99.0]
        cursor = follower.batches[-1].cursor
    with path.open("a") as file:
        file.write("10,100\n")
    assert [item[2] for item in values(await drain(adapter(path), cursor))] == [100.0]


async def test_a_file_followed_from_nothing_can_be_resumed(tmp_path):
    path = write(tmp_path / "a.csv", "t,v\n1,5\n")
    async with Follower(adapter(path, follow=True, poll_ms=10)) as follower:
        await follower.until(1)
        with path.open("a") as file:
            file.writelines(f"{second},{second}\n" for second in range(2, 2001))
        await follower.until(2000)
        cursors = [batch.cursor for batch in follower.batches]
    for cursor in (cursors[0], cursors[1], cursors[-1]):
        rest = values(await drain(adapter(path), cursor))
        assert [item[2] for item in rest] == [float(second) for second in range(2001 - len(rest), 2001)]
    assert not rest


async def test_following_a_cut_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    async with Follower(adapter(path, follow=True, poll_ms=10)) as follower:
        await follower.until(6)
        write(path, "t,temp,press\n")
        with pytest.raises(AdapterError, match="shorter"):
            await follower.until(7)


async def test_speed_paces_by_source_time(tmp_path):
    text = "t,v\n" + "".join(f"{100 + second / 10},{second}\n" for second in range(11))
    path = write(tmp_path / "a.csv", text)
    reader = adapter(path, speed=4.0)
    await reader.open(None)
    arrivals = []
    start = time.monotonic()
    async for batch in reader.batches():
        arrivals += [(time.monotonic() - start, reading.value) for reading in batch.readings]
    await reader.close()
    assert len(arrivals) == 11
    for arrival_s, value in arrivals:
        assert arrival_s >= value / 40 - 0.005
    assert arrivals[-1][0] < 2


async def test_memory_stays_flat_and_a_line_without_end_is_skipped(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(b"t,v\n1,1\n")
        for _ in range(8):
            file.write(b"x" * (1 << 20))
        file.write(b"\n2,2\n")
    reader = adapter(path)
    found = values(await drain(reader))
    assert [item[2] for item in found] == [1.0, 2.0]
    assert reader.counts["bad_rows"] == 1


async def test_full_speed_gives_twenty_thousand_readings_for_a_second_of_the_cpu(tmp_path):
    rows, width = 4000, 10
    header = ",".join(["t", *(f"s{place}" for place in range(width))])
    body = "".join(f"{second}," + ",".join(["1.25"] * width) + "\n" for second in range(rows))
    reader = adapter(write(tmp_path / "a.csv", f"{header}\n{body}"))
    start = time.process_time()
    count = len(values(await drain(reader)))
    assert count == rows * width
    assert count / (time.process_time() - start) >= 20_000
