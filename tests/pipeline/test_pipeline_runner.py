"""Runners: adapters that fail, hang, end, exit or block, and stops in the midst of it. The store is a real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import AdapterError, StoreError
from millhand.pipeline import runner as runner_module
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.runner import AssetRunner
from millhand.records import Batch
from millhand.store import Store


class Script:
    """An adapter that does what its script says: a batch to hand over, an error to raise, a call to await."""

    def __init__(self, *script: Any, opens: Any = ()) -> None:
        self.script = list(script)
        self.opens = list(opens)
        self.cursors: list[bytes | None] = []
        self.opened = self.closed = 0

    async def open(self, cursor: bytes | None) -> None:
        self.opened += 1
        self.cursors.append(cursor)
        if self.opens:
            await self._do(self.opens.pop(0))

    async def batches(self) -> AsyncIterator[Batch]:
        while self.script:
            item = self.script.pop(0)
            if isinstance(item, Batch):
                yield item
            elif (found := await self._do(item)) is not None:
                yield found

    async def _do(self, item: Any) -> Batch | None:
        if isinstance(item, BaseException):
            raise item
        found: Batch | None = await item() if item is not None else None
        return found

    async def close(self) -> None:
        self.closed += 1


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back off in milliseconds."""
    monkeypatch.setattr(runner_module, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(runner_module, "BACKOFF_LAST_S", 0.02)


@pytest.fixture
async def store(kit, tmp_path: Path) -> AsyncIterator[Store]:
    async with kit.opened(tmp_path / "store.db") as store:
        yield store


@pytest.fixture
async def start(kit, store: Store) -> AsyncIterator[Callable[..., Awaitable[AssetRunner]]]:
    """Start a runner of an adapter; all are stopped at the end, and none may leave a task behind."""
    before = asyncio.all_tasks()
    runners: list[AssetRunner] = []

    async def make(adapter: Any, on_alive: Any = None, **settings: Any) -> AssetRunner:
        table = kit.settings(models=(), **settings)
        pipeline = AssetPipeline(table, models=[], infer=None, store=store, writer=None)  # type: ignore[arg-type]
        runner = AssetRunner(adapter, pipeline, on_alive=on_alive)
        runners.append(runner)
        await runner.start()
        return runner

    yield make
    for runner in runners:
        await runner.stop()
    await kit.until(lambda: asyncio.all_tasks() - {asyncio.current_task()} <= before, "the end of every task")


def state(runner: AssetRunner) -> str:
    return str(runner.status()["state"])


async def readings(store: Store, asset: str = "pump") -> list[Any]:
    return [reading.value async for part in store.readings(asset) for reading in part]


async def test_source_that_ends_is_read_once_and_resumed_behind_its_cursor(kit, store: Store, start) -> None:
    told: list[tuple[str, bool]] = []
    adapter = Script(*(kit.batch(kit.reading(n, n), cursor=n) for n in range(3)))
    runner = await start(adapter, lambda *call: told.append(call))
    await kit.until(lambda: state(runner) == "ended", "the end")
    assert (adapter.opened, adapter.closed, adapter.cursors) == (1, 1, [None])
    assert await readings(store) == [0, 1, 2]
    assert told == [("pump", True), ("pump", False)]
    again = Script()
    await kit.until(lambda: state(runner) == "ended", "the end")
    second = await start(again)
    await kit.until(lambda: state(second) == "ended", "the end")
    assert again.cursors == [b"2"]
    await runner.stop()
    assert state(runner) == "ended"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AdapterError("no answer from 10.0.0.7"), "no answer from 10.0.0.7"),
        (ValueError("odd"), "ValueError: odd"),
        (SystemExit(3), "tried to end the agent"),
        (asyncio.CancelledError(), "cancelled itself"),
    ],
)
async def test_adapter_that_fails_is_closed_and_opened_again(kit, store: Store, start, error, says) -> None:
    seen: list[dict[str, Any]] = []
    gate = asyncio.Event()
    adapter = Script(kit.batch(kit.reading(0, 0), cursor=0), error, kit.batch(kit.reading(1, 1), cursor=1), forever)
    adapter.opens = [None, gate.wait]
    runner = await start(adapter)
    await kit.until(lambda: adapter.opened == 2, "the second try")
    seen.append(runner.status())
    gate.set()
    await kit.until(lambda: state(runner) == "running", "the recovery")
    assert seen[0]["state"] == "failing"
    assert says in seen[0]["error"]
    assert adapter.cursors == [None, b"0"]
    assert adapter.closed == 1
    assert runner.status()["error"] == ""
    assert await readings(store) == [0, 1]
    await runner.stop()
    assert (adapter.opened, adapter.closed, state(runner)) == (2, 2, "stopped")


