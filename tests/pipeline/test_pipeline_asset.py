"""One asset from batch to commit, on a real store, with models, extractors and writers that fail in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from millhand.errors import ConfigError, InputError, MillhandError, ModelError, OverloadError, StoreError, WorkerError
from millhand.pipeline import asset as asset_module
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.features import FeatureSet, builtin_extractors
from millhand.records import Alert, AlertState, Prediction, WorkOrder
from millhand.store import Step, Store

RAW = builtin_extractors()[0]


class Model:
    """Answers with the newest x as the probability of a bearing fault; fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.sizes: list[int] = []
        self.hang = False

    async def __call__(
        self, model: str, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
        if self.hang:
            await asyncio.Event().wait()
        if self.failures:
            raise self.failures.pop(0)
        newest = tensors["input"][:, 0, -1].astype(np.float64)
        self.sizes.append(len(newest))
        return {"p": np.stack([1 - newest, newest, 0 * newest], axis=1)}, 3


class Writer:
    name = "plain"

    def write(self, alert: Alert, history: Sequence[Alert]) -> WorkOrder:
        return WorkOrder(f"order {alert.id}", alert.id, alert.asset, alert.kind, "", (), len(history), alert.raised_ns)


class BrokenWriter:
    name = "broken"

    def write(self, alert: Alert, history: Sequence[Alert]) -> WorkOrder:
        raise KeyError("symptom")


class BrokenExtractor:
    name = "broken"

    def extract(self, window: Any) -> FeatureSet | None:
        raise ZeroDivisionError("no speed")


@pytest.fixture
async def store(kit, tmp_path: Path) -> AsyncIterator[Store]:
    async with kit.opened(tmp_path / "store.db") as opened:
        yield opened


def make(kit: Any, store: Any, infer: Any, writer: Any = None, extractor: Any = RAW, **settings: Any) -> AssetPipeline:
    models = [(kit.manifest(), extractor)]
    return AssetPipeline(kit.settings(**settings), models=models, infer=infer, store=store, writer=writer or Writer())


def life(kit: Any, faults: Sequence[float], replay: bool = True) -> list[Any]:
    return [
        kit.batch(kit.reading(second, fault), cursor=second if replay else None) for second, fault in enumerate(faults)
    ]


def without_latency(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [msgspec.structs.replace(one, latency_ms=0.0) for one in predictions]


LIFE = [0.1, 0.1, 0.2, 0.9, 0.3, 0.95, 0.99, 0.9, 0.2, 0.1, 0.1]


async def outcome(store: Store) -> tuple[list[Prediction], list[Alert], list[WorkOrder]]:
    return without_latency(await store.predictions("pump")), await store.alerts(), await store.orders()


async def test_a_life_becomes_predictions_one_alert_and_one_order(kit, store) -> None:
    pipeline = make(kit, store, Model())
    assert await pipeline.restore() is None
    for batch in life(kit, LIFE):
        await pipeline.step(batch)
    predictions, (alert,), (order,) = await outcome(store)
    assert [one.window_end_ns for one in predictions] == [kit.at(second) for second in range(1, len(LIFE))]
    assert [one.values["bearing"] for one in predictions] == pytest.approx(LIFE[1:], abs=1e-6)
    assert {one.version for one in predictions} == {3}
    assert (alert.kind, alert.state, alert.raised_ns, alert.changed_ns) == (
        "bearing",
        AlertState.CLEARED,
        kit.at(5),
        kit.at(9),
    )
    assert (order.alert_id, order.created_ns) == (alert.id, alert.raised_ns)
    counters = pipeline.counters
    assert (counters.batches, counters.predictions, counters.alerts) == (len(LIFE), len(LIFE) - 1, 1)
    assert pipeline.last_error is None


@pytest.mark.parametrize("cut", range(len(LIFE)))
async def test_a_restart_at_any_batch_gives_the_same_records(kit, store, tmp_path, cut) -> None:
    batches = life(kit, LIFE)
    undisturbed = make(kit, store, Model())
    for batch in batches:
        await undisturbed.step(batch)
    async with kit.opened(tmp_path / "cut.db") as other:
        first = make(kit, other, Model())
        for batch in batches[:cut]:
            await first.step(batch)
        second = make(kit, other, Model())
        cursor = await second.restore()
        for batch in batches[0 if cursor is None else int(cursor) + 1 :]:
            await second.step(batch)
        assert await outcome(other) == await outcome(store)


async def test_windows_due_in_one_step_are_asked_in_one_request(kit, store) -> None:
    model = Model()
    readings = [kit.reading(second, 0.1) for second in range(150)]
    await make(kit, store, model).step(kit.batch(*readings))
    assert model.sizes == [64, 64, 21]
    assert len(await store.predictions("pump")) == 149


FAILURES = [WorkerError("it died"), OverloadError("queue full"), WorkerError("restarting")]


async def test_a_model_that_comes_back_answers_a_replay_as_if_nothing_had_been(kit, store, tmp_path) -> None:
    for batch in life(kit, LIFE):
        await one_process_step(kit, store, Model(), batch)
    async with kit.opened(tmp_path / "failing.db") as other:
        pipeline = make(kit, other, model := Model())
        for batch in life(kit, LIFE):
            model.failures = list(FAILURES)
            await pipeline.step(batch)
        assert await outcome(other) == await outcome(store)
        assert pipeline.counters.predictions_failed == 0
        assert pipeline.last_error is None


async def one_process_step(kit: Any, store: Store, model: Model, batch: Any) -> None:
    """A process of its own for each step: everything must come from the store."""
    pipeline = make(kit, store, model)
    await pipeline.restore()
    await pipeline.step(batch)


@pytest.mark.parametrize(
    "failure", [ModelError("damaged"), InputError("wrong shape"), ValueError("a bug")], ids=lambda e: type(e).__name__
)
async def test_a_failure_that_waiting_cannot_mend_costs_its_window_alone(kit, store, failure) -> None:
    pipeline = make(kit, store, Model(failure))
    first, second, third = life(kit, [0.1, 0.2, 0.3])
    await pipeline.step(first)
    await pipeline.step(second)
    assert pipeline.counters.predictions_failed == 1
    assert isinstance(pipeline.last_error, MillhandError)
    await pipeline.step(third)
    assert [one.window_end_ns for one in await store.predictions("pump")] == [kit.at(2)]
    assert pipeline.last_error is None
    assert await stored_values(store) == pytest.approx([0.1, 0.2, 0.3])


async def stored_values(store: Store) -> list[float]:
    return [float(one.value) async for chunk in store.readings("pump") for one in chunk]  # type: ignore[arg-type]


@pytest.mark.parametrize("hang", [False, True])
async def test_a_live_asset_waits_once_for_a_silent_model_and_then_only_knocks(kit, store, monkeypatch, hang) -> None:
    monkeypatch.setattr(asset_module, "LIVE_PATIENCE_S", 0.3)
    monkeypatch.setattr(asset_module, "KNOCK_S", 0.01)
    model = Model(*[WorkerError("it died")] * 10_000)
    model.hang = hang
    pipeline = make(kit, store, model)
    loop = asyncio.get_running_loop()
    waits_s = []
    for batch in life(kit, [0.1] * 6, replay=False):
        before = loop.time()
        await pipeline.step(batch)
        waits_s.append(loop.time() - before)
    assert pipeline.counters.predictions_failed == 5
    assert waits_s[1] > 0.15
    assert sum(waits_s[2:]) < 0.6
    assert pipeline.last_error is not None and pipeline.last_error.retriable
    assert len(await stored_values(store)) == 6

    model.hang, model.failures = False, []
    await pipeline.step(kit.batch(kit.reading(6, 0.1)))
    assert pipeline.counters.predictions == 1
    assert pipeline.last_error is None


async def test_an_extractor_that_raises_is_counted_and_the_asset_goes_on(kit, store) -> None:
    pipeline = make(kit, store, Model(), extractor=BrokenExtractor())
    for batch in life(kit, [0.1, 0.2, 0.3]):
        await pipeline.step(batch)
    assert pipeline.counters.extractor_errors == 2
    assert pipeline.last_error is not None
    assert "extractor 'broken' failed: ZeroDivisionError: no speed" in pipeline.last_error.message
    assert len(await stored_values(store)) == 3


async def test_a_window_that_cannot_be_judged_is_skipped(kit, store) -> None:
    pipeline = make(kit, store, Model())
    for batch in life(kit, [float("nan")] * 3):
        await pipeline.step(batch)
    assert (pipeline.counters.windows_skipped, pipeline.counters.predictions) == (2, 0)


async def test_a_writer_that_raises_costs_the_order_not_the_alert(kit, store) -> None:
    pipeline = make(kit, store, Model(), writer=BrokenWriter())
    for batch in life(kit, [0.9] * 4):
        await pipeline.step(batch)
    assert [alert.state for alert in await store.alerts()] == [AlertState.OPEN]
    assert await store.orders() == []
    assert pipeline.counters.orders_failed == 1
    assert pipeline.last_error is not None and "order writer 'broken'" in pipeline.last_error.message


async def test_the_writer_sees_earlier_alerts(kit, store) -> None:
    pipeline = make(kit, store, Model())
    for batch in life(kit, [0.9] * 4 + [0.1] * 4 + [0.9] * 4):
        await pipeline.step(batch)
    assert [order.priority for order in await store.orders()] == [1, 0]


class RefusingStore:
    """The real store, with commits that fail as told."""

    def __init__(self, store: Store, *failures: StoreError) -> None:
        self._store = store
        self._failures = list(failures)
        self.resume, self.alerts = store.resume, store.alerts

    async def commit(self, step: Step) -> None:
        if self._failures:
            raise self._failures.pop(0)
        await self._store.commit(step)


async def test_a_full_disk_is_waited_for_and_nothing_is_lost(kit, store) -> None:
    full = StoreError("the disk is full", retriable=True)
    pipeline = make(kit, RefusingStore(store, full, full, full), Model())
    for batch in life(kit, LIFE):
        await pipeline.step(batch)
    assert await stored_values(store) == LIFE
    assert len(await store.alerts()) == 1
    assert pipeline.last_error is None


@pytest.mark.parametrize("failed", [0, 5])
async def test_a_step_that_was_not_committed_leaves_no_trace(kit, store, tmp_path, failed) -> None:
    """Windows and rules go back to what was committed, also where nothing ever was."""
    batches = life(kit, LIFE)
    undisturbed = make(kit, store, Model())
    for batch in batches:
        await undisturbed.step(batch)
    async with kit.opened(tmp_path / "refusing.db") as other:
        refusing = RefusingStore(other)
        pipeline = make(kit, refusing, Model())
        for batch in batches[:failed]:
            await pipeline.step(batch)
        refusing._failures = [StoreError("damaged")]
        with pytest.raises(StoreError):
            await pipeline.step(batches[failed])
        cursor = await pipeline.restore()
        assert cursor == (str(failed - 1).encode() if failed else None)
        for batch in batches[failed:]:
            await pipeline.step(batch)
        assert await outcome(other) == await outcome(store)


async def test_a_kept_state_that_cannot_be_read_begins_anew(kit, store) -> None:
    await store.commit(Step("pump", kit.batch(kit.reading(0), cursor=0), b"\xc1 not ours"))
    pipeline = make(kit, store, Model())
    assert await pipeline.restore() == b"0"
    for batch in life(kit, [0.1, 0.2])[1:]:
        await pipeline.step(batch)
    assert pipeline.counters.predictions == 0


def test_an_override_of_no_rule_is_refused_with_a_suggestion(kit) -> None:
    with pytest.raises(ConfigError, match=r"asset 'pump': rules\.falt .*did you mean 'fault'"):
        make(kit, None, Model(), rules={"falt": {"enabled": False}})
    make(kit, None, Model(), models=("classifier", "missing"), rules={"of_the_missing": {"enabled": False}})


@pytest.mark.parametrize("name", ["a pump", "line/pump", "pump+", "#1", "", "pümp"])
def test_an_asset_name_that_a_topic_cannot_hold_is_refused(kit, name) -> None:
    with pytest.raises(ConfigError, match="key 'name'"):
        kit.settings(name=name)


def test_limits_must_rise(kit) -> None:
    with pytest.raises(ConfigError, match="limits of 'x' must rise"):
        kit.settings(limits={"x": [3, 1]})
