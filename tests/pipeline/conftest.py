"""What the tests of this folder share: readings of a small machine, a model of it, a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from millhand.pipeline.settings import AssetSettings
from millhand.pipeline.windows import Snapshot, Window, WindowBuilder
from millhand.records import AssetState, Batch, Clock, Quality, Reading, Waveform
from millhand.serving.manifest import Manifest, WindowSpec
from millhand.store import Store, StoreSettings
from millhand.validation import validate

START_NS = 1_700_000_000_000_000_000
SECOND_NS = 1_000_000_000


def at(second: float) -> int:
    return START_NS + round(second * SECOND_NS)


def clock(second: float, **changes: Any) -> Clock:
    values = {"source_ns": at(second), "receive_ns": 7, "monotonic_ns": round(second * SECOND_NS), "boot_id": "one"}
    return Clock(**{**values, **changes})


def reading(second: float, value: Any = 1.0, name: str = "x", **changes: Any) -> Reading:
    return Reading(name, value, "1", changes.pop("clock", None) or clock(second), changes.pop("quality", Quality.GOOD))


def batch(*readings: Reading, cursor: int | None = None, state: AssetState | None = None, **parts: Any) -> Batch:
    return Batch(readings, parts.get("waveforms", ()), None if cursor is None else str(cursor).encode(), state)


def snapshot(second: float, name: str = "v", level: float = 1.0, **changes: Any) -> Waveform:
    samples = np.full(8, level, "<f4").tobytes()
    return Waveform(name, samples, 100.0, "g", changes.pop("clock", None) or clock(second), **changes)


def spec(**values: Any) -> WindowSpec:
    return validate(WindowSpec, {"length": 3, "step": 1, "signals": ("x",), **values}, "window")


def reloaded(builder: WindowBuilder, fresh: WindowBuilder) -> WindowBuilder:
    """`fresh` with the state of `builder`, by way of the bytes that the store keeps."""
    kept = msgspec.msgpack.encode(builder.dump())
    fresh.load(msgspec.msgpack.decode(kept, type=Snapshot))
    return fresh


def plain(window: Window) -> tuple[Any, ...]:
    """All of a window, comparable: NaN equals NaN."""
    signals = {name: values.astype(">f8").tobytes() for name, values in window.signals.items()}
    waves = {name: (wave.samples, wave.clock.source_ns) for name, wave in window.waveforms.items()}
    times = tuple(window.times_ns.tolist())
    return window.start_ns, window.end_ns, times, signals, waves, window.state, window.complete


def manifest(**changes: Any) -> Manifest:
    """A classifier of three kinds, fed with the last two steps of x; it raises at 0.8 and clears at 0.4."""
    values: dict[str, Any] = {
        "name": "classifier",
        "description": "test",
        "licence": "Apache-2.0",
        "inputs": [{"name": "input", "shape": [-1, 1, 2]}],
        "outputs": [{"name": "p", "shape": [-1, 3]}],
        "window": {"length": 2, "step": 1, "signals": ["x"]},
        "prediction": {"task": "classification", "output": "p", "labels": ["healthy", "bearing", "looseness"]},
        "rules": [
            {"name": "fault", "value": "fault", "raise_above": 0.8, "clear_below": 0.4, "raise_after": 2, "of": 3}
            | {"clear_after": 2}
        ],
    }
    return validate(Manifest, {**values, **changes}, "model")


def settings(**values: Any) -> AssetSettings:
    base = {"name": "pump", "adapter": "none", "models": ("classifier",)}
    return validate(AssetSettings, {**base, **values}, "asset")


async def until(condition: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
    """Wait for the first truthy value of `condition`; fail naming `what` after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end_s, f"{what} did not come in time"
        await asyncio.sleep(0.005)
    return value


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = await Store.open(path, StoreSettings())
    try:
        yield store
    finally:
        await store.close()


def windows_of(builder: WindowBuilder, batches: Sequence[Batch]) -> list[Window]:
    return [window for one in batches for window in builder.add(one)]


class Kit:
    START_NS, SECOND_NS = START_NS, SECOND_NS
    at, clock, reading, batch, snapshot = map(staticmethod, (at, clock, reading, batch, snapshot))
    spec, reloaded, plain, windows_of = map(staticmethod, (spec, reloaded, plain, windows_of))
    manifest, settings, until, opened = map(staticmethod, (manifest, settings, until, opened))


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
