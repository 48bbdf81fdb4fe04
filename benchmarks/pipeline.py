"""The pipeline under load: from the arrival of a reading to the committed prediction, and what reaches the hub.

A real agent with a real broker (nats-server) and hub. Engines are assets that replay generated recordings in real time
(adapter `file`, speed 1.0, model `turbofan-rul`, one prediction a row), every commit with synchronous=FULL.

Two latencies are given. *Arrival to commit*: the goal's, from the moment the adapter hands a row over. *Due to commit*:
from the moment at which the recording's clock says the row is due, so that a loop too busy to take it counts too; its
zero is the quickest row of the asset. Lost and duplicated are set differences between the recordings' rows and the
hub's database.

    python benchmarks/pipeline.py [--seconds 60] [--assets 5] [--rate 11]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from agent import BenchAgent
from figures import Figure, parser, percentile, progress, report

from millhand.demo.stack import Stack, python_module
from millhand.demo.tally import Tally, count
from millhand.telemetry.broker import EmbeddedBroker
from millhand_hub import queries
from millhand_plugins.turbofan.fleet import SENSORS, SETTINGS, Fleet

WARM_UP_S = 10.0
DRAIN_S = 60.0
FIRST_NS = 1_700_000_000_000_000_000
MODEL = "turbofan-rul"
EXTRA = ("fuel_flow", "oil_pressure")
COLUMNS = ("time", "sequence", *SETTINGS, *SENSORS, *EXTRA)
SIGNALS = len(COLUMNS) - 1
WEAR_SIGMA = 4.0
"""How far the sensors drift over a recording."""

CONFIG = """
[telemetry]
enabled = true
brokers = ["{broker}"]
[http]
port = 0
[plugins.turbofan]
"""
ASSET = """
[[assets]]
name = "{name}"
adapter = "file"
models = ["{model}"]
[assets.options]
path = "{path}"
time_column = "time"
time_format = "epoch_s"
speed = 1.0
"""


def write_recording(path: Path, rows: int, rate_hz: float, seed: int) -> None:
    """One engine at sea level that wears: sensors around the fleet's level for regime 0, drifting by WEAR_SIGMA."""
    fleet, generator = Fleet.read(), np.random.default_rng(seed)
    wear = np.linspace(0, WEAR_SIGMA, rows)[:, None] + generator.standard_normal((rows, len(SENSORS)))
    sensors = fleet.level[0] + fleet.spread[0] * wear
    extra = generator.normal([2.1, 410.0], [0.01, 2.0], (rows, len(EXTRA)))
    with path.open("w") as file:
        file.write(",".join(COLUMNS) + "\n")
        for row in range(rows):
            time_ns = FIRST_NS + round(row / rate_hz * 1e9)
            values = (*fleet.centres[0], *sensors[row], *extra[row])
            cells = [f"{time_ns / 1e9:.6f}", str(row), *(f"{value:.6g}" for value in values)]
            file.write(",".join(cells) + "\n")


def latencies_ms(agent: BenchAgent, names: list[str], since_ns: int, until_ns: int) -> tuple[list[float], list[float]]:
    """(arrival to commit, due to commit) of every prediction committed in that span of the monotonic clock."""
    arrival: list[float] = []
    due: list[float] = []
    for name in names:
        found = agent.call("asset.latencies", asset=name)
        late_ms = [(committed_ns - end_ns) / 1e6 for end_ns, committed_ns, _ in found]
        quickest = min(range(len(found)), key=late_ms.__getitem__)
        zero_ms = late_ms[quickest] - found[quickest][2]
        for (_, committed_ns, latency), late in zip(found, late_ms, strict=True):
            if since_ns <= committed_ns < until_ns:
                arrival.append(latency)
                due.append(late - zero_ms)
    return arrival, due


def totals(agent: BenchAgent) -> dict[str, int]:
    """Readings and predictions of all assets since the agent's start, and the store's commits."""
    assets = agent.call("asset.list")
    counted = {key: sum(asset["counters"][key] for asset in assets) for key in ("readings", "predictions")}
    store: dict[str, Any] = agent.call("state")["store"]
    return {**counted, "commits": store["commits"], "steps": store["steps"]}


def cpu_s(agent: BenchAgent) -> dict[str, float]:
    """CPU time spent by the daemon and by its children."""
    assert agent.process is not None
    daemon = psutil.Process(agent.process.pid)
    children = [child.cpu_times() for child in daemon.children(recursive=True)]
    own = daemon.cpu_times()
    return {"daemon": own.user + own.system, "children": sum(times.user + times.system for times in children)}


