"""Real stores on a real disk, and steps to put into them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millhand.records import Alert, Batch, Clock, Prediction, Reading, Severity, Waveform, WorkOrder
from millhand.store import Step, Store, StoreSettings

START_NS = 1_700_000_000_000_000_000
SECOND_NS = 1_000_000_000
MIB = 1024 * 1024


def make_clock(time_ns: int, synced: bool = True) -> Clock:
    return Clock(source_ns=time_ns, receive_ns=time_ns + 5, monotonic_ns=time_ns - START_NS, synced=synced)


def make_step(index: int, asset: str = "pump", readings: int = 12, **parts: object) -> Step:
    """Step `index` was taken at second `index`; its first reading's value is `index`."""
    clock = make_clock(START_NS + index * SECOND_NS)
    batch = Batch(
        readings=tuple(Reading(f"m{number}", float(index + number), "mm/s", clock) for number in range(readings)),
        waveforms=parts.pop("waveforms", ()),
        cursor=str(index).encode(),
    )
    return Step(asset, batch, f"state {index}".encode(), **parts)


def make_prediction(index: int, asset: str = "pump", model: str = "rul") -> Prediction:
    end_ns = START_NS + index * SECOND_NS
    return Prediction(asset, model, 1, end_ns - SECOND_NS, end_ns, {"rul": float(index)})


def make_alert(number: int, asset: str = "pump", **changes: object) -> Alert:
    values: dict[str, object] = {
        "id": f"alert-{number}",
        "asset": asset,
        "model": "faults",
        "rule": "bearing",
        "kind": "outer_race",
        "severity": Severity.WARNING,
        "message": "the outer race is worn",
        "raised_ns": START_NS + number * SECOND_NS,
    }
    return Alert(**{**values, **changes})


def make_order(number: int, asset: str = "pump") -> WorkOrder:
    return WorkOrder(
        f"order-{number}",
        f"alert-{number}",
        asset,
        "noise",
        "bearing",
        ("replace it",),
        2,
        START_NS + number * SECOND_NS,
    )


def make_waveform(index: int, samples: int = 1024, name: str = "acceleration") -> Waveform:
    clock = make_clock(START_NS + index * SECOND_NS)
    return Waveform(name, index.to_bytes(4, "little") * samples, 12_800.0, "g", clock)


async def until(condition: Callable[[], Awaitable[bool]], deadline_s: float = 60.0) -> None:
    """Wait until `condition` holds; fail after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def opened(path: Path, **settings: object) -> AsyncIterator[Store]:
    store = await Store.open(path, StoreSettings(**settings))
    try:
        yield store
    finally:
        await store.close()


class Kit:
    """What the tests of this folder share."""

    START_NS, SECOND_NS, MIB = START_NS, SECOND_NS, MIB
    clock = staticmethod(make_clock)
    step = staticmethod(make_step)
    prediction = staticmethod(make_prediction)
    alert = staticmethod(make_alert)
    order = staticmethod(make_order)
    waveform = staticmethod(make_waveform)
    until = staticmethod(until)
    opened = staticmethod(opened)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"
