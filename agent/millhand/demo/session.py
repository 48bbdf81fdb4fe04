"""One run of the demo: start the stack, watch the machine's life, collect what every part says of it."""

from __future__ import annotations

import re
import time
import tomllib
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from millhand.control import ControlClient
from millhand.demo import language
from millhand.demo.hubside import ASSET, NODE, HubSide
from millhand.demo.language import Spoken
from millhand.demo.pace import Load, machine_load, slowed
from millhand.demo.stack import DemoError, Part, Stack, python_module
from millhand.demo.tally import RigTime, Tally, count, read_rig_log
from millhand.errors import ControlError

MODEL = "rig-fault"
LOOK_EVERY_S = 0.25
STANDSTILL_RPM = 60.0
JUDGED_S = 1.0
"""A judged window speaks for this long before its end: two snapshots, of which the transmitter may lose one."""
WATCHED_PERCENT_LIMIT = 60.0
DRAIN_DEADLINE_S = 120.0
CALL_DEADLINE_S = 30.0
DEADLINES = {"timeout_ms": 1000, "deadline_ms": 2000, "hang_ms": 10_000, "load_timeout_s": 60}
"""The agent's own defaults, which hold for a rig that lives at its own pace."""
PERIOD = re.compile(r"^(poll_ms|every_ms) = (\d+)$", re.MULTILINE)
"""How often the register map has the rig asked."""

AGENT_TOML = """\
# Written by `millhand demo`: a node that watches one skid over Modbus TCP.
[node]
id = "{node}"
group = "demo"
data_dir = "{folder}/agent"
run_dir = "{run_dir}"

[telemetry]
enabled = true
brokers = ["mqtt://127.0.0.1:{broker_port}"]

[http]
port = 0

[models]
load = ["*"]
paths = {paths}
deadline_ms = {deadline_ms}
hang_ms = {hang_ms}
load_timeout_s = {load_timeout_s}

[plugins.rig]
[plugins.turbofan]

[[assets]]
name = "{asset}"
adapter = "modbus"
models = ["{model}"]

[assets.options]
host = "127.0.0.1"
port = {rig_port}
timeout_ms = {timeout_ms}
"""


@dataclass
class Outcome:
    """Everything that the table, demo.json and demo.html tell. Times `*_s` are the rig's own."""

    seed: int
    fault: str
    life_s: float
    onset_s: float | None
    failure_s: float | None
    profile: str
    models: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    orders: list[dict[str, Any]]
    tally: Tally
    acked: int
    windows: int
    latency_ms: dict[str, float | None]
    """None where no prediction was made."""
    rss_mb: dict[str, float]
    start_s: float
    broker: str
    hardware: list[tuple[str, str]]
    health: list[tuple[float, float]] = field(default_factory=list)
    velocity: list[tuple[float, float]] = field(default_factory=list)
    signals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    waveform: dict[str, Any] | None = None
    scale: float = 1.0
    """Rig seconds a second."""
    spoken: Spoken | None = None
    """What the language model did, where there was one."""
    load: Load = field(default_factory=Load)
    """The highest that was seen of the machine, at the beginning and at the end."""

    @property
    def true_alerts(self) -> list[dict[str, Any]]:
        """Alerts after the damage began and before the failure."""
        return [alert for alert in self.alerts if alert["lead_time_s"] is not None and alert["lead_time_s"] > 0]

    @property
    def false_alerts(self) -> int:
        """Alerts while nothing was wrong."""
        return sum(1 for alert in self.alerts if self.onset_s is None or alert["rig_time_s"] < self.onset_s)

    @property
    def watched_percent(self) -> float:
        """Share of the running machine's life that judged windows speak for; 0 where it was never seen to run."""
        running = [time_s for time_s, rpm in self._speed if rpm > STANDSTILL_RPM]
        ends = sorted(time_s for time_s, _ in self.health)
        following = (bisect_left(ends, time_s) for time_s in running)
        watched = sum(
            index < len(ends) and ends[index] - time_s <= JUDGED_S
            for index, time_s in zip(following, running, strict=True)
        )
        return 100 * watched / len(running) if running else 0.0

    @property
    def watched_enough(self) -> bool:
        """Whether the machine was watched so much that a life without an alert says something."""
        return self.watched_percent >= WATCHED_PERCENT_LIMIT

    @property
    def idle(self) -> list[tuple[float, float]]:
        """(start, end) of each stretch in which the machine stood still, as its speed readings say."""
        stretches = []
        for idle, group in groupby(self._speed, lambda point: point[1] <= STANDSTILL_RPM):
            times = [time_s for time_s, _ in group if time_s <= self.life_s]
            if idle and times:
                stretches.append((times[0], times[-1]))
        return stretches

    @property
    def _speed(self) -> list[tuple[float, float]]:
        return self.signals.get("speed", [])

    @property
    def shortcomings(self) -> list[str]:
        """Why the main job was not done; empty if it was."""
        said = {
            "the failure was not foreseen": self.failure_s is not None and not self.true_alerts,
            f"{self.false_alerts} false alerts": self.false_alerts > 0,
            f"{self.tally.lost} answers lost": self.tally.lost > 0,
            f"{self.tally.duplicates} answers doubled": self.tally.duplicates > 0,
            f"only {self.watched_percent:.0f} % of the running time was watched, "
            f"at least {WATCHED_PERCENT_LIMIT:.0f} % is needed": not self.watched_enough,
        }
        spoken = [] if self.spoken is None else self.spoken.shortcomings
        return [*(reason for reason, holds in said.items() if holds), *spoken]

    @property
    def good(self) -> bool:
        """Whether the main job was done."""
        return not self.shortcomings


