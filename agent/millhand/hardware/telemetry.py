"""Cheap repeated readings of the node for metrics: one pass costs about a millisecond, a missing source one gauge."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
INTEGRATED_UUID = "0"
"""Stands for the UUID of a Jetson's GPU where no NVML gives one, as in CUDA_VISIBLE_DEVICES."""
FULL_SCALE_MA_UOHM = 163_800_000
"""An INA3221's largest shunt voltage, 163.8 mV: a limit at full scale is one that nobody has set."""
# A zone whose rail is off gives -256 C or a failing read; no board works below -40 C.
COLDEST_C = -45.0

Gauge = tuple[str, float]
Source = Callable[[], Iterator[Gauge]]


class Rail(NamedTuple):
    """A channel of an INA3221; its files give millivolts and milliamperes."""

    name: str
    folder: str
    channel: int

    def watts(self, tree: Tree) -> float | None:
        return self._times_volts(tree, tree.number(f"{self.folder}/curr{self.channel}_input"))

    def limit_watts(self, tree: Tree) -> float | None:
        """The mean current above which the board throttles, at today's voltage; None where none is set."""
        limit_ma = tree.number(f"{self.folder}/curr{self.channel}_max")
        shunt_uohm = tree.number(f"{self.folder}/shunt{self.channel}_resistor")
        if limit_ma is None or not shunt_uohm or limit_ma * shunt_uohm >= FULL_SCALE_MA_UOHM:
            return None
        return self._times_volts(tree, limit_ma)

    def _times_volts(self, tree: Tree, milliamperes: int | None) -> float | None:
        millivolts = tree.number(f"{self.folder}/in{self.channel}_input")
        return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6


