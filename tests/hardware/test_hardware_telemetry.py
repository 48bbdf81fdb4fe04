"""Gauges of the live node and of a recorded Jetson."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from millhand.hardware.telemetry import Sampler


def jetson(root: Path) -> Path:
    files = {
        "proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3\n",
        "proc/meminfo": "MemTotal:       1000 kB\nMemAvailable:    400 kB\n",
        "sys/devices/platform/bus@0/17000000.gpu/load": "321\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "45500\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/hwmon/hwmon3/name": "ina3221\n",
        "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
        "sys/class/hwmon/hwmon3/in1_input": "19000\n",
        "sys/class/hwmon/hwmon3/curr1_input": "200\n",
        "sys/class/hwmon/hwmon3/in2_label": "NC\n",
        "sys/class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0\n",
        "sys/class/hwmon/hwmon3/in3_input": "5000\n",
        "sys/class/hwmon/hwmon3/curr3_input": "640\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


EXPECTED = {
    "memory_total_bytes": 1000 * 1024,
    "memory_available_bytes": 400 * 1024,
    'gpu_utilisation_percent{gpu="0"}': 32.1,
    'temperature_celsius{zone="cpu-thermal"}': 45.5,
    'rail_power_watts{rail="VDD_GPU_SOC"}': 3.8,
    'rail_power_watts{rail="VIN_SYS_5V0"}': 3.2,
}


def recorded(gauges: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in gauges.items() if not name.startswith("disk_")}


def test_recorded_jetson(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, jetson(tmp_path))
    assert recorded(sampler.sample()) == pytest.approx(EXPECTED)
    (tmp_path / "proc/stat").write_text("cpu  150 0 150 850 50 0 0 0 0 0\n")
    assert sampler.sample()["cpu_percent"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("path", "gauge"),
    [
        ("sys/devices/platform/bus@0/17000000.gpu/load", 'gpu_utilisation_percent{gpu="0"}'),
        ("sys/class/thermal/thermal_zone0/temp", 'temperature_celsius{zone="cpu-thermal"}'),
        ("sys/class/hwmon/hwmon3/curr3_input", 'rail_power_watts{rail="VIN_SYS_5V0"}'),
        ("sys/class/hwmon/hwmon3/in1_input", 'rail_power_watts{rail="VDD_GPU_SOC"}'),
        ("proc/stat", None),
    ],
)
def test_one_missing_file_drops_one_gauge(path: str, gauge: str | None, tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, jetson(tmp_path))
    sampler.sample()
    (tmp_path / path).unlink()
    gauges = recorded(sampler.sample())
    assert gauges == pytest.approx({name: value for name, value in EXPECTED.items() if name != gauge})


def test_live_cpu_follows_load() -> None:
    sampler = Sampler()
    sampler.sample()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    gauges = sampler.sample()
    assert gauges["cpu_percent"] >= 100 / (os.cpu_count() or 1) * 0.5
    assert 0 < gauges["memory_available_bytes"] <= gauges["memory_total_bytes"]
    assert 0 < gauges["disk_free_bytes"] <= gauges["disk_total_bytes"]
    sampler.close()
    assert sampler.sample()["memory_total_bytes"] == gauges["memory_total_bytes"]


def test_a_sample_is_cheap() -> None:
    sampler = Sampler()
    costs = []
    for _ in range(20):
        sampler.sample()
        costs.append(sampler.sample_s)
    assert sorted(costs)[10] < 0.02
    sampler.close()


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU here")
def test_live_gpu() -> None:
    sampler = Sampler()
    gauges = sampler.sample()
    assert 0 < gauges['gpu_memory_used_bytes{gpu="0"}'] < gauges['gpu_memory_total_bytes{gpu="0"}']
    assert 0 < gauges['gpu_temperature_celsius{gpu="0"}'] < 110
    assert gauges['gpu_power_watts{gpu="0"}'] > 0
    sampler.close()
