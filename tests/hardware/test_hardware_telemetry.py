"""Gauges of the live node and of a recorded Jetson."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from millhand.hardware.telemetry import Sampler
from millhand.testing import wait_until


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
        "sys/class/hwmon/hwmon3/curr1_max": "2000\n",
        "sys/class/hwmon/hwmon3/shunt1_resistor": "2000\n",
        "sys/class/hwmon/hwmon3/in2_label": "NC\n",
        "sys/class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0\n",
        "sys/class/hwmon/hwmon3/in3_input": "5000\n",
        "sys/class/hwmon/hwmon3/curr3_input": "640\n",
        "sys/class/hwmon/hwmon3/curr3_max": "32760\n",
        "sys/class/hwmon/hwmon3/shunt3_resistor": "5000\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GPU = '{gpu_uuid="0"}'
FED_BY_GPU_RAIL = [f"nv_gpu_power_usage{GPU}", f"nv_gpu_power_limit{GPU}", f"nv_energy_consumption{GPU}"]
EXPECTED = {
    "nv_cpu_memory_total_bytes": 1000 * 1024,
    "nv_cpu_memory_used_bytes": 600 * 1024,
    f"nv_gpu_utilization{GPU}": 0.321,
    f"nv_gpu_memory_total_bytes{GPU}": 1000 * 1024,
    f"nv_gpu_memory_used_bytes{GPU}": 600 * 1024,
    f"nv_gpu_power_usage{GPU}": 3.8,
    f"nv_gpu_power_limit{GPU}": 38.0,
    f"nv_energy_consumption{GPU}": 0.0,
    'millhand_temperature_celsius{zone="cpu-thermal"}': 45.5,
    'millhand_rail_power_watts{rail="VDD_GPU_SOC"}': 3.8,
    'millhand_rail_power_watts{rail="VIN_SYS_5V0"}': 3.2,
}


def recorded(gauges: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in gauges.items() if not name.startswith("millhand_disk_")}


def test_recorded_jetson(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, jetson(tmp_path))
    assert recorded(sampler.sample()) == pytest.approx(EXPECTED)
    (tmp_path / "proc/stat").write_text("cpu  150 0 150 850 50 0 0 0 0 0\n")
    assert sampler.sample()["nv_cpu_utilization"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("path", "gauges"),
    [
        ("sys/devices/platform/bus@0/17000000.gpu/load", [f"nv_gpu_utilization{GPU}"]),
        ("sys/class/thermal/thermal_zone0/temp", ['millhand_temperature_celsius{zone="cpu-thermal"}']),
        ("sys/class/hwmon/hwmon3/curr3_input", ['millhand_rail_power_watts{rail="VIN_SYS_5V0"}']),
        ("sys/class/hwmon/hwmon3/in1_input", ['millhand_rail_power_watts{rail="VDD_GPU_SOC"}', *FED_BY_GPU_RAIL]),
        ("sys/class/hwmon/hwmon3/curr1_max", [f"nv_gpu_power_limit{GPU}"]),
        ("proc/stat", []),
        (
            "proc/meminfo",
            [
                "nv_cpu_memory_total_bytes",
                "nv_cpu_memory_used_bytes",
                f"nv_gpu_memory_total_bytes{GPU}",
                f"nv_gpu_memory_used_bytes{GPU}",
            ],
        ),
    ],
)
def test_one_missing_file_drops_what_it_gives(path: str, gauges: list[str], tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, jetson(tmp_path))
    (tmp_path / path).unlink()
    assert recorded(sampler.sample()) == pytest.approx(
        {name: value for name, value in EXPECTED.items() if name not in gauges}
    )


def test_a_jetsons_energy_is_its_power_over_time(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, jetson(tmp_path))
    began = time.monotonic()
    sampler.sample()
    sampled = time.monotonic()
    wait_until(lambda: time.monotonic() > sampled + 0.05, "some time")
    (tmp_path / "sys/class/hwmon/hwmon3/curr1_input").write_text("600\n")  # 3.8 W became 11.4 W
    first = sampler.sample()[f"nv_energy_consumption{GPU}"]
    most_j = (time.monotonic() - began) * (3.8 + 11.4) / 2
    assert 0.05 * (3.8 + 11.4) / 2 <= first <= most_j
    assert sampler.sample()[f"nv_energy_consumption{GPU}"] >= first


def test_a_limit_that_nobody_set_is_left_out(tmp_path: Path) -> None:
    root = jetson(tmp_path)
    (root / "sys/class/hwmon/hwmon3/curr1_max").write_text("81900\n")  # 163.8 mV at 2 mOhm: the register's full scale
    assert f"nv_gpu_power_limit{GPU}" not in Sampler(tmp_path, root).sample()


def test_live_cpu_follows_load() -> None:
    sampler = Sampler()
    sampler.sample()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    gauges = sampler.sample()
    assert gauges["nv_cpu_utilization"] >= 1 / (os.cpu_count() or 1) * 0.5
    assert 0 < gauges["nv_cpu_memory_used_bytes"] <= gauges["nv_cpu_memory_total_bytes"]
    assert 0 < gauges["millhand_disk_free_bytes"] <= gauges["millhand_disk_total_bytes"]
    sampler.close()
    assert sampler.sample()["nv_cpu_memory_total_bytes"] == gauges["nv_cpu_memory_total_bytes"]


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
    samples = sampler.sample()
    uuid = next(name for name in samples if name.startswith("nv_gpu_utilization{")).partition("{")[2]
    gauges = {name.partition("{")[0]: value for name, value in samples.items() if name.endswith(uuid)}
    assert uuid.startswith('gpu_uuid="GPU-')
    assert 0 <= gauges["nv_gpu_utilization"] <= 1
    assert 0 < gauges["nv_gpu_memory_used_bytes"] < gauges["nv_gpu_memory_total_bytes"]
    assert 0 < gauges["millhand_gpu_temperature_celsius"] < 110
    assert 0 < gauges["nv_gpu_power_usage"] < 2 * gauges["nv_gpu_power_limit"]
    assert gauges["nv_energy_consumption"] == 0, "since the sampler's start"
    sampler.close()
