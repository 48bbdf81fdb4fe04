"""What the agent costs at rest: memory, start-up, idle CPU, and the command line's start.

A node with pipeline, store, telemetry (to a real nats-server) and HTTP active, and two models loaded: rig-fault and
turbofan-rul.
"Idle" is the node without assets, connected to its broker, with both models loaded and HTTP listening.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from agent import BenchAgent
from figures import Figure, progress, report

from millhand.telemetry.broker import EmbeddedBroker

SETTLE_S = 10.0
IDLE_S = 20.0
RUNS = 5

CONFIG = """
[telemetry]
enabled = true
brokers = ["mqtt://127.0.0.1:{port}"]
[http]
port = 0
[models]
load = ["rig-fault", "turbofan-rul"]
[plugins.rig]
[plugins.turbofan]
[[assets]]
name = "node"
adapter = "host"
[[assets]]
name = "skid"
adapter = "rig"
models = ["rig-fault"]
options = {{ fault = "none", speed = 1.0 }}
"""


def memory_mb(agent: BenchAgent) -> dict[str, float]:
    assert agent.process is not None
    daemon = psutil.Process(agent.process.pid)
    found = {"daemon": daemon.memory_info().rss / 1e6}
    for child in daemon.children(recursive=True):
        name = "http" if any("serving.http" in word for word in child.cmdline()) else "worker"
        found[name] = found.get(name, 0) + child.memory_info().rss / 1e6
        found["pss"] = found.get("pss", 0) + child.memory_full_info().pss / 1e6
    found["pss"] = found.get("pss", 0) + daemon.memory_full_info().pss / 1e6
    return found


def idle_cpu_percent(agent: BenchAgent) -> float:
    """CPU time of the daemon and all its processes over a stretch, as a share of one core."""
    assert agent.process is not None
    daemon = psutil.Process(agent.process.pid)
    family = [daemon, *daemon.children(recursive=True)]

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    before, begin = spent(), time.monotonic()
    time.sleep(IDLE_S)
    return 100 * (spent() - before) / (time.monotonic() - begin)


def help_s() -> float:
    runs = []
    for _ in range(RUNS):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "millhand", "--help"], check=True, stdout=subprocess.DEVNULL)
        runs.append(time.monotonic() - begin)
    return statistics.median(runs)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(Path(folder)) as broker:
        config = CONFIG.format(port=broker.port)
        progress("running with a rig and the host's sensors")
        with BenchAgent(config) as agent:
            time.sleep(SETTLE_S)
            memory = memory_mb(agent)
            starts = [agent.start_s]
        idle_config = config.split("[[assets]]")[0]
        progress("idle")
        with BenchAgent(idle_config) as agent:
            starts.append(agent.start_s)
            time.sleep(SETTLE_S)
            cpu = idle_cpu_percent(agent)
        for _ in range(RUNS - 2):
            with BenchAgent(config) as agent:
                starts.append(agent.start_s)
    figures = [
        Figure("daemon, RSS", round(memory["daemon"], 1), "MB", "<= 80"),
        Figure(
            "daemon and worker with both models, RSS", round(memory["daemon"] + memory["worker"], 1), "MB", "<= 160"
        ),
        Figure("HTTP process, RSS", round(memory.get("http", 0), 1), "MB"),
        Figure("all processes, PSS (shared pages counted once)", round(memory["pss"], 1), "MB"),
        Figure("ready after, median of 5", round(statistics.median(starts), 2), "s", "<= 2"),
        Figure("idle CPU, all processes", round(cpu, 2), "% of a core", "<= 1"),
        Figure("millhand --help, median of 5", round(help_s(), 3), "s", "<= 0.3"),
    ]
    return report("footprint", figures)


if __name__ == "__main__":
    sys.exit(main())
