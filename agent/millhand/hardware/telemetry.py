"""Cheap repeated readings of the node for metrics: one pass costs about a millisecond, a missing source one gauge."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from millhand.hardware.gpus import known
from millhand.hardware.nvml import has_library
from millhand.hardware.tree import Tree

# Where a Jetson's kernel shows the load of its GPU, in tenths of a percent.
GPU_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
)
# A zone whose rail is off gives -256 C or a failing read; no board works below -40 C.
COLDEST_C = -45.0

Gauge = tuple[str, float]
Source = Callable[[], Iterator[Gauge]]


class Sampler:
    """Reads gauges from NVML, /proc and /sys.

    Keys are Prometheus samples without a prefix: `cpu_percent`, `gpu_memory_used_bytes{gpu="0"}`. `path` is the folder
    whose file system `disk_free_bytes` means; `root` is another tree to read instead of the live one (tests, chroots).
    """

    def __init__(self, path: Path = Path("/"), root: Path | None = None) -> None:
        self._path = path
        self._tree = Tree(root or Path("/"))
        self._busy: tuple[float, float] | None = None
        self._zones = [
            (path, self._tree.text(f"{path}/type") or path.rsplit("_", 1)[-1]) for path in self._glob_zones()
        ]
        self._rails = self._find_rails()
        self._gpu_load = next((found for pattern in GPU_LOADS for found in self._tree.glob(pattern)), "")
        self._nvml: Any = None
        self._handles: list[Any] = []
        if self._tree.live:
            self._nvml, self._handles = _open_nvml()
        self.sample_s = 0.0
        """How long the last sample took, in seconds."""

    def sample(self) -> dict[str, float]:
        """Every gauge that can be read now. The first sample lacks `cpu_percent`, a mean since the sample before."""
        start = time.perf_counter()
        sources: tuple[Source, ...] = (
            self._cpu,
            self._memory,
            self._disk,
            self._temperatures,
            self._jetson,
            self._gpus,
        )
        gauges = {name: value for source in sources for name, value in source()}
        self.sample_s = time.perf_counter() - start
        return gauges

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml, self._handles = None, []

    def _cpu(self) -> Iterator[Gauge]:
        words = (self._tree.text("proc/stat") or "").partition("\n")[0].split()
        # user nice system idle iowait irq softirq steal; guest times are counted in user already.
        if len(words) < 9 or words[0] != "cpu" or not all(word.isdigit() for word in words[1:9]):
            return
        ticks = [int(word) for word in words[1:9]]
        total, idle = float(sum(ticks)), float(ticks[3] + ticks[4])
        before, self._busy = self._busy, (total, idle)
        if before is not None and total > before[0]:
            yield "cpu_percent", 100 * (1 - max(0.0, idle - before[1]) / (total - before[0]))

    def _memory(self) -> Iterator[Gauge]:
        for line in (self._tree.text("proc/meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            value = rest.split()
            if name in ("MemTotal", "MemAvailable") and value and value[0].isdigit():
                yield f"memory_{name.removeprefix('Mem').lower()}_bytes", float(value[0]) * 1024

    def _disk(self) -> Iterator[Gauge]:
        with contextlib.suppress(OSError):
            usage = os.statvfs(self._path)
            yield "disk_total_bytes", float(usage.f_blocks * usage.f_frsize)
            yield "disk_free_bytes", float(usage.f_bavail * usage.f_frsize)

    def _temperatures(self) -> Iterator[Gauge]:
        for path, zone in self._zones:
            value = self._tree.number(f"{path}/temp")
            if value is not None and value / 1000 > COLDEST_C:
                yield f'temperature_celsius{{zone="{_label(zone)}"}}', value / 1000

    def _jetson(self) -> Iterator[Gauge]:
        load = self._tree.number(self._gpu_load) if self._gpu_load else None
        if load is not None:
            yield 'gpu_utilisation_percent{gpu="0"}', load / 10
        for rail, volts, amperes in self._rails:
            millivolts, milliamperes = self._tree.number(volts), self._tree.number(amperes)
            if millivolts is not None and milliamperes is not None:
                yield f'rail_power_watts{{rail="{_label(rail)}"}}', millivolts * milliamperes / 1e6

    def _gpus(self) -> Iterator[Gauge]:
        nvml = self._nvml
        for index, handle in enumerate(self._handles):
            label = f'{{gpu="{index}"}}'
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
            if memory is not None:
                yield f"gpu_memory_total_bytes{label}", float(memory.total)
                yield f"gpu_memory_used_bytes{label}", float(memory.used)
            rates = self._ask("nvmlDeviceGetUtilizationRates", handle)
            if rates is not None:
                yield f"gpu_utilisation_percent{label}", float(rates.gpu)
            heat = self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
            if heat is not None:
                yield f"gpu_temperature_celsius{label}", float(heat)
            power = self._ask("nvmlDeviceGetPowerUsage", handle)
            if power is not None:
                yield f"gpu_power_watts{label}", power / 1000

    def _ask(self, call: str, *arguments: Any) -> Any:
        """One NVML call; None where the card or the driver refuses."""
        try:
            return getattr(self._nvml, call)(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _glob_zones(self) -> list[str]:
        return self._tree.glob("sys/class/thermal/thermal_zone*")

    def _find_rails(self) -> list[tuple[str, str, str]]:
        """(rail, file of millivolts, file of milliamperes) of each INA3221 channel that a Jetson's carrier names."""
        rails = []
        for folder in self._tree.glob("sys/class/hwmon/hwmon*"):
            if self._tree.text(f"{folder}/name") != "ina3221":
                continue
            for channel in (1, 2, 3):
                name = known(self._tree.text(f"{folder}/in{channel}_label"))
                if name and name != "NC":
                    rails.append((name, f"{folder}/in{channel}_input", f"{folder}/curr{channel}_input"))
        return rails


def _open_nvml() -> tuple[Any, list[Any]]:
    if not has_library():
        return None, []
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, []
    handles = []
    with contextlib.suppress(pynvml.NVMLError):
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return pynvml, handles


def _label(text: str) -> str:
    """Text that may stand in a Prometheus label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
