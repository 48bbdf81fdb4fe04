"""Real brokers, real stores, a real hub process, and a listener that sees what any Sparkplug host would see."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from millhand.errors import TelemetryError
from millhand.records import Alert, Batch, Clock, Prediction, Reading, Severity
from millhand.store import Step, Store, StoreSettings
from millhand.telemetry.broker import EmbeddedBroker
from millhand.telemetry.hosts import state
from millhand.telemetry.payloads import Message, Metric, Type, decode, encode
from millhand.telemetry.publisher import Publisher
from millhand.telemetry.settings import TelemetrySettings
from millhand.telemetry.topics import Topic, parse, state_topic

START_NS = 1_700_000_000_000_000_000
GROUP, NODE, HOST = "plant", "node-1", "scada"


def step(index: int, asset: str = "pump", *, extra: tuple[Reading, ...] = (), **parts: Any) -> Step:
    """Step `index`: three readings of one and the same millisecond."""
    time_ns = START_NS + index * 10_000_000
    clock = Clock(source_ns=time_ns, receive_ns=time_ns, monotonic_ns=time_ns - START_NS)
    readings = tuple(Reading(name, float(index), "mm/s", clock) for name in ("vibration", "current", "vibration"))
    return Step(asset, Batch((*readings, *extra), cursor=str(index).encode()), b"", **parts)


def reading(name: str, value: float | int | bool | str | None, index: int = 0, unit: str = "1") -> Reading:
    time_ns = START_NS + index * 10_000_000
    return Reading(name, value, unit, Clock(source_ns=time_ns, receive_ns=time_ns, monotonic_ns=0))


def alert(number: int, asset: str = "pump") -> Alert:
    raised_ns = START_NS + number
    return Alert(f"alert-{number}", asset, "m", "r", "outer_race", Severity.WARNING, "worn", raised_ns)


def prediction(index: int, asset: str = "pump") -> Prediction:
    end_ns = START_NS + index
    return Prediction(asset, "rul", 1, end_ns - 5, end_ns, {"rul": float(index)})


async def until(condition: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
    """Wait for the first truthy value of `condition` (a function or a coroutine function)."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end_s, f"{what} did not come within {deadline_s:g} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(path: Path, **settings: Any) -> AsyncIterator[Store]:
    store = await Store.open(path, StoreSettings(**{"free_disk_floor_bytes": 0, **settings}))
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def publishing(store: Store, *urls: str, **settings: Any) -> AsyncIterator[Publisher]:
    values = {"enabled": True, "brokers": urls, "backoff_first_s": 0.05, "backoff_last_s": 0.2, **settings}
    publisher = Publisher(TelemetrySettings(**values), GROUP, NODE, store)
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


# ---- brokers --------------------------------------------------------------------------------------------------------


