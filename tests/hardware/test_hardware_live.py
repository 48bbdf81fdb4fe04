"""Live readers of absent hardware: NVML with MIG as a stand-in made from a capture, Jetson tools as scripts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millhand.hardware import discovery, nvml
from millhand.hardware.facts import Accelerator, Hardware
from millhand.hardware.tree import Tree

MIB = 1 << 20
# The slices of a recorded H100: (UUID, MiB, multiprocessors, GPU instance).
SLICES = [("MIG-a", 40448, 60, 2), ("MIG-b", 20096, 32, 3), ("MIG-c", 9984, 16, 9), ("MIG-d", 9984, 16, 10)]
CALLS = {
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetUUID": "uuid",
    "nvmlDeviceGetMemoryInfo": "memory_bytes",
    "nvmlDeviceGetCudaComputeCapability": None,  # the name tells it too
    "nvmlDeviceGetArchitecture": None,
    "nvmlDeviceGetPciInfo": "pci_bus",
    "nvmlDeviceGetMigMode": "mig_enabled",
    "nvmlDeviceGetEccMode": "ecc_enabled",
    "nvmlDeviceGetPersistenceMode": "persistence",
    "nvmlDeviceGetEnforcedPowerLimit": "power_limit_w",
    "nvmlDeviceGetPowerUsage": "power_w",
    "nvmlDeviceGetTemperature": "temperature_c",
}


class NVMLError(Exception):
    """As NVML's binding raises it."""


class NotSupported(NVMLError):
    """What a card cannot do."""