@pytest.mark.usefixtures("quick")
async def test_failed_opens_are_closed_too_and_retried(kit, start) -> None:
    adapter = Script(forever, opens=[AdapterError("refused"), OSError("odd"), None])
    runner = await start(adapter)
    await kit.until(lambda: adapter.opened == 3, "the third try")
    assert adapter.closed == 2
    assert runner.status()["restarts"] == 2


async def test_back_off_grows_with_jitter_and_is_reset_by_a_batch(kit, start, monkeypatch) -> None:
    pauses: list[float] = []

    async def pause(self: AssetRunner, seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(AssetRunner, "_pause", pause)
    fail = [AdapterError("x")]
    adapter = Script(kit.batch(kit.reading(0), cursor=0), *fail, forever, opens=[*fail * 9, None, *fail, None])
    await start(adapter)
    await kit.until(lambda: len(pauses) == 11, "eleven failures")
    for pause_s, base_s in zip(pauses, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 0.2, 0.4], strict=True):
        assert 0.79 * base_s <= pause_s <= 1.21 * base_s
    assert len({round(pause_s / 0.2, 6) for pause_s in pauses}) > 5, "jitter must spread the tries"


async def test_what_waiting_cannot_mend_is_shown_and_tried_slowly(kit, start, monkeypatch) -> None:
    pauses: list[float] = []

    async def pause(self: AssetRunner, seconds: float) -> None:
        pauses.append(seconds)
        await self._stopping.wait()

    monkeypatch.setattr(AssetRunner, "_pause", pause)
    error = AdapterError("'a.csv' does not exist", hint="give its path", retriable=False)
    runner = await start(Script(opens=[error]))
    await kit.until(lambda: pauses, "the pause")
    assert pauses[0] > 20
    assert (runner.status()["error"], runner.status()["hint"]) == ("'a.csv' does not exist", "give its path")


async def test_silent_asset_is_told_dead_and_alive_again(kit, start) -> None:
    told: list[bool] = []
    gate = asyncio.Event()

    async def later() -> Batch:
        await gate.wait()
        return kit.batch(kit.reading(1))

    adapter = Script(kit.batch(kit.reading(0)), later, forever)
    runner = await start(adapter, lambda _, alive: told.append(alive), silence_s=0.05)
    await kit.until(lambda: state(runner) == "silent", "the silence")
    assert "0.05 s" in runner.status()["error"]
    assert runner.status()["hint"]
    assert told == [True, False]
    gate.set()
    await kit.until(lambda: told == [True, False, True], "the return")


async def test_open_that_hangs_is_shown_as_silence_and_can_be_stopped(kit, start) -> None:
    adapter = Script(opens=[forever])
    runner = await start(adapter, silence_s=0.05)
    await kit.until(lambda: state(runner) == "silent", "the silence")
    async with asyncio.timeout(30):
        await runner.stop()
    assert (adapter.closed, state(runner)) == (1, "stopped")


async def test_stop_takes_the_batch_on_its_way_and_no_more(kit, store: Store, start) -> None:
    """A source without an end, as fast as it can: one batch may still come, then it must be left."""
    stopping = asyncio.Event()
    count = 0

    async def on_its_way() -> Batch:
        nonlocal count
        await stopping.wait()
        await asyncio.sleep(0.05)
        count += 1
        return kit.batch(kit.reading(count, count))

    adapter = Script(*[on_its_way] * 1000)
    runner = await start(adapter)
    await kit.until(lambda: adapter.opened, "the opening")
    stop = asyncio.create_task(runner.stop())
    await asyncio.sleep(0)
    stopping.set()
    await stop
    assert await readings(store) == [1]
    assert (adapter.closed, state(runner)) == (1, "stopped")


async def test_stop_finishes_the_step_in_hand(kit, store: Store, start, monkeypatch) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    commit = store.commit

    async def slow(step: Any) -> None:
        begun.set()
        await gate.wait()
        await commit(step)

    monkeypatch.setattr(store, "commit", slow)
    runner = await start(Script(*(kit.batch(kit.reading(n, n), cursor=n) for n in range(5))))
    await begun.wait()
    stop = asyncio.create_task(runner.stop())
    await asyncio.sleep(0)
    gate.set()
    await stop
    assert await readings(store) == [0]
    assert (await store.resume("pump"))[0] == b"0"