class Mosquitto:
    """mosquitto as a child process: MQTT 3.1.1 and 5."""

    name = "mosquitto"

    def __init__(self, folder: Path, *, users: dict[str, str] | None = None, tls: Path | None = None) -> None:
        """tls: folder with ca.pem, server.pem and server.key; clients must show a certificate of that CA then."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._log_path = folder / "mosquitto.log"
        self._config = folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "user root", "max_queued_messages 0"]
        if users:
            passwords = folder / "passwords"
            passwords.touch(mode=0o600)
            for user, password in users.items():
                command = ["mosquitto_passwd", "-b", str(passwords), user, password]
                subprocess.run(command, check=True, capture_output=True)
            lines += ["allow_anonymous false", f"password_file {passwords}"]
        else:
            lines += ["allow_anonymous true"]
        if tls is not None:
            self.url = f"mqtts://localhost:{self.port}"
            lines += [f"cafile {tls}/ca.pem", f"certfile {tls}/server.pem", f"keyfile {tls}/server.key"]
            lines += ["require_certificate true"]
        self._config.write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def command() -> str | None:
        return shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

    def start(self) -> None:
        with self._log_path.open("ab") as log:
            command = [str(self.command()), "-c", str(self._config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + 15
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None and time.monotonic() < end_s, self._log_path.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None


@contextmanager
def mosquitto(folder: Path, **options: Any) -> Iterator[Mosquitto]:
    if Mosquitto.command() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    broker = Mosquitto(folder, **options)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@contextmanager
def nats(folder: Path) -> Iterator[EmbeddedBroker]:
    try:
        broker = EmbeddedBroker(folder)
        broker.command()
    except TelemetryError as error:
        pytest.skip(f"{error.message} ({error.hint})")
    with broker:
        yield broker


@pytest.fixture
def nats_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with nats(tmp_path / "nats") as broker:
        yield broker


@pytest.fixture
def mosquitto_broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path / "mosquitto") as broker:
        yield broker


@dataclass(frozen=True)
class Way:
    """One broker and one MQTT version."""

    url: str
    protocol: str


@pytest.fixture(params=["nats 3.1.1", "mosquitto 5", pytest.param("mosquitto 3.1.1", marks=pytest.mark.long)])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Way]:
    kind, protocol = request.param.split()
    with (nats if kind == "nats" else mosquitto)(tmp_path / kind) as broker:
        yield Way(broker.url, protocol)


# ---- a host of our own ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """One message as a subscriber gets it."""

    topic: Topic
    message: Message
    payload: bytes
    qos: int
    retained: bool


class Listener:
    """A Sparkplug host that hears everything and says only what a test tells it to."""

    def __init__(self, url: str) -> None:
        self.heard: list[Heard] = []
        self._subscribed = False
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"listener-{time.monotonic_ns()}")
        self._client.on_message = self._on_message
        self._client.on_connect = lambda client, *_: client.subscribe("spBv1.0/#", 1)
        self._client.on_subscribe = lambda *_: setattr(self, "_subscribed", True)
        port = int(url.rpartition(":")[2])
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        end_s = time.monotonic() + 10
        while not self._subscribed:
            assert time.monotonic() < end_s, "the listener could not subscribe"
            time.sleep(0.005)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        # The circle between the client and us would leave its sockets to the garbage collector.
        self._client.on_message = self._client.on_connect = self._client.on_subscribe = None

    def _on_message(self, _: Any, __: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic.startswith(state_topic("")):
            return
        payload = bytes(message.payload)
        with suppress(TelemetryError):  # a test's own garbage
            self.heard.append(Heard(parse(message.topic), decode(payload), payload, message.qos, message.retain))

    def of(self, *kinds: str) -> list[Heard]:
        return [heard for heard in list(self.heard) if heard.topic.kind in kinds]

    def from_node(self) -> list[Heard]:
        return [heard for heard in list(self.heard) if heard.topic.kind not in ("NCMD", "DCMD")]

    def command(self, *metrics: Metric) -> None:
        payload = encode(metrics, time_ms=int(time.time() * 1000), seq=None)
        self.publish(f"spBv1.0/{GROUP}/NCMD/{NODE}", payload)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, 1, retain).wait_for_publish(10)

    def acknowledge(self, epoch: str, **upto: int) -> None:
        marks = [Metric(f"Hub/ack/{stream}", value, Type.UINT64) for stream, value in upto.items()]
        self.command(Metric("Hub/epoch", epoch, Type.STRING), *marks)

    def say_state(self, online: bool, time_ms: int, host: str = HOST) -> None:
        self.publish(state_topic(host), state(online, time_ms), retain=True)


@pytest.fixture
def listen() -> Iterator[Callable[[str], Listener]]:
    listeners: list[Listener] = []

    def begin(url: str) -> Listener:
        listeners.append(Listener(url))
        return listeners[-1]

    yield begin
    for listener in listeners:
        listener.close()


# ---- the hub --------------------------------------------------------------------------------------------------------


class Hub:
    """`python -m millhand_hub` as a process."""

    def __init__(self, folder: Path, url: str, extra: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = folder / "hub.db"
        self.config = folder / "hub.toml"
        self.config.write_text(f'broker = "{url}"\ndata_dir = "{folder}"\ncommit_ms = 10\n{extra}')
        self._log_path = folder / "hub.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        before = self.log().count("receiving from")
        command = [sys.executable, "-m", "millhand_hub", "--config", str(self.config)]
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + 20
        while self.log().count("receiving from") == before:
            assert self.process.poll() is None and time.monotonic() < end_s, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return self._log_path.read_text() if self._log_path.exists() else ""

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        code = 0
        if self.process is not None:
            self.process.send_signal(number)
            code = self.process.wait(60)
            self.process = None
        return code

    def query(self, sql: str, *arguments: Any) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, arguments).fetchall()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    hubs: list[Hub] = []

    def begin(url: str, extra: str = "", started: bool = True) -> Hub:
        hubs.append(Hub(tmp_path / f"hub-{len(hubs)}", url, extra))
        if started:
            hubs[-1].start()
        return hubs[-1]

    yield begin
    for one in hubs:
        one.kill()


class Kit:
    """What the tests of this folder share."""

    START_NS, GROUP, NODE, HOST = START_NS, GROUP, NODE, HOST
    step, reading, alert, prediction = (
        staticmethod(step),
        staticmethod(reading),
        staticmethod(alert),
        staticmethod(prediction),
    )
    until = staticmethod(until)
    opened = staticmethod(opened)
    publishing = staticmethod(publishing)
    mosquitto = staticmethod(mosquitto)
    nats = staticmethod(nats)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
