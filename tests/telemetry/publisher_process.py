"""A node in a process of its own, to be killed: commits numbered steps to a real store and publishes them.

argv: store path, broker URL, MQTT version, last step (0: commit none, only publish). Goes on where the store says.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from millhand.records import Alert, Batch, Clock, Prediction, Reading, Severity
from millhand.store import Step, Store, StoreSettings
from millhand.telemetry.publisher import Publisher
from millhand.telemetry.settings import TelemetrySettings

START_NS = 1_700_000_000_000_000_000


def step(index: int) -> Step:
    time_ns = START_NS + index * 250_000  # four steps share a millisecond
    clock = Clock(source_ns=time_ns, receive_ns=time_ns, monotonic_ns=index)
    readings = tuple(Reading(name, index, "1", clock) for name in ("index", "again"))
    prediction = Prediction("pump", "rul", 1, time_ns - 1, time_ns, {"rul": float(index)})
    alert = Alert(f"alert-{index}", "pump", "m", "r", "k", Severity.INFO, "text", time_ns)
    return Step(
        "pump", Batch(readings, cursor=str(index).encode()), b"", (prediction,), (alert,) if index % 20 == 0 else ()
    )


async def main(path: Path, url: str, protocol: str, last: int) -> None:
    store = await Store.open(path, StoreSettings(free_disk_floor_bytes=0))
    settings = TelemetrySettings.model_validate(
        {"enabled": True, "brokers": (url,), "protocol": protocol, "backoff_first_s": 0.05, "ack_timeout_s": 1.0}
    )
    publisher = Publisher(settings, "plant", "node-1", store)
    await publisher.start()
    cursor, _ = await store.resume("pump")
    for index in range(1 if cursor is None else int(cursor) + 1, last + 1):
        await store.commit(step(index))
    print("committed", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