@dataclass
class Watch:
    """What the demo saw of the running agent: its memory, and the snapshot behind the first alert."""

    alert: dict[str, Any] | None = None
    waveform: dict[str, Any] | None = None
    probability: float = 0.0


Progress = Callable[[str, float, Watch], None]
"""Called with the phase, its share done (0..1) and what is seen so far."""


def run(
    folder: Path,
    run_dir: Path,
    *,
    seed: int,
    fault: str,
    scale: float,
    progress: Progress,
    models: Path | None = None,
) -> Outcome:
    """Run the demo in `folder`; with a language model where its folder of `models` is given.

    Raises DemoError naming the part that failed; every process is ended either way.
    """
    watch, load = Watch(), machine_load()
    with Stack(folder, scale) as stack:
        progress("starting broker and hub", 0.0, watch)
        hub = HubSide.start(stack, folder)
        rig_log = folder / "rig.jsonl"
        command = python_module("millhand_plugins.rig", "--port", "0", "--seed", str(seed), "--fault", fault)
        command += ["--scale", str(scale), "--log", str(rig_log), "--wait", "--exit-at-end"]
        progress("starting agent", 0.0, watch)
        rig, ready = stack.start("rig", command, ready_line=True)
        config = write_config(folder, run_dir, hub.broker_port, ready["port"], scale, models)
        agent, client, start_s = _start_agent(stack, config, run_dir, scale)
        if models is not None:
            progress("starting the language model", 0.0, watch)
            language.wait_ready(stack, client)
        stack.wait(lambda: '"served"' in rig_log.read_text(), "the first reading of the rig")
        _watch_life(stack, rig, client, scale, progress, watch)
        spoken = None
        if models is not None:
            progress("the language model writes", 1.0, watch)
            spoken = language.listen(stack, client, run_dir / "control.sock")
        progress("waiting until the hub has everything", 1.0, watch)
        stack.wait(lambda: _drained(client), "the hub's acknowledgement of every row", DRAIN_DEADLINE_S)
        state = client.call("state")
        predictions = client.call("prediction.list", asset=ASSET, limit=100_000)
        memory = _memory(agent)
        hardware = client.call("hardware")
        stack.end(agent)
        progress("counting", 1.0, watch)
        arrived = hub.finish(stack)
    log = read_rig_log(rig_log)
    rig_time = RigTime(log, arrived.sequences)
    return Outcome(
        seed=seed,
        fault=fault,
        life_s=log.truth["life_ms"] / 1000,
        onset_s=None if log.onset_ms is None else log.onset_ms / 1000,
        failure_s=None if log.failure_ms is None else log.failure_ms / 1000,
        profile=state["profile"],
        models=[{"name": m["name"], "versions": m["versions"]} for m in state["models"] if m["versions"]],
        alerts=[_alert(alert, rig_time, log.failure_ms) for alert in arrived.alerts],
        orders=arrived.orders,
        tally=count(log.served, [number for _, number in arrived.sequences]),
        acked=arrived.rows,
        windows=len(predictions),
        latency_ms=state["assets"][0]["latency_ms"],
        rss_mb=memory,
        start_s=start_s,
        broker=hub.broker,
        hardware=[(str(name), str(value)) for name, value in hardware],
        health=[(rig_time.of(p["window_end_ns"]) / 1000, 1 - p["values"]["healthy"]) for p in predictions],
        velocity=[
            (rig_time.of(p["window_end_ns"]) / 1000, p["evidence"].get("velocity_rms_mm_s", float("nan")))
            for p in predictions
        ],
        signals={
            name: [(rig_time.of(source_ns) / 1000, value) for source_ns, value in points]
            for name, points in arrived.signals.items()
        },
        waveform=watch.waveform,
        scale=scale,
        spoken=spoken,
        load=max(load, machine_load(), key=lambda seen: seen.processes),
    )


