"""Recordings, configurations, and a site of broker and hub, for the tests of the whole agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from millhand.telemetry.broker import EmbeddedBroker
from millhand.testing import Agent, wait_until
from millhand_hub import queries
from millhand_plugins.turbofan.fleet import SENSORS, SETTINGS, Fleet

FIRST_S = 1_700_000_000
NODE = "test-node"


class Site:
    """A broker and a hub; the hub's own database says what arrived."""

    def __init__(self, folder: Path, broker: EmbeddedBroker) -> None:
        self.broker = broker
        self.database = folder / "hub" / "hub.db"
        self._folder = folder
        self._hub: subprocess.Popen[bytes] | None = None
        (folder / "hub.toml").write_text(f'broker = "{broker.url}"\ndata_dir = "{folder}/hub"\n')

    @property
    def telemetry(self) -> str:
        """The table that brings an agent here."""
        return f'[telemetry]\nenabled = true\nbrokers = ["{self.broker.url}"]\nbackoff_first_s = 0.1\n'

    def start(self) -> None:
        command = [sys.executable, "-m", "millhand_hub", "--config", str(self._folder / "hub.toml")]
        with (self._folder / "hub.log").open("ab") as log:
            self._hub = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self.database.exists, "the hub's database")

    def stop(self) -> None:
        if self._hub is not None:
            self._hub.terminate()
            self._hub.wait(60)
            self._hub = None

    def readings(self, asset: str, name: str = "sequence") -> list[Any]:
        """Every value of one signal, as often as the hub stored it."""
        with queries.opened(self.database) as database:
            return [value for _, value in queries.readings(database, NODE, asset, name)]

    def query(self, sql: str) -> list[dict[str, Any]]:
        with queries.opened(self.database) as database:
            return list(database.query(sql))

    def alerts(self) -> list[dict[str, Any]]:
        with queries.opened(self.database) as database:
            return queries.alerts(database, limit=1000)


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """A broker and a hub, with their files in `folder`."""
    folder.mkdir()
    with EmbeddedBroker(folder / "broker") as broker:
        site = Site(folder, broker)
        site.start()
        try:
            yield site
        finally:
            site.stop()


def drained(agent: Agent) -> bool:
    """Whether the hub has acknowledged everything that the agent has."""
    status = agent.call("telemetry.status")
    return bool(status["queued_rows"] == 0 and status["last"]["bulk"] > 0)


def state_of(agent: Agent, asset: str) -> dict[str, Any]:
    """The asset's status."""
    found: dict[str, Any] = next(status for status in agent.call("asset.list") if status["asset"] == asset)
    return found


def ended(agent: Agent, *assets: str) -> Callable[[], bool]:
    """Whether the sources of these assets have come to their ends."""
    return lambda: all(state_of(agent, asset)["state"] == "ended" for asset in assets)


def cli(agent: Agent, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `millhand` against the agent, as a technician does."""
    command = [sys.executable, "-m", "millhand", "--config", str(agent.config_path), *words]
    environment = {**agent.environment, "COLUMNS": "80"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, input=stdin, timeout=60, env=environment
    )


def cli_json(agent: Agent, *words: str) -> tuple[int, Any]:
    """The exit code of `millhand --json WORDS`, and what it printed."""
    done = cli(agent, "--json", *words)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def check(agent: Agent) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code of `millhand check`, and its findings by name; the last of a name is the running daemon's."""
    code, answer = cli_json(agent, "check")
    return code, {found["name"]: found for found in answer["findings"]}


def http_url(agent: Agent) -> str:
    """Where the agent's HTTP process listens."""
    assert agent.process is not None
    for child in psutil.Process(agent.process.pid).children():
        for connection in child.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return f"http://{connection.laddr.ip}:{connection.laddr.port}"
    raise AssertionError("no process of the agent listens")


def write_rows(
    path: Path, rows: int, *, rate_hz: float = 100.0, first: int = 0, columns: Sequence[str] = ("level",)
) -> Path:
    """A recording with its own count as `sequence`; appends where the file exists."""
    fresh = not path.exists()
    with path.open("a") as file:
        if fresh:
            file.write(",".join(("time", "sequence", *columns)) + "\n")
        for row in range(first, first + rows):
            cells = [f"{np.sin(row / 50 + place):.5f}" for place in range(len(columns))]
            file.write(",".join([f"{FIRST_S + row / rate_hz:.4f}", str(row), *cells]) + "\n")
    return path


def write_engine(path: Path, rows: int, *, rate_hz: float = 100.0, seed: int = 3, wear_sigma: float = 5.0) -> Path:
    """A turbofan that wears: its sensors drift from a new engine's level, so `turbofan-rul` falls to an alert."""
    fleet, generator = Fleet.read(), np.random.default_rng(seed)
    drift = np.linspace(0, wear_sigma, rows)[:, None] + generator.standard_normal((rows, len(SENSORS)))
    sensors = fleet.level[0] + fleet.spread[0] * drift
    with path.open("w") as file:
        file.write(",".join(("time", "sequence", *SETTINGS, *SENSORS)) + "\n")
        for row in range(rows):
            values = (*fleet.centres[0], *sensors[row])
            file.write(f"{FIRST_S + row / rate_hz:.4f},{row}," + ",".join(f"{value:.6g}" for value in values) + "\n")
    return path


def file_asset(
    path: Path, name: str = "press", *, models: Sequence[str] = (), speed: float | str = "full", more: str = ""
) -> str:
    """An `[[assets]]` table that replays a recording; `more` are further options."""
    shown = f'"{speed}"' if isinstance(speed, str) else f"{float(speed)}"
    return f"""
[[assets]]
name = "{name}"
adapter = "file"
models = {list(models)}
[assets.options]
path = "{path}"
time_column = "time"
time_format = "epoch_s"
speed = {shown}
{more}
"""


def rig_asset(
    name: str = "skid", *, speed: float | str = 1.0, fault: str = "bearing_outer", models: bool = True
) -> str:
    """An `[[assets]]` table that plays a rig's life in the agent's own process."""
    shown = f'"{speed}"' if isinstance(speed, str) else f"{float(speed)}"
    return f"""
[[assets]]
name = "{name}"
adapter = "rig"
models = {["rig-fault"] if models else []}
[assets.options]
fault = "{fault}"
speed = {shown}
"""


HTTP_OFF = "[http]\nenabled = false\n"
HTTP_ANY = "[http]\nport = 0\n"
