"""Energy of an inference, from the files of a Jetson's power rails; NVML's meter has the same gauge."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from millhand.hardware.telemetry import Sampler
from millhand.workshop.energy import Meter


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """A rail of 19 V and 800 mA feeds the GPU."""
    files = {
        "sys/class/hwmon/hwmon3/name": "ina3221",
        "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC",
        "sys/class/hwmon/hwmon3/in1_input": "19000",
        "sys/class/hwmon/hwmon3/curr1_input": "800",
        "sys/devices/platform/gpu.0/load": "500",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return tmp_path


def test_a_jetsons_power_is_summed_up_between_begin_and_end(jetson: Path) -> None:
    meter = Meter(Sampler(root=jetson), "GPU-of-the-board")
    assert meter.reads
    meter.take({"share": 0.1, "step": "timing"})
    began_s = time.monotonic()
    meter.take({"share": 0.9, "energy": "begin"})
    (jetson / "sys/class/hwmon/hwmon3/curr1_input").write_text("1600\n")
    for _ in range(5):
        time.sleep(0.02)
        meter.tick()
    meter.take({"energy": 40})
    took_s = time.monotonic() - began_s
    assert meter.energy_mj is not None
    most_mj = 19 * 1.6 * took_s * 1e3 / 40
    assert 0.7 * most_mj < meter.energy_mj < most_mj


def test_where_nothing_is_reported_nothing_is_said(tmp_path: Path, jetson: Path) -> None:
    for meter in (Meter(Sampler(root=tmp_path / "none"), "GPU-1"), Meter(Sampler(root=jetson), "cpu")):
        assert not meter.reads
        meter.take({"energy": "begin"})
        meter.tick()
        meter.take({"energy": 10})
        assert meter.energy_mj is None


def test_a_job_that_ran_nothing_costs_nothing(jetson: Path) -> None:
    meter = Meter(Sampler(root=jetson), "0")
    meter.take({"energy": "begin"})
    meter.take({"energy": 0})
    assert meter.energy_mj is None