class Sampler:
    """Reads gauges from NVML, /proc and /sys.

    Keys are Prometheus samples: `nv_cpu_utilization`, `nv_gpu_memory_used_bytes{gpu_uuid="GPU-..."}`. Triton's names
    and units (watts, joules, shares of 1) wherever it has one, on a Jetson too. `path` is the folder whose file system
    `millhand_disk_free_bytes` means; `root` is another tree to read instead of the live one (tests, chroots).
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
        self._handles: dict[str, Any] = {}
        if self._tree.live:
            self._nvml, self._handles = _open_nvml()
        self._energy_first_j: dict[str, float] = {}
        self._energy_j = 0.0
        self._power: tuple[float, float] | None = None
        self.sample_s = 0.0
        """How long the last sample took, in seconds."""

    def sample(self) -> dict[str, float]:
        """Every gauge that can be read now. The first lacks `nv_cpu_utilization`, a mean since the sample before."""
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
        self._nvml, self._handles = None, {}

    def _cpu(self) -> Iterator[Gauge]:
        words = (self._tree.text("proc/stat") or "").partition("\n")[0].split()
        # user nice system idle iowait irq softirq steal; guest times are counted in user already.
        if len(words) < 9 or words[0] != "cpu" or not all(word.isdigit() for word in words[1:9]):
            return
        ticks = [int(word) for word in words[1:9]]
        total, idle = float(sum(ticks)), float(ticks[3] + ticks[4])
        before, self._busy = self._busy, (total, idle)
        if before is not None and total > before[0]:
            yield "nv_cpu_utilization", 1 - max(0.0, idle - before[1]) / (total - before[0])

    def _memory(self) -> Iterator[Gauge]:
        total, used = self._main_memory()
        if total is not None:
            yield "nv_cpu_memory_total_bytes", total
        if used is not None:
            yield "nv_cpu_memory_used_bytes", used

    def _main_memory(self) -> tuple[float | None, float | None]:
        """(total, used) in bytes; used is what programs could not have, as Triton counts it."""
        kilobytes: dict[str, float] = {}
        for line in (self._tree.text("proc/meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            value = rest.split()
            if value and value[0].isdigit():
                kilobytes[name] = float(value[0])
        total, available = kilobytes.get("MemTotal"), kilobytes.get("MemAvailable")
        if total is None:
            return None, None
        return total * 1024, None if available is None else (total - available) * 1024

    def _disk(self) -> Iterator[Gauge]:
        with contextlib.suppress(OSError):
            usage = os.statvfs(self._path)
            yield "millhand_disk_total_bytes", float(usage.f_blocks * usage.f_frsize)
            yield "millhand_disk_free_bytes", float(usage.f_bavail * usage.f_frsize)

    def _temperatures(self) -> Iterator[Gauge]:
        for path, zone in self._zones:
            value = self._tree.number(f"{path}/temp")
            if value is not None and value / 1000 > COLDEST_C:
                yield f'millhand_temperature_celsius{{zone="{_label(zone)}"}}', value / 1000

    def _jetson(self) -> Iterator[Gauge]:
        powers: dict[str, float] = {}
        for rail in self._rails:
            watts = rail.watts(self._tree)
            if watts is not None:
                powers[rail.name] = watts
                yield f'millhand_rail_power_watts{{rail="{_label(rail.name)}"}}', watts
        if not self._gpu_load:
            return
        label = f'{{gpu_uuid="{_label(next(iter(self._handles), INTEGRATED_UUID))}"}}'
        load = self._tree.number(self._gpu_load)
        if load is not None:
            yield f"nv_gpu_utilization{label}", load / 1000
        total, used = self._main_memory()  # one memory for CPU and GPU
        if total is not None:
            yield f"nv_gpu_memory_total_bytes{label}", total
        if used is not None:
            yield f"nv_gpu_memory_used_bytes{label}", used
        feed = next((rail for rail in self._rails if "GPU" in rail.name), None)
        if feed is not None and feed.name in powers:
            yield f"nv_gpu_power_usage{label}", powers[feed.name]
            yield f"nv_energy_consumption{label}", self._integrate(powers[feed.name])
            limit = feed.limit_watts(self._tree)
            if limit is not None:
                yield f"nv_gpu_power_limit{label}", limit

    def _integrate(self, watts: float) -> float:
        """Joules since the first sample, by the trapezoids between samples: a board has no meter of energy."""
        now_s = time.monotonic()
        if self._power is not None:
            then_s, before = self._power
            self._energy_j += (now_s - then_s) * (before + watts) / 2
        self._power = now_s, watts
        return self._energy_j

    def _gpus(self) -> Iterator[Gauge]:
        nvml = self._nvml
        for uuid, handle in self._handles.items():
            label = f'{{gpu_uuid="{_label(uuid)}"}}'
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
            if memory is not None:
                yield f"nv_gpu_memory_total_bytes{label}", float(memory.total)
                yield f"nv_gpu_memory_used_bytes{label}", float(memory.used)
            rates = self._ask("nvmlDeviceGetUtilizationRates", handle)
            if rates is not None:
                yield f"nv_gpu_utilization{label}", rates.gpu / 100
            heat = self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
            if heat is not None:
                yield f"millhand_gpu_temperature_celsius{label}", float(heat)
            power = self._ask("nvmlDeviceGetPowerUsage", handle)
            if power is not None:
                yield f"nv_gpu_power_usage{label}", power / 1000
            limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
            if limit is not None:
                yield f"nv_gpu_power_limit{label}", limit / 1000
            energy = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
            if energy is not None:
                yield (
                    f"nv_energy_consumption{label}",
                    energy / 1000 - self._energy_first_j.setdefault(uuid, energy / 1000),
                )

    def _ask(self, call: str, *arguments: Any) -> Any:
        """One NVML call; None where the card or the driver refuses."""
        try:
            return getattr(self._nvml, call)(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _glob_zones(self) -> list[str]:
        return self._tree.glob("sys/class/thermal/thermal_zone*")

    def _find_rails(self) -> list[Rail]:
        """Each INA3221 channel that a Jetson's carrier names."""
        rails = []
        for folder in self._tree.glob("sys/class/hwmon/hwmon*"):
            if self._tree.text(f"{folder}/name") != "ina3221":
                continue
            for channel in (1, 2, 3):
                name = known(self._tree.text(f"{folder}/in{channel}_label"))
                if name and name != "NC":
                    rails.append(Rail(name, folder, channel))
        return rails


def _open_nvml() -> tuple[Any, dict[str, Any]]:
    """The binding and UUID -> handle of every GPU."""
    if not has_library():
        return None, {}
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, {}
    handles = {}
    with contextlib.suppress(pynvml.NVMLError):
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            handles[_uuid(pynvml, handle) or str(index)] = handle
    return pynvml, handles


def _uuid(nvml: Any, handle: Any) -> str:
    try:
        uuid = nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError:
        return ""
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)


def _label(text: str) -> str:
    """Text that may stand in a Prometheus label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