async def test_step_that_cannot_end_is_cut_off_at_a_stop_and_read_again(kit, store, start, monkeypatch) -> None:
    monkeypatch.setattr(runner_module, "STOP_DEADLINE_S", 0.1)
    tries = 0

    async def full(step: Any) -> None:
        nonlocal tries
        tries += 1
        raise StoreError("the disk is full", retriable=True)

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", full)
        adapter = Script(kit.batch(kit.reading(0, 0), cursor=0), forever)
        runner = await start(adapter)
        await kit.until(lambda: tries, "the refusal")
        assert runner.status()["error"] == "the disk is full"
        await runner.stop()
    assert (adapter.closed, state(runner)) == (1, "stopped")
    again = Script(kit.batch(kit.reading(0, 0), cursor=0))
    second = await start(again)
    await kit.until(lambda: state(second) == "ended", "the end")
    assert again.cursors == [None]
    assert await readings(store) == [0]


async def test_blocking_or_dead_asset_never_stalls_another(kit, store: Store, start) -> None:
    release = threading.Event()

    async def block() -> None:
        await asyncio.to_thread(release.wait, 30)

    async def tick() -> Batch:
        await asyncio.sleep(0)
        return kit.batch(kit.reading(0))

    try:
        blocked = await start(Script(block), name="blocked", silence_s=0.05)
        dead = await start(Script(opens=[AdapterError("no route")] * 99), name="dead")
        living = await start(Script(*[tick] * 200), name="living")
        await kit.until(lambda: state(living) == "ended", "the living asset's end")
        assert len(await readings(store, "living")) == 200
        await kit.until(lambda: state(blocked) == "silent", "the blocked asset's silence")
        assert state(dead) == "failing"
        async with asyncio.timeout(30):
            await asyncio.gather(blocked.stop(), dead.stop())
    finally:
        release.set()


@pytest.mark.usefixtures("quick")
async def test_close_that_fails_or_hangs_does_not_hold_the_asset(kit, start, monkeypatch) -> None:
    monkeypatch.setattr(runner_module, "CLOSE_DEADLINE_S", 0.05)
    closes: list[Any] = [forever, RuntimeError("odd")]

    class Sticky(Script):
        async def close(self) -> None:
            await super().close()
            if closes:
                await self._do(closes.pop(0))

    adapter = Sticky(forever, opens=[AdapterError("a"), AdapterError("b"), None])
    await start(adapter)
    await kit.until(lambda: adapter.opened == 3, "the third try")
    assert not closes


async def test_runner_that_is_cancelled_closes_its_adapter(kit, start) -> None:
    adapter = Script(kit.batch(kit.reading(0)), forever)
    runner = await start(adapter)
    await kit.until(lambda: state(runner) == "running", "the first batch")
    runner._task.cancel()
    await asyncio.wait({runner._task})
    assert adapter.closed == 1


async def test_listener_that_fails_does_not_harm_the_asset(kit, store: Store, start) -> None:
    def listener(asset: str, alive: bool) -> None:
        raise RuntimeError("nobody is at home")

    runner = await start(Script(kit.batch(kit.reading(0, 7))), listener)
    await kit.until(lambda: state(runner) == "ended", "the end")
    assert runner.status()["restarts"] == 0
    assert await readings(store) == [7]


async def test_status_is_plain_data_and_stop_before_start_is_nothing(kit, store: Store) -> None:
    pipeline = AssetPipeline(kit.settings(models=()), models=[], infer=None, store=store, writer=None)  # type: ignore[arg-type]
    runner = AssetRunner(Script(), pipeline)
    status = runner.status()
    assert (status["state"], status["last_batch_age_s"]) == ("starting", None)
    assert status["latency_ms"] == {"p50": None, "p99": None}
    await runner.stop()


async def test_a_model_whose_signals_never_come_is_named(kit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "UNSEEN_AFTER_S", 0.0)
    manifest = kit.manifest(window={"length": 2, "step": 1, "signals": ["x", "torque"], "waveforms": ["vibration"]})
    models = [(manifest, None)]  # no window is ever due, so nobody asks the extractor
    pipeline = AssetPipeline(kit.settings(), models=models, infer=None, store=store, writer=None)  # type: ignore[arg-type]
    runner = AssetRunner(Script(*(kit.batch(kit.reading(n, n), cursor=n) for n in range(3))), pipeline)
    assert runner.status()["error"] == "", "nothing came yet: too early to complain"
    await runner.start()
    await kit.until(lambda: state(runner) == "ended", "the end")
    status = runner.status()
    await runner.stop()
    assert status["error"] == "model 'classifier' judges nothing: the asset never brought torque, vibration"
    assert "options" in status["hint"]
