"""Sink runners over a real store: order, retries, restarts, a file set aside, a webhook's real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millhand.errors import SinkError
from millhand.pipeline import sinks as sinks_module
from millhand.pipeline.sinks import SinkRunner
from millhand.records import Alert, AlertState, Severity, WorkOrder
from millhand.store import Step, Store


class Box:
    """A sink that keeps what it takes, and first raises the errors (or awaits the calls) of its script."""

    def __init__(self, name: str = "box", *script: Any) -> None:
        self.name = name
        self.script = list(script)
        self.got: list[str] = []
        self.offers = self.closed = 0

    async def deliver(self, record: Alert | WorkOrder) -> None:
        self.offers += 1
        item = self.script.pop(0) if self.script else None
        if isinstance(item, Exception):
            raise item
        if item is not None:
            await item()
        self.got.append(f"{record.id} {record.state}")

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_module, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(sinks_module, "BACKOFF_LAST_S", 0.02)


@pytest.fixture
async def store(kit, tmp_path: Path) -> AsyncIterator[Store]:
    async with kit.opened(tmp_path / "store.db") as store:
        yield store


@pytest.fixture
async def start(store: Store) -> AsyncIterator[Callable[..., Awaitable[SinkRunner]]]:
    runners: list[SinkRunner] = []

    async def make(sink: Any, of: Store | None = None) -> SinkRunner:
        runner = SinkRunner(sink, of or store)
        runners.append(runner)
        await runner.start()
        return runner

    yield make
    for runner in runners:
        await runner.stop()


async def put(kit, store: Store, number: int, state: AlertState = AlertState.OPEN) -> None:
    """Commit an alert, and its order when it is raised."""
    raised_ns = kit.at(number)
    alert = Alert(f"a{number}", "pump", "m", "r", "wear", Severity.WARNING, "worn", raised_ns, state, raised_ns)
    order = WorkOrder(f"o{number}", alert.id, "pump", "noise", "wear", ("look",), 2, raised_ns)
    orders = (order,) if state is AlertState.OPEN else ()
    await store.commit(Step("pump", kit.batch(kit.reading(number)), b"", alerts=(alert,), orders=orders))


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


async def known(runner: SinkRunner, store: Store) -> None:
    """A sink is told what comes after its first look at the store; let it take that look."""
    await store.sink_cursor(runner.status()["name"])


async def test_records_come_in_order_as_they_are_committed(kit, store: Store, start) -> None:
    box = Box()
    runner = await start(box)
    await known(runner, store)
    await put(kit, store, 1)
    await put(kit, store, 2)
    await store.ack_alert("a1", "kim", kit.at(3))
    await put(kit, store, 1, AlertState.CLEARED)
    await kit.until(lambda: len(box.got) == 6, "all records")
    assert box.got == ["a1 open", "o1 open", "a2 open", "o2 open", "a1 acked", "a1 cleared"]
    assert runner.status() == {
        "name": "box",
        "delivered": 6,
        "failures": 0,
        "given_up": 0,
        "error": "",
        "hint": "",
    }


async def test_refused_record_holds_its_place_and_nobody_else(kit, store: Store, start) -> None:
    stuck, free = Box("stuck", *[SinkError("closed", hint="open it")] * 3, ValueError("odd")), Box("free")
    runners = [await start(stuck), await start(free)]
    for runner in runners:
        await known(runner, store)
    for number in range(1, 4):
        await put(kit, store, number)
    wanted = [text for number in range(1, 4) for text in (f"a{number} open", f"o{number} open")]
    await kit.until(lambda: free.got == wanted, "the free sink's records")
    await kit.until(lambda: stuck.got == wanted, "the stuck sink's records")
    assert stuck.offers == len(wanted) + 4
    assert runners[0].status()["failures"] == 4
    assert runners[0].status()["error"] == ""


async def test_error_and_remedy_are_shown_while_it_refuses(kit, store: Store, start) -> None:
    box = Box("box", *[SinkError("closed", hint="open it")] * 10_000)
    runner = await start(box)
    await known(runner, store)
    await put(kit, store, 1)
    await kit.until(lambda: box.offers > 2, "the tries")
    assert (runner.status()["error"], runner.status()["hint"]) == ("closed", "open it")
    assert not box.got


async def test_sink_that_hangs_blocks_nobody_and_can_be_stopped(kit, store: Store, start) -> None:
    hanging, free = Box("hanging", asyncio.Event().wait), Box("free")
    runner, other = await start(hanging), await start(free)
    await known(runner, store)
    await known(other, store)
    await put(kit, store, 1)
    await kit.until(lambda: len(free.got) == 2, "the free sink's records")
    async with asyncio.timeout(30):
        await runner.stop()
    assert hanging.closed == 1
    assert not hanging.got


async def test_restart_goes_on_behind_what_was_delivered(kit, tmp_path: Path, start) -> None:
    path = tmp_path / "kept.db"
    async with kit.opened(path) as store:
        await store.sink_cursor("box")
        for number in range(1, 4):
            await put(kit, store, number)
        first = Box("box", None, None, None, *[SinkError("gone")] * 10_000)
        runner = await start(first, store)
        await kit.until(lambda: first.offers > 4, "the fourth record's refusal")
        await runner.stop()
        assert first.got == ["a1 open", "o1 open", "a2 open"]
    async with kit.opened(path) as store:
        second = Box()
        runner = await start(second, store)
        await kit.until(lambda: len(second.got) == 3, "the rest")
        await put(kit, store, 4)
        await kit.until(lambda: len(second.got) == 5, "what is new")
        await runner.stop()
    assert second.got == ["o2 open", "a3 open", "o3 open", "a4 open", "o4 open"]


async def test_new_sink_is_not_told_the_past(kit, tmp_path: Path, start) -> None:
    path = tmp_path / "old.db"
    async with kit.opened(path) as store:
        await put(kit, store, 1)
    async with kit.opened(path) as store:
        box = Box()
        runner = await start(box, store)
        await known(runner, store)
        await put(kit, store, 2)
        await kit.until(lambda: len(box.got) == 2, "the new records")
        await runner.stop()
    assert box.got == ["a2 open", "o2 open"]


async def test_positions_of_a_file_set_aside_do_not_count_in_the_new_one(
    kit, tmp_path: Path, store: Store, start
) -> None:
    """The file is replaced while a record of it is being delivered; all of the new file must be told."""
    gate = asyncio.Event()
    box = Box("box", gate.wait)
    runner = await start(box)
    await known(runner, store)
    for number in range(1, 6):
        await put(kit, store, number)
    await kit.until(lambda: box.offers, "the first delivery")
    epoch, number = store.epoch, 6
    remove(tmp_path, "store.db*")
    while store.epoch == epoch:
        await put(kit, store, number)
        number += 1
        assert number < 2000, "the store does not notice that its file is gone"
    for later in range(number, number + 8):
        await put(kit, store, later)
    gate.set()
    await kit.until(lambda: f"o{number + 7} open" in box.got, "the newest record")
    stored = [f"{record.id} {record.state}" for _, record in await store.records_after(0, 10_000)]
    assert box.got == ["a1 open", *stored]


async def test_sink_with_dead_letters_shows_their_number(kit, store: Store, start) -> None:
    class GivingUp(Box):
        given_up = 0

        async def deliver(self, record: Alert | WorkOrder) -> None:
            self.given_up += 1

    runner = await start(GivingUp())
    await known(runner, store)
    await put(kit, store, 1)
    await kit.until(lambda: runner.status()["given_up"] == 2, "both records")


async def test_close_that_fails_does_not_hold_the_stop(store: Store, start) -> None:
    class Broken(Box):
        async def close(self) -> None:
            raise RuntimeError("odd")

    runner = await start(Broken())
    await runner.stop()


async def test_records_are_what_was_committed(kit, store: Store, start) -> None:
    records: list[Alert | WorkOrder] = []

    class Keeper(Box):
        async def deliver(self, record: Alert | WorkOrder) -> None:
            records.append(record)

    runner = await start(Keeper())
    await known(runner, store)
    await put(kit, store, 1)
    await kit.until(lambda: len(records) == 2, "both records")
    assert [msgspec.to_builtins(record) for record in records] == [
        msgspec.to_builtins(await store.alert("a1")),
        msgspec.to_builtins(await store.order("o1")),
    ]