def arrivals(database_path: Path, names: list[str], rows: int) -> Tally:
    """Compare the recordings' rows, over all assets, with those of the hub's `sequence` readings."""
    produced = [index * rows + row for index in range(len(names)) for row in range(rows)]
    with queries.opened(database_path) as database:
        stored = [
            index * rows + int(value)
            for index, name in enumerate(names)
            for _, value in queries.readings(database, "bench", name, "sequence")
        ]
    return count(produced, stored)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0, help="steady state that is measured")
    arguments.add_argument("--assets", type=int, default=5)
    arguments.add_argument("--rate", type=float, default=11.0, help="rows a second of each asset")
    options = arguments.parse_args()
    rows = round((WARM_UP_S + options.seconds + 5) * options.rate)
    names = [f"engine-{index + 1}" for index in range(options.assets)]
    with tempfile.TemporaryDirectory() as place, Stack(Path(place)) as stack:
        folder = Path(place)
        with EmbeddedBroker(folder / "broker") as broker:
            (folder / "hub.toml").write_text(f'broker = "{broker.url}"\ndata_dir = "{folder}/hub"\n')
            hub, _ = stack.start("hub", python_module("millhand_hub", "--config", str(folder / "hub.toml")))
            hub_database = folder / "hub" / "hub.db"
            stack.wait(hub_database.exists, "the hub's database")
            config = CONFIG.format(broker=broker.url)
            for seed, name in enumerate(names):
                path = folder / f"{name}.csv"
                write_recording(path, rows, options.rate, seed)
                config += ASSET.format(name=name, path=path, model=MODEL)
            with BenchAgent(config) as agent:
                figures = measure(agent, names, options.seconds)
            stack.end(hub)
            tally = arrivals(hub_database, names, rows)
    figures += [
        Figure("rows produced", tally.produced, "rows"),
        Figure("lost on the way to the hub", tally.lost, "rows", "== 0"),
        Figure("duplicated at the hub", tally.duplicates, "rows", "== 0"),
    ]
    return report("pipeline", figures, load_average=os.getloadavg())


def measure(agent: BenchAgent, names: list[str], seconds: float) -> list[Figure]:
    """Let the agent warm up, watch the steady state, then wait until the hub has acknowledged everything."""
    progress(f"warming up for {WARM_UP_S:g} s")
    time.sleep(WARM_UP_S)
    before, spent_before, begin_ns = totals(agent), cpu_s(agent), time.monotonic_ns()
    progress(f"measuring for {seconds:g} s")
    time.sleep(seconds)
    after, spent_after, end_ns = totals(agent), cpu_s(agent), time.monotonic_ns()
    span_s = (end_ns - begin_ns) / 1e9
    arrival, due = latencies_ms(agent, names, begin_ns, end_ns)
    daemon_cpu, children_cpu = ((spent_after[key] - spent_before[key]) / span_s * 100 for key in spent_after)
    agent.wait_assets_ended(DRAIN_S)
    agent.wait(lambda: agent.call("telemetry.status")["queued_rows"] == 0, "the last acknowledgement", DRAIN_S)
    rates = {key: (after[key] - before[key]) / span_s for key in after}
    return [
        Figure("assets", len(names), f"with {SIGNALS} signals each"),
        Figure("readings", round(rates["readings"], 1), "1/s", ">= 1000"),
        Figure("predictions", round(rates["predictions"], 1), "1/s", ">= 50"),
        Figure("predictions measured", len(arrival), "predictions"),
        *(_rank("arrival to commit", arrival, percent) for percent in (50, 99, 100)),
        *(_rank("due to commit", due, percent) for percent in (50, 99, 100)),
        Figure("commits", round(rates["commits"], 1), "1/s"),
        Figure("steps in one commit", round(rates["steps"] / rates["commits"], 2), "steps"),
        Figure("CPU, daemon", round(daemon_cpu, 1), "% of a core"),
        Figure("CPU, worker and HTTP", round(children_cpu, 1), "% of a core"),
    ]


def _rank(what: str, values: list[float], percent: int) -> Figure:
    found = percentile(values, percent)
    goal = "<= 20" if (what, percent) == ("arrival to commit", 99) else ""
    name = f"{what}, {'max' if percent == 100 else f'p{percent}'}"
    return Figure(name, None if found is None else round(found, 2), "ms", goal)


if __name__ == "__main__":
    sys.exit(main())
