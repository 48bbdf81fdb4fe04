"""Sinks: in order, exactly from where they stand, and none in the way of another; on a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import SinkError
from millhand.pipeline import sinks as sinks_module
from millhand.pipeline.sinks import SinkRunner
from millhand.records import Alert, Severity, WorkOrder
from millhand.store import Step, Store


class Door:
    """A sink that takes what it is given, except where `errors` says otherwise."""

    def __init__(self, name: str = "door", *errors: Exception) -> None:
        self.name = name
        self.errors = list(errors)
        self.taken: list[str] = []
        self.closed = 0
        self.shut = False

    async def deliver(self, record: Alert | WorkOrder) -> None:
        if self.shut:
            raise SinkError("the door is shut", hint="open it")
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(record.id)

    async def close(self) -> None:
        self.closed += 1


class Careless(Door):
    """Passes over what begins with 'bad', and counts it."""

    given_up = 0

    async def deliver(self, record: Alert | WorkOrder) -> None:
        if record.id.startswith("bad"):
            self.given_up += 1
        else:
            await super().deliver(record)


@pytest.fixture
async def store(kit, tmp_path: Path) -> AsyncIterator[Store]:
    async with kit.opened(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
async def begin(store, monkeypatch) -> AsyncIterator[Callable[..., Any]]:
    monkeypatch.setattr(sinks_module, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(sinks_module, "BACKOFF_LAST_S", 0.05)
    runners = []

    async def start(sink: Any) -> SinkRunner:
        runner = SinkRunner(sink, store)
        runners.append(runner)
        await runner.start()
        return runner

    yield start
    for runner in runners:
        await runner.stop()


async def raise_alerts(kit: Any, store: Store, *names: str) -> None:
    for second, name in enumerate(names):
        alert = Alert(name, "pump", "m", "r", "bearing", Severity.WARNING, "text", kit.at(second))
        order = WorkOrder(f"order-{name}", name, "pump", "s", "c", (), 2, kit.at(second))
        await store.commit(Step("pump", kit.batch(), b"", alerts=(alert,), orders=(order,)))


def both(*names: str) -> list[str]:
    return [record for name in names for record in (name, f"order-{name}")]


async def test_records_come_in_order_and_new_ones_at_once(kit, store, begin) -> None:
    door = Door()
    runner = await begin(door)
    await raise_alerts(kit, store, "a", "b")
    await kit.until(lambda: len(door.taken) == 4, "the first records")
    await raise_alerts(kit, store, "c")
    await kit.until(lambda: len(door.taken) == 6, "the record that came later")
    assert door.taken == both("a", "b", "c")
    assert runner.status()["delivered"] == 6


@pytest.mark.parametrize("error", [SinkError("not now"), ValueError("a bug")])
async def test_a_refused_record_is_offered_again_before_any_other(kit, store, begin, error) -> None:
    door = Door("door", error, error, error)
    runner = await begin(door)
    await raise_alerts(kit, store, "a", "b")
    await kit.until(lambda: len(door.taken) == 4, "all records")
    assert door.taken == both("a", "b")
    assert (runner.status()["failures"], runner.status()["error"]) == (3, "")


async def test_a_sink_that_is_stuck_holds_up_itself_alone(kit, store, begin) -> None:
    stuck, free = Door("stuck"), Door("free")
    stuck.shut = True
    blocked = await begin(stuck)
    await begin(free)
    await raise_alerts(kit, store, "a", "b")
    await kit.until(lambda: len(free.taken) == 4, "the other sink's records")
    await kit.until(lambda: blocked.status()["failures"] > 1, "another try")
    status = blocked.status()
    assert (stuck.taken, status["error"], status["hint"]) == ([], "the door is shut", "open it")
    stuck.shut = False
    await kit.until(lambda: len(stuck.taken) == 4, "what waited")


async def test_a_restart_goes_on_where_the_sink_stood(kit, store, begin) -> None:
    door = Door("door")
    first = await begin(door)
    await raise_alerts(kit, store, "a")
    await kit.until(lambda: len(door.taken) == 2, "the first records")
    door.shut = True
    await raise_alerts(kit, store, "b")
    await kit.until(lambda: first.status()["failures"], "a failure")
    await first.stop()
    assert door.closed == 1
    again = Door("door")
    await begin(again)
    await kit.until(lambda: len(again.taken) == 2, "the rest")
    assert again.taken == both("b")


async def test_what_a_sink_gives_up_is_shown(kit, store, begin) -> None:
    sink = Careless()
    runner = await begin(sink)
    await raise_alerts(kit, store, "a", "bad", "b")
    await kit.until(lambda: len(sink.taken) == 5, "the good records")
    assert runner.status()["given_up"] == 1
    assert (await begin(Door("other"))).status()["given_up"] == 0