class StandIn(SimpleNamespace):
    """An H100 in MIG mode behind NVML's names; `broken` calls fail, with `error`."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NotSupported
    NVMLError_NotFound = NVMLError_InvalidArgument = NotSupported
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, broken: str = "", error: type[Exception] = NVMLError) -> None:
        super().__init__()
        self.broken, self.error, self.closed = broken, error, False

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("broken"):
            error = object.__getattribute__(self, "error")

            def fail(*_: Any) -> Any:
                raise error("GPU is lost")

            fail.__name__ = name
            return fail
        return super().__getattribute__(name)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return ("gpu", index)

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"590.48.01"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return "GPU-0" if handle[0] == "gpu" else SLICES[handle[1]][0]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=81559 * MIB if handle[0] == "gpu" else SLICES[handle[1]][1] * MIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetArchitecture(self, handle: Any) -> int:
        return 9

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId="00000000:00:09.0")

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetEccMode(self, handle: Any) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetPersistenceMode(self, handle: Any) -> int:
        return 1

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return 71_270

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return 42

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        if index >= len(SLICES):
            raise NotSupported("Not Found")
        return ("slice", index)

    def nvmlDeviceGetAttributes(self, handle: Any) -> Any:
        return SimpleNamespace(multiprocessorCount=SLICES[handle[1]][2])

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        return SLICES[handle[1]][3]

    def nvmlDeviceGetComputeInstanceId(self, handle: Any) -> int:
        return 0

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int:
        return 1


def read(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn, root: Path) -> Hardware:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr(nvml, "has_library", lambda: True)
    return nvml.read_nvml(Tree(root))


def test_mig_slices_through_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = StandIn()
    node = read(monkeypatch, stand_in, tmp_path)
    gpu = node.accelerators[0]
    assert (node.driver, node.cuda, gpu.mig_enabled, gpu.power_limit_w) == ("590.48.01", "13.1", True, 700)
    assert [(part.uuid, part.profile, part.gpu_instance, part.index) for part in gpu.mig] == [
        ("MIG-a", "3g.40gb", 2, 0), ("MIG-b", "2g.20gb", 3, 1), ("MIG-c", "1g.10gb", 9, 2), ("MIG-d", "1g.10gb", 10, 3),
    ]  # fmt: skip
    assert node.problems == ()
    assert stand_in.closed


@pytest.mark.parametrize("call", CALLS)
def test_each_refused_call_costs_one_fact(call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = read(monkeypatch, StandIn(), tmp_path).accelerators[0]
    node = read(monkeypatch, StandIn(call), tmp_path)
    gpu = node.accelerators[0]
    changed = {name for name in Accelerator.__struct_fields__ if getattr(gpu, name) != getattr(whole, name)}
    # Slices are read with the same calls, and without MIG mode their absence and the NVLinks follow.
    assert changed - {"mig", "nvlinks"} == ({CALLS[call]} - {None})
    assert any(call in problem.message and problem.hint for problem in node.problems)
    quiet = read(monkeypatch, StandIn(call, NotSupported), tmp_path)
    assert quiet.problems == (), "what a card does not support is no problem"


class Newer(StandIn):
    """A card, an architecture and a driver of years to come."""

    def nvmlSystemGetDriverVersion(self) -> str:
        return "1203.07.01-beta"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 21030

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "NVIDIA Z900 2TB HBM9"

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        return 19, 1

    def nvmlDeviceGetArchitecture(self, handle: Any) -> int:
        return 77


def test_a_driver_newer_than_known_is_read_without_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = read(monkeypatch, Newer(), tmp_path)
    (gpu,) = node.accelerators
    assert (node.driver, node.cuda, gpu.name, gpu.compute_capability) == (
        "1203.07.01-beta", "21.3", "NVIDIA Z900 2TB HBM9", "19.1",
    )  # fmt: skip
    assert gpu.ready
    assert node.problems == ()


def test_a_driver_that_does_not_start_shows_the_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:0b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    node = read(monkeypatch, StandIn("nvmlInit"), tmp_path)
    assert [(gpu.pci_bus, gpu.ready) for gpu in node.accelerators] == [("00000000:0b:00.0", False)]
    assert node.problems[0].message == "NVML does not start: GPU is lost"
    # The library without a card, as in many images, is no problem.
    (device / "vendor").write_text("0x8086\n")
    assert read(monkeypatch, StandIn("nvmlInit"), tmp_path).problems == ()


@pytest.mark.parametrize(
    ("mode", "remedy"), [(0o660, "add the agent's user to the group"), (0o600, "NVreg_DeviceFileMode=0660")]
)
def test_a_device_that_may_not_be_opened(
    mode: int, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = tmp_path / "sys/bus/pci/devices/0000:0b:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    device = tmp_path / "nvidiactl"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(nvml, "CONTROL_DEVICE", str(device))
    monkeypatch.setattr(nvml.os, "access", lambda *_: False)  # root may open everything
    (problem,) = read(monkeypatch, StandIn("nvmlInit"), tmp_path).problems
    assert f"this user may not open {device} (-rw" in problem.message
    assert remedy in problem.hint


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_jetson_tools_are_run_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "RAM 2000/62841MB (lfb 466x4MB) CPU [1%@729] GR3D_FREQ 7% tj@51C VDD_GPU_SOC 1mW/1mW VDD_CPU_CV 1mW/1mW"
    script(tmp_path, "nvpmodel", "echo 'NV Power Mode: MAXN'; echo 0")
    script(tmp_path, "tegrastats", f"while true; do echo '{line} VIN_SYS_5V0 1mW/1mW'; sleep 0.05; done")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    power, stats, _ = discovery._run_jetson_tools(Tree(tmp_path))
    assert power.jetson is not None
    assert (power.jetson.power_mode, power.jetson.power_mode_id) == ("MAXN", 0)
    assert stats.jetson is not None
    assert (stats.jetson.module, stats.jetson.gpu_load_percent) == ("Jetson AGX Orin 64GB", 7)


def test_a_tool_that_hangs_or_is_missing_costs_its_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path, "tegrastats", "sleep 60 & wait")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(discovery, "COMMAND_DEADLINE_S", 0.3)
    start = time.monotonic()
    power, stats, _ = discovery._run_jetson_tools(Tree(tmp_path))
    assert time.monotonic() - start < 5
    assert power.problems[0].source == "nvpmodel"
    assert stats.problems[0].message == "it cannot be run, or says nothing"


def test_fan(tmp_path: Path) -> None:
    fan = tmp_path / "sys/devices/platform/pwm-fan/hwmon/hwmon1"
    fan.mkdir(parents=True)
    (fan / "pwm1").write_text("102\n")
    assert discovery._run_jetson_tools(Tree(tmp_path))[-1].jetson.fan_percent == 40  # type: ignore[union-attr]