def write_config(
    folder: Path, run_dir: Path, broker_port: int, rig_port: int, scale: float, models: Path | None
) -> Path:
    """The agent's configuration: the rig's register map comes from the rig's plugin, read at the rig's pace."""
    text = AGENT_TOML.format(
        folder=folder,
        run_dir=run_dir,
        broker_port=broker_port,
        rig_port=rig_port,
        node=NODE,
        asset=ASSET,
        model=MODEL,
        paths=[] if models is None else [str(models)],
        **{key: round(slowed(value, scale)) for key, value in DEADLINES.items()},
    )
    lines = (files("millhand_plugins.rig") / "modbus_map.toml").read_text(encoding="utf-8").splitlines()
    own = ("[assets.options]", "host", "port")
    register_map = "\n".join(line for line in lines if not line.startswith(own)) + "\n"
    text += PERIOD.sub(lambda found: f"{found[1]} = {round(slowed(int(found[2]), scale))}", register_map)
    if models is not None:
        text += language.TOML.format(model=language.MODEL)
    tomllib.loads(text)
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def _start_agent(stack: Stack, config: Path, run_dir: Path, scale: float) -> tuple[Part, ControlClient, float]:
    begin = time.monotonic()
    agent, _ = stack.start("agent", python_module("millhand", "--config", str(config), "run"))
    client = ControlClient(run_dir / "control.sock", slowed(CALL_DEADLINE_S, scale))

    def ready() -> bool:
        try:
            return bool(client.call("state")["ready"])
        except ControlError:
            return False

    stack.wait(ready, "the agent's readiness")
    return agent, client, time.monotonic() - begin


def _watch_life(stack: Stack, rig: Part, client: ControlClient, scale: float, progress: Progress, watch: Watch) -> None:
    """Follow the life until the rig's process ends; keep the snapshot behind the first alert."""
    begin = time.monotonic()
    life_s = 37.0 / scale
    while rig.process.poll() is None:
        stack.check()
        with suppress(ControlError):
            _check_asset(client)
            newest = client.call("prediction.list", asset=ASSET, limit=1)
            watch.probability = 1 - newest[-1]["values"]["healthy"] if newest else 0.0
            alerts = client.call("alert.list", limit=1)
            if alerts and watch.alert is None:
                watch.alert = alerts[0]
                watch.waveform = client.call("waveform.show", asset=ASSET, name="vibration_de")
        progress("the machine runs", min((time.monotonic() - begin) / life_s, 1.0), watch)
        time.sleep(LOOK_EVERY_S)
    stack.check()


def _check_asset(client: ControlClient) -> None:
    """Raises DemoError where the agent cannot watch the rig at all."""
    asset = client.call("asset.list")[0]
    if asset["state"] == "waiting":
        raise DemoError(f"the agent cannot watch the rig: {asset['error']}", hint=asset["hint"])


def _drained(client: ControlClient) -> bool:
    status = client.call("telemetry.status")
    return bool(status["queued_rows"] == 0)


def _alert(alert: dict[str, Any], rig_time: RigTime, failure_ms: int | None) -> dict[str, Any]:
    at_ms = rig_time.of(alert["raised_ns"])
    lead_s = None if failure_ms is None else round((failure_ms - at_ms) / 1000, 2)
    return {
        "asset": alert["asset"],
        "kind": alert["kind"],
        "lead_time_s": lead_s,
        "rig_time_s": at_ms / 1000,
        "evidence": alert["evidence"],
        "message": alert["message"],
    }


def _memory(agent: Part) -> dict[str, float]:
    """Resident memory in MB (10^6 bytes) of the daemon and of each of its processes."""
    process = psutil.Process(agent.process.pid)
    memory = {"daemon": process.memory_info().rss / 1e6}
    for child in process.children(recursive=True):
        words = " ".join(child.cmdline())
        name = "http" if "serving.http" in words else "worker" if "serving.worker" in words else "other"
        memory[name] = memory.get(name, 0.0) + child.memory_info().rss / 1e6
    return {name: round(value, 1) for name, value in memory.items()}
