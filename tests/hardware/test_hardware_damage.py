"""Damaged recordings, thousands of them: whatever is cut or flipped, an answer or a clear refusal comes back."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millhand.errors import HardwareError
from millhand.hardware.captures import KINDS, read_capture
from millhand.hardware.discovery import discover
from millhand.hardware.facts import Hardware

SAMPLES = {
    "nvidia-smi -q -x": """<?xml version="1.0" ?><nvidia_smi_log><driver_version>550.54</driver_version>
<attached_gpus>1</attached_gpus><gpu id="00000000:0B:00.0"><product_name>NVIDIA A30</product_name><mig_mode>
<current_mig>Enabled</current_mig></mig_mode><mig_devices><mig_device><index>0</index><gpu_instance_id>2</gpu_instance_id>
<device_attributes><shared><multiprocessor_count>14</multiprocessor_count></shared></device_attributes><fb_memory_usage>
<total>5952 MiB</total></fb_memory_usage></mig_device></mig_devices><uuid>GPU-1</uuid><fb_memory_usage><total>24576 MiB
</total></fb_memory_usage></gpu></nvidia_smi_log>""",
    "nvidia-smi -q": """==============NVSMI LOG==============
Driver Version                            : 535.129.03
Attached GPUs                             : 1
GPU 00000000:07:00.0
    Product Name                          : NVIDIA A10
    MIG Mode
        Current                           : N/A
    GPU UUID                              : GPU-73d12ef7-f589-f867-4259-c7090ab44736
    FB Memory Usage
        Total                             : 23028 MiB
""",
    "nvidia-smi --query-gpu": "name, uuid, memory.total [MiB]\nNVIDIA A30, GPU-1, 24576 MiB\n",
    "nvidia-smi": """| NVIDIA-SMI 535.183.01    Driver Version: 535.183.01   CUDA Version: 12.2     |
|   0  NVIDIA A30                     Off | 00000000:0B:00.0 Off |                   On |
| N/A   47C    P0              32W / 165W |     50MiB / 24576MiB |     N/A      Default |
|                                         |                      |              Enabled |
| MIG devices:                                                                          |
|  0    2   0   0  |              25MiB / 11968MiB  | 28      0 |  2   0    2    0    0 |
""",
    "nvidia-smi -L": "GPU 0: NVIDIA A30 (UUID: GPU-1e)\n  MIG 2g.12gb     Device  0: (UUID: MIG-1b)\n",
    "nvidia-smi nvlink": "GPU 0: NVIDIA A100 (UUID: GPU-52)\n\t Link 0: 25 GB/s\n\t Link 1: 26.562 GB/s\n",
    "nvidia-smi mig -lgi": "| GPU instances:   |\n|   0  MIG 1g.6gb          14        3          0:1     |\n",
    "nvidia-smi mig -lgip": "| GPU instance profiles: |\n|   0  MIG 1g.6gb        14     4/4        5.81       No  |\n",
    "nvidia-smi topo -m": "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV12\t0-31\nGPU1\tNV12\t X \t0-31\n",
    "fabricmanager.log": "[Feb 27 2025] [ERROR] [tid 1] detected NVSwitch non-fatal error 12028 on port 61\n",
    "lspci -nn": "06:00.0 3D controller [0302]: NVIDIA Corporation GA102GL [A10] [10de:2236] (rev a1)\n",
    "nvidia-smi (failed)": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
    "nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: x\n",
    "jetson_release": "jetson-stats\n - Model: AGX Orin\n - L4T: 36.4.4\nNV Power Mode[3]: MODE_40W\n - CUDA: 12.6\n",
    "nvpmodel -q": "NV Power Mode: MODE_40W\n3\n",
    "tegrastats": "RAM 8179/62817MB (lfb 1x4MB) CPU [35%@729,off] GR3D_FREQ 32% NVENC 79%@166 VIC off cpu@51.968C/52C "
    "tj@-256C VDD_GPU_SOC 4385mW/3787mW/4385mW VDD_CPU_CV 1196mW/897mW VIN_SYS_5V0 5552/5274\n",
    "smartctl --json": '{"smartctl": {"version": [7, 5]}, "device": {"name": "/dev/sda", "type": "sat"}, '
    '"user_capacity": {"bytes": 2048}, "smart_status": {"passed": true}, "temperature": {"current": 31}}',
}
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(path: Path) -> None:
    """An answer whose every problem can be acted on, or a refusal with a hint; nothing else."""
    try:
        node = discover(path)
    except HardwareError as error:
        assert error.hint
        return
    assert isinstance(node, Hardware)
    assert node.to_dict()
    for problem in node.problems:
        assert problem.message
        assert problem.source


def test_every_kind_has_a_sample() -> None:
    assert set(SAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_recognised(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sample"
    path.write_text(SAMPLES[kind])
    parts, reason = read_capture(path, "sample")
    assert reason == ""
    assert [rank for rank, _ in parts] == [KINDS[kind][2]]


@pytest.mark.parametrize("kind", SAMPLES)
@FAST
@given(data=st.data())
def test_cut_and_flipped(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SAMPLES[kind].encode())
    start = data.draw(st.integers(0, len(content) // 4), "start")
    content = content[start : data.draw(st.integers(start, len(content)), "end")]
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8), "flips"):
        if content:
            content[place % len(content)] = value
    path = tmp_path / "sample"
    path.write_bytes(bytes(content))
    check(path)


@pytest.mark.parametrize("kind", SAMPLES)
@FAST
@given(number=st.sampled_from(["9" * 30, "-1", "1e400", "٣", "0x10", "NaN", "", " "]), place=st.integers(0, 40))
def test_absurd_numbers(kind: str, tmp_path: Path, number: str, place: int) -> None:
    spots = list(re.finditer(r"\d+", SAMPLES[kind]))
    if not spots:
        return
    spot = spots[place % len(spots)]
    path = tmp_path / "sample"
    path.write_text(SAMPLES[kind][: spot.start()] + number + SAMPLES[kind][spot.end() :])
    check(path)


@FAST
@given(content=st.binary(max_size=400), name=st.sampled_from(["nvidia-smi-q.xml", "tegrastats.txt", "topo-m.txt"]))
def test_noise_under_a_known_name(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    check(tmp_path)


@FAST
@given(
    files=st.dictionaries(
        st.sampled_from([
            "proc/cpuinfo", "proc/meminfo", "etc/nv_tegra_release", "proc/device-tree/model",
            "proc/device-tree/compatible", "sys/devices/system/cpu/present", "sys/fs/cgroup/cpu.max",
            "sys/fs/cgroup/memory.max", "sys/block/sda/size", "sys/class/dmi/id/sys_vendor", "var/lib/nvpmodel/status",
        ]),
        st.one_of(st.binary(max_size=80), st.text("processor: 0-9,flagsMemTotalkB\n", max_size=80).map(str.encode)),
    )
)  # fmt: skip
def test_noise_in_the_tree(files: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    check(root)


DATA = os.environ.get("MILLHAND_DATA")


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets")
def test_real_captures_cut_anywhere(tmp_path: Path) -> None:
    folder = Path(DATA or ".") / "hardware"
    for path in sorted(folder.glob("*/*")):
        content = path.read_bytes()
        for part in range(1, 12):
            target = tmp_path / path.name
            target.write_bytes(content[: len(content) * part // 12])
            check(target)
