"""The other end of the demo: broker and hub as processes, and what the hub's database holds at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.demo.stack import Part, Stack, port_answers, python_module
from millhand.telemetry.broker import EmbeddedBroker

NODE, ASSET = "demo-node", "skid-1"
SIGNALS = ("bearing_temperature", "current", "speed", "load", "pressure")


@dataclass(frozen=True)
class Arrived:
    """What the hub holds. Times are Unix nanoseconds."""

    sequences: list[tuple[int, int]]
    """(source time, sequence) of the rig's answers, as stored: one that was stored twice shows twice."""
    alerts: list[dict[str, Any]]
    orders: list[dict[str, Any]]
    signals: dict[str, list[tuple[int, float]]]
    rows: int


class HubSide:
    """Broker and hub of one demo."""

    def __init__(self, broker: EmbeddedBroker, hub: Part, database: Path) -> None:
        self._hub = hub
        self._database = database
        self.broker_port = broker.port
        self.broker = f"nats-server, MQTT 3.1.1 on {broker.url}"

    @classmethod
    def start(cls, stack: Stack, folder: Path) -> HubSide:
        """Start both. Raises DemoError or TelemetryError where one does not come up."""
        broker = EmbeddedBroker(folder / "broker")
        stack.start("broker", broker.command())
        stack.wait(lambda: port_answers(broker.port), "the broker's port")
        config = folder / "hub.toml"
        config.write_text(f'broker = "{broker.url}"\ndata_dir = "{folder}/hub"\n')
        hub, _ = stack.start("hub", python_module("millhand_hub", "--config", str(config)))
        database = folder / "hub" / "hub.db"
        stack.wait(database.exists, "the hub's database")
        return cls(broker, hub, database)

    def finish(self, stack: Stack) -> Arrived:
        """End the hub, then read what it stored."""
        from millhand_hub import queries

        stack.end(self._hub)
        with queries.opened(self._database) as database:
            return Arrived(
                sequences=[
                    (time_ms * 1_000_000, int(value))
                    for time_ms, value in queries.readings(database, NODE, ASSET, "sequence")
                    if value is not None  # BAD: the rig did not answer
                ],
                alerts=sorted(queries.alerts(database), key=lambda alert: int(alert["raised_ns"])),
                orders=sorted(queries.orders(database), key=lambda order: int(order["created_ns"])),
                signals={
                    name: [
                        (time_ms * 1_000_000, float(value))
                        for time_ms, value in queries.readings(database, NODE, ASSET, name)
                        if value is not None
                    ]
                    for name in SIGNALS
                },
                rows=queries.rows_held(database),
            )
