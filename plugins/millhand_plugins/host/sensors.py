"""The node's sensors, as probes: small blocking functions that each give a few readings."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from millhand_plugins.host.options import HostOptions

# A board's sensor outside this range is not wired, or its chip is misread.
_COLDEST_CEL, _HOTTEST_CEL = -60.0, 200.0


class Sample(NamedTuple):
    """One measured value; None where the sensor gives nonsense."""

    name: str
    value: float | None
    unit: str


Probe = Callable[[], list[Sample]]


def probes(options: HostOptions) -> dict[str, Probe]:
    """The probes that `options` asks for, by name. A probe may raise whatever psutil and the kernel come up with."""
    known: dict[str, Probe] = {
        "cpu": CpuUsage(),
        "load": load,
        "memory": memory,
        "swap": swap,
        "disk_io": Rates("disk", disk_bytes),
        "network": Rates("network", lambda: network_bytes(options.interfaces)),
        "temperature": temperatures,
        "fan": fans,
        "agent": agent,
    }
    chosen: dict[str, Probe] = {name: known[name] for name in options.include if name != "mounts"}
    if "mounts" in options.include:
        chosen |= {f"mount {mount}": _mount_probe(mount) for mount in options.mounts}
    return chosen


class CpuUsage:
    """Share of time that the processors were busy since the last call; nothing at the first.

    Not psutil.cpu_percent: that keeps its past for each thread, and probes run in changing threads.
    """

    def __init__(self) -> None:
        self._past: tuple[float, float] | None = None

    def __call__(self) -> list[Sample]:
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user, nice
        past, self._past = self._past, (idle_s, total_s)
        if past is None or total_s <= past[1]:
            return []
        busy = 1 - (idle_s - past[0]) / (total_s - past[1])
        return [Sample("cpu_used", 100 * min(1.0, max(0.0, busy)), "%")]


class Rates:
    """Bytes a second since the last call, from counters that only grow; nothing at the first call or after a reset."""

    def __init__(self, prefix: str, counters: Callable[[], Mapping[str, int]]) -> None:
        self._prefix = prefix
        self._counters = counters
        self._past: tuple[float, Mapping[str, int]] | None = None

    def __call__(self) -> list[Sample]:
        now_s, counts = time.monotonic(), self._counters()
        past, self._past = self._past, (now_s, counts)
        if past is None or now_s <= past[0]:
            return []
        past_s, before = past
        return [
            Sample(
                f"{self._prefix}_{name}",
                (count - before[name]) / (now_s - past_s) if name in before and count >= before[name] else None,
                "By/s",
            )
            for name, count in counts.items()
        ]


def load() -> list[Sample]:
    """Runnable tasks, averaged over 1, 5 and 15 minutes."""
    averages = zip(("load_1m", "load_5m", "load_15m"), os.getloadavg(), strict=True)
    return [Sample(name, value, "1") for name, value in averages]


def memory() -> list[Sample]:
    state = psutil.virtual_memory()
    return [Sample("memory_used", state.percent, "%"), Sample("memory_available", float(state.available), "By")]


def swap() -> list[Sample]:
    """Nothing on a node without swap."""
    state = psutil.swap_memory()
    return [Sample("swap_used", state.percent, "%")] if state.total else []


def mount_usage(mount: Path) -> list[Sample]:
    state = psutil.disk_usage(str(mount))
    return [Sample(f"disk_used:{mount}", state.percent, "%"), Sample(f"disk_free:{mount}", float(state.free), "By")]


def disk_bytes() -> Mapping[str, int]:
    state = psutil.disk_io_counters()
    return {} if state is None else {"read": state.read_bytes, "written": state.write_bytes}


def network_bytes(interfaces: tuple[str, ...]) -> Mapping[str, int]:
    """Raises KeyError for an interface that is not there."""
    states = psutil.net_io_counters(pernic=True)
    chosen = [states[name] for name in interfaces] or [state for name, state in states.items() if name != "lo"]
    return {"received": sum(state.bytes_recv for state in chosen), "sent": sum(state.bytes_sent for state in chosen)}


def temperatures() -> list[Sample]:
    return _named("temperature", psutil.sensors_temperatures(), "Cel", _COLDEST_CEL, _HOTTEST_CEL)


def fans() -> list[Sample]:
    return _named("fan", psutil.sensors_fans(), "rpm", 0, math.inf)


def agent() -> list[Sample]:
    """Memory that this process holds."""
    return [Sample("agent_rss", float(psutil.Process().memory_info().rss), "By")]


def _named(prefix: str, chips: Mapping[str, Iterable[Any]], unit: str, low: float, high: float) -> list[Sample]:
    """Samples called `prefix:chip/label`; sensors of one chip without labels, or with the same, are numbered."""
    samples: list[Sample] = []
    seen: Counter[str] = Counter()
    for chip, item in ((chip, item) for chip, items in chips.items() for item in items):
        name = f"{prefix}:{chip}/{item.label}" if item.label else f"{prefix}:{chip}"
        seen[name] += 1
        good = item.current is not None and low <= item.current <= high
        numbered = name if seen[name] == 1 else f"{name}#{seen[name]}"
        samples.append(Sample(numbered, item.current if good else None, unit))
    return samples


def _mount_probe(mount: Path) -> Probe:
    return lambda: mount_usage(mount)
