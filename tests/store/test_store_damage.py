"""Bad files, a full disk, a foreign hand: the agent goes on, and says what happened."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from millhand.errors import StoreError
from millhand.store import Store

PAGE = 4096


async def fill(store: Store, kit, count: int, start: int = 0) -> None:
    for index in range(start, start + count):
        await store.commit(kit.step(index, readings=60))


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Overwrite from another process: opening the file here would drop the store's lock when it is closed again."""
    code = "import sys; f = open(sys.argv[1], 'r+b'); f.seek(int(sys.argv[2])); f.write(bytes.fromhex(sys.argv[3]))"
    subprocess.run([sys.executable, "-c", code, path, str(offset), data.hex()], check=True)


def set_aside_files(path: Path) -> list[Path]:
    return sorted(item for item in path.parent.iterdir() if ".corrupt-" in item.name and item.name[-4] != "-")


@pytest.mark.parametrize("content", [b"this is not a database" * 400, b"SQLite format 3\x00" + b"\xff" * 9000, b"x"])
async def test_a_garbage_file_is_set_aside(kit, path, content):
    path.write_bytes(content)
    async with kit.opened(path) as store:
        await store.commit(kit.step(1))
        (aside,) = store.set_aside
        assert aside.name.startswith("store.db.corrupt-")
        assert aside.read_bytes()[: len(content)][16:] == content[16:]
        assert (await store.status())["set_aside"] == [str(aside)]
    async with kit.opened(path) as store:
        assert await store.last("bulk") == 1
        assert store.set_aside == []


async def test_an_empty_file_is_a_new_store(kit, path):
    path.touch()
    async with kit.opened(path) as store:
        await store.commit(kit.step(1))
        assert store.set_aside == []


async def test_a_bad_page_is_found_at_start(kit, path):
    async with kit.opened(path) as store:
        await fill(store, kit, 300)
        epoch = store.epoch
    write_at(path, path.stat().st_size // 2 // PAGE * PAGE, b"\xa5" * PAGE)
    async with kit.opened(path) as store:
        assert len(store.set_aside) == 1
        assert store.epoch != epoch
        assert await store.last("bulk") == 0


async def test_lost_tables_are_damage(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(1))
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE identity")
    connection.close()
    async with kit.opened(path) as store:
        assert len(store.set_aside) == 1


async def test_the_check_at_start_is_bounded(kit, path):
    async with kit.opened(path) as store:
        await fill(store, kit, 300)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE big (body BLOB)")
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000) "
            "INSERT INTO big SELECT zeroblob(2000) FROM n"
        )
    connection.close()
    began = time.monotonic()
    async with kit.opened(path, check_time_cap_s=0.01) as store:
        took_s = time.monotonic() - began
        assert await store.last("bulk") == 300
    assert took_s < 1.0


async def test_a_bad_page_is_found_while_running(kit, path):
    async with kit.opened(path) as store:
        while path.stat().st_size < 12 * kit.MIB:  # far more than SQLite keeps in memory
            await store.commit(kit.step(await store.last("bulk"), readings=4000))
        epoch = store.epoch
        for page in range(200, 260):
            write_at(path, page * PAGE, b"\xa5" * PAGE)
        async for _ in store.readings("pump"):
            pass
        assert len(store.set_aside) == 1
        assert store.epoch != epoch
        await store.commit(kit.step(7))
        assert [(row.seq, row.epoch) for row in await store.pending("bulk", 0)] == [(1, store.epoch)]
        status = await store.status()
        assert status["files_begun_anew"] == 1
        assert "malformed" in status["last_error"]


def put_other_file(path: Path) -> None:
    other = path.with_name("other.db")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE foreign_table (a)")
    connection.close()
    other.replace(path)


def put_garbage(path: Path) -> None:
    other = path.with_name("garbage")
    other.write_bytes(b"garbage" * 1000)
    other.replace(path)


def delete(path: Path) -> None:
    path.unlink()


def delete_log(path: Path) -> None:
    path.with_name(path.name + "-wal").unlink()


def cut(path: Path) -> None:
    subprocess.run(["truncate", "--size=8192", path], check=True)


@pytest.mark.parametrize("harm", [put_other_file, put_garbage, delete, delete_log, cut])
async def test_a_file_harmed_while_running(kit, path, harm):
    async with kit.opened(path) as store:
        await fill(store, kit, 50)
    async with kit.opened(path) as store:
        await fill(store, kit, 5, 50)
        epoch = store.epoch
        harm(path)
        await store.commit(kit.step(100, alerts=(kit.alert(1),)))
        new_epoch = store.epoch
        assert new_epoch != epoch
        assert (await store.status())["files_begun_anew"] == 1
        assert len(store.set_aside) == (0 if harm is delete else 1)
        await store.commit(kit.step(101))
    async with kit.opened(path) as store:
        assert store.epoch == new_epoch
        values = [row.record().readings[0].value for row in await store.pending("bulk", 0)]
        assert values == [100.0, 101.0]
        assert len(await store.alerts()) == 1


async def test_a_sink_is_told_all_of_the_new_file(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(0, alerts=(kit.alert(0), kit.alert(1))))
        await store.advance_sink("hook", 2)
        delete(path)
        await store.commit(kit.step(1, alerts=(kit.alert(2),)))
        await store.advance_sink("hook", 2)  # of the old file
        cursor = await store.sink_cursor("hook")
        assert [record for _, record in await store.records_after(cursor)] == [kit.alert(2)]


async def test_what_was_set_aside_can_still_be_read(kit, path):
    """Steps that were only in the write-ahead log go along with the file."""
    async with kit.opened(path) as store:
        await fill(store, kit, 5)
        path.with_name(path.name + "-wal").unlink()
        await store.commit(kit.step(9))
        (aside,) = store.set_aside
    with sqlite3.connect(aside) as connection:
        assert connection.execute("SELECT count(*) FROM bulk").fetchone() == (5,)
    connection.close()


async def test_only_some_damaged_files_are_kept(kit, path):
    for number in range(4):
        path.write_bytes(b"garbage %d" % number)
        async with kit.opened(path, set_aside_files_cap=2):
            pass
    kept = [item.read_bytes() for item in path.parent.glob("store.db.corrupt-*")]
    assert sorted(kept) == [b"garbage 2", b"garbage 3"]


async def test_a_newer_schema_is_refused(kit, path):
    async with kit.opened(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="has schema 99") as caught:
        await Store.open(path)
    assert "newer millhand" in caught.value.hint
    assert not list(path.parent.glob("*.corrupt-*"))


async def test_the_file_of_another_program_is_refused(path):
    put_other_file(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        await Store.open(path)
    assert path.read_bytes() == before


async def test_a_second_opener_is_refused(kit, path):
    async with kit.opened(path):
        code = "import asyncio, sys\nfrom pathlib import Path\nfrom millhand.store import Store\n"
        code += "asyncio.run(Store.open(Path(sys.argv[1])))"
        second = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code, path], capture_output=True)
    assert "is in use by another process" in second.stderr.decode()


async def test_a_restored_copy_gets_a_new_epoch(kit, path):
    copy = path.with_name("backup.db")
    async with kit.opened(path) as store:
        await fill(store, kit, 3)
        epoch = store.epoch
    shutil.copy(path, copy)
    async with kit.opened(path) as store:
        assert store.epoch == epoch  # a plain restart is no restore
        await fill(store, kit, 3, 3)
    shutil.copy(copy, path)
    async with kit.opened(path) as store:
        assert store.epoch != epoch
        assert (await store.status())["restored_copy"]
        assert await store.last("bulk") == 3
        epoch = store.epoch
    async with kit.opened(path) as store:
        assert store.epoch == epoch


async def test_a_copy_on_another_node_gets_a_new_epoch(kit, path, tmp_path):
    async with kit.opened(path) as store:
        epoch = store.epoch
    other = tmp_path / "other" / "store.db"
    other.parent.mkdir()
    shutil.copy(path, other)
    async with kit.opened(other) as store:
        assert store.epoch != epoch


async def test_a_folder_that_cannot_be_made(path):
    path.write_text("a file, not a folder")
    with pytest.raises(StoreError, match="cannot be read or written") as caught:
        await Store.open(path / "store.db")
    assert caught.value.retriable


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real disk of `param` MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("small_disk", [6], indirect=True)
async def test_a_full_disk_loses_nothing_and_works_again(kit, small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3 * kit.MIB))
    stored: list[float] = []
    settings = {"free_disk_floor_bytes": 0, "bytes_cap": 64 * kit.MIB, "waveform_bytes_cap": kit.MIB}
    async with kit.opened(small_disk / "store.db", **settings) as store:
        index = 0
        with pytest.raises(StoreError, match="is full") as caught:
            while True:
                await store.commit(kit.step(index, readings=200, alerts=(kit.alert(index),)))
                stored.append(float(index))
                index += 1
        assert caught.value.retriable
        assert "free some space" in caught.value.hint
        with pytest.raises(StoreError, match="is full"):
            await store.commit(kit.step(index, readings=2000))
        assert await values(store) == stored
        assert "full" in (await store.status())["last_error"]
        filler.unlink()
        for again in range(index, index + 20):
            await store.commit(kit.step(again, readings=200, alerts=(kit.alert(again),)))
            stored.append(float(again))
        epoch = store.epoch
    async with kit.opened(small_disk / "store.db", **settings) as store:
        assert store.epoch == epoch
        assert await values(store) == stored
        assert await store.last("bulk") == await store.last("alert") == len(stored)
        assert store.set_aside == []


async def values(store: Store) -> list[float]:
    return [row.record().readings[0].value for row in await store.pending("bulk", 0, 100_000)]


@pytest.mark.parametrize("small_disk", [32], indirect=True)
async def test_the_disks_floor_is_kept_by_giving_rows_back(kit, small_disk):
    floor = 20 * kit.MIB
    settings = {"reserve_bytes": kit.MIB, "bytes_cap": 64 * kit.MIB, "waveform_bytes_cap": kit.MIB}
    async with kit.opened(small_disk / "store.db", free_disk_floor_bytes=floor, **settings) as store:
        for index in range(3000):  # more than the disk holds above its floor
            await store.commit(kit.step(index, readings=100))

        async def has_room() -> bool:
            return (await store.status())["free_disk_bytes"] >= floor

        await kit.until(has_room)
        status = await store.status()
        assert status["streams"]["bulk"]["dropped"]["disk"] > 0
        first = (await store.pending("bulk", 0))[0]
        assert (first.kind, first.record().first, first.record().reason) == ("gap", 1, "disk")
