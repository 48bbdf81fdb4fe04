"""Recorded roots written here: the layout, the order of trust, and what damage costs."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.errors import HardwareError
from millhand.hardware import Hardware, Problem, discover
from millhand.hardware.captures import KINDS, NAMES
from millhand.hardware.jetson import jetpack_of

GIB, MIB = 1 << 30, 1 << 20

CPUINFO_X86 = """processor\t: {n}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
physical id\t: {socket}
core id\t\t: {core}
cpu cores\t: 2
flags\t\t: fpu avx avx2 avx512f avx512_vnni avx_vnni amx_bf16 amx_int8 hypervisor

"""
CPUINFO_ARM = """processor\t: {n}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat ilrcpc flagm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42

"""
XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>550.54.15</driver_version>
  <cuda_version>12.4</cuda_version>
  <attached_gpus>1</attached_gpus>
  <gpu id="00000000:0B:00.0">
    <product_name>NVIDIA A30</product_name>
    <product_architecture>Ampere</product_architecture>
    <mig_mode><current_mig>Disabled</current_mig></mig_mode>
    <uuid>GPU-11111111-2222-3333-4444-555555555555</uuid>
    <fb_memory_usage><total>24576 MiB</total></fb_memory_usage>
    <temperature><gpu_temp>41 C</gpu_temp></temperature>
    <gpu_power_readings><current_power_limit>165.00 W</current_power_limit></gpu_power_readings>
  </gpu>
</nvidia_smi_log>
"""
LIST = "GPU 0: NVIDIA {name} (UUID: GPU-11111111-2222-3333-4444-555555555555)\n"
TEGRASTATS = (
    "01-02-2026 10:00:00 RAM 2000/62841MB (lfb 466x4MB) SWAP 0/31420MB (cached 0MB) CPU [1%@729,off] GR3D_FREQ 7% "
    "cpu@50.5C tj@51C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def orin(root: Path) -> Path:
    cpus = "".join(CPUINFO_ARM.format(n=n) for n in range(8))
    return write(
        root,
        {
            "proc/cpuinfo": cpus,
            "proc/meminfo": "MemTotal:       64305200 kB\nMemAvailable:   50000000 kB\nSwapTotal:  0 kB\n",
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 1, BOARD: generic, EABI: aarch64, DATE: x\n",
            "sys/devices/system/cpu/present": "0-11\n",
            "sys/block/nvme0n1/size": "1000215216\n",
            "sys/block/nvme0n1/device/model": "Samsung SSD 980\n",
            "nvpmodel.txt": "NV Power Mode: MODE_30W\n2\n",
            "tegrastats.txt": TEGRASTATS,
        },
    )


def test_recorded_orin(tmp_path: Path) -> None:
    node = discover(orin(tmp_path))
    assert (node.cpu.model, node.cpu.architecture) == ("Arm Cortex-A78AE", "aarch64")
    assert (node.cpu.logical, node.cpu.online, node.cpu.instructions) == (12, 8, ("NEON", "DOTPROD"))
    assert node.memory.total_bytes == 64305200 * 1024  # /proc wins over tegrastats' whole megabytes
    assert node.jetson is not None
    assert (node.jetson.module, node.jetson.part_number, node.jetson.soc) == (
        "Jetson AGX Orin 64GB", "p3701-0005", "Tegra234",
    )  # fmt: skip
    assert (node.jetson.jetpack, node.jetson.power_mode, node.jetson.power_mode_id) == ("6.2.1", "MODE_30W", 2)
    assert node.jetson.gpu_load_percent == 7
    assert [(disk.name, disk.model, disk.kind) for disk in node.disks] == [("nvme0n1", "Samsung SSD 980", "nvme")]
    assert [(gpu.name, gpu.compute_capability) for gpu in node.accelerators] == [
        ("Jetson AGX Orin (integrated)", "8.7")
    ]
    assert node.problems == ()


def test_recorded_server(tmp_path: Path) -> None:
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    cpus = "".join(CPUINFO_X86.format(n=n, socket=s, core=c) for n, (s, c) in enumerate(places))
    node = discover(
        write(
            tmp_path,
            {
                "proc/cpuinfo": cpus,
                "sys/class/dmi/id/sys_vendor": "QEMU\n",
                "sys/fs/cgroup/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/memory.max": "4294967296\n",
                "nvidia-smi-q.xml": XML,
            },
        )
    )
    assert (node.cpu.sockets, node.cpu.cores, node.cpu.logical, node.cpu.usable) == (2, 4, 8, 1.5)
    assert node.cpu.instructions == ("AVX2", "AVX512F", "AVX512-VNNI", "AVX-VNNI", "AMX-INT8", "AMX-BF16")
    assert (node.virtualisation, node.memory.limit_bytes) == ("kvm", 4 * GIB)
    assert (node.driver, node.cuda, node.accelerators[0].memory_bytes) == ("550.54.15", "12.4", 24576 * MIB)


def test_nothing_of_this_machine_leaks_into_a_recording(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").symlink_to("/proc/cpuinfo")
    (tmp_path / "nvidia-smi-L.txt").write_text(LIST.format(name="A30"))
    node = discover(tmp_path)
    assert node.cpu.model == ""
    assert node.cpu.logical is None
    assert node.storage.total_bytes is None


def test_files_are_known_by_content_whatever_their_name(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "abc.bin", "wt") as file:
        file.write(XML)
    node = discover(tmp_path)
    assert node.accelerators[0].name == "NVIDIA A30"
    assert discover(tmp_path / "abc.bin").accelerators == node.accelerators


def test_the_more_trusted_source_wins_and_the_other_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"nvidia-smi-q.xml": XML, "nvidia-smi-L.txt": LIST.format(name="A100-SXM4-80GB")})
    node = discover(tmp_path)
    assert [gpu.name for gpu in node.accelerators] == ["NVIDIA A30"]
    assert node.problems == (
        Problem(
            "nvidia-smi-L.txt",
            "accelerators[0].name",
            "it says 'NVIDIA A100-SXM4-80GB', but a more trusted source says 'NVIDIA A30', which is used",
            "record every file on the same node, at the same time",
        ),
    )


def test_spellings_of_one_fact_are_no_contradiction(tmp_path: Path) -> None:
    table = (
        "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4  |\n"
        "|   0  NVIDIA A30           Off | 00000000:0B:00.0 Off |                    0 |\n"
        "| N/A   41C    P0    32W / 165W |     50MiB / 24576MiB |      0%      Default |\n"
    )
    write(tmp_path, {"nvidia-smi-q.xml": XML, "nvidia-smi.txt": table, "nvidia-smi-L.txt": LIST.format(name="A30")})
    node = discover(tmp_path)
    assert len(node.accelerators) == 1
    assert node.accelerators[0].power_w == 32
    assert node.problems == ()


def test_the_bus_names_cards_in_its_own_way(tmp_path: Path) -> None:
    bus = "0b:00.0 3D controller [0302]: NVIDIA Corporation GA100GL [A30 PCIe] [10de:20b7] (rev a1)\n"
    node = discover(write(tmp_path, {"nvidia-smi-q.xml": XML, "lspci.txt": bus}))
    assert [(gpu.name, gpu.ready) for gpu in node.accelerators] == [("NVIDIA A30", True)]
    assert node.problems == ()


def test_csv_query(tmp_path: Path) -> None:
    rows = (
        "index, name, uuid, driver_version, memory.total [MiB], compute_cap, mig.mode.current, power.limit [W]\n"
        "0, NVIDIA A30, GPU-11111111-2222, 550.54.15, 24576 MiB, 8.0, [N/A], 165.00 W\n"
    )
    node = discover(write(tmp_path, {"nvidia-smi-q.csv": rows}))
    gpu = node.accelerators[0]
    assert (gpu.name, gpu.memory_bytes, gpu.compute_capability) == ("NVIDIA A30", 24576 * MIB, "8.0")
    assert (gpu.mig_enabled, gpu.power_limit_w, node.driver) == (None, 165, "550.54.15")


def test_mig_mode_without_slices_is_a_problem(tmp_path: Path) -> None:
    node = discover(
        write(tmp_path, {"nvidia-smi-q.xml": XML.replace("Disabled</current_mig>", "Enabled</current_mig>")})
    )
    assert [problem.field for problem in node.problems] == ["accelerators[0].mig"]
    assert "nvidia-smi mig -cgi" in node.problems[0].hint


def test_failed_driver_is_a_problem(tmp_path: Path) -> None:
    text = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    node = discover(write(tmp_path, {"nvidia-smi.txt": text}))
    assert node.accelerators == ()
    assert "has failed" in node.problems[0].message
    assert "install the NVIDIA driver" in node.problems[0].hint


def test_failing_disk_is_a_problem(tmp_path: Path) -> None:
    text = '{"smartctl": {}, "device": {"name": "/dev/sda"}, "smart_status": {"passed": false}, "rotation_rate": 0}'
    node = discover(write(tmp_path, {"sda.json": text}))
    assert (node.disks[0].healthy, node.disks[0].kind) == (False, "ssd")
    assert "failing" in node.problems[0].message


def test_fragmented_memory_of_a_jetson_is_a_problem(tmp_path: Path) -> None:
    node = discover(write(tmp_path, {"t.txt": TEGRASTATS.replace("466x4MB", "2x128kB")}))
    assert [problem.field for problem in node.problems] == ["memory"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_of_the_layout_costs_itself_only(name: str, tmp_path: Path) -> None:
    orin(tmp_path)
    (tmp_path / name).write_text("\x00\x7f garbage \n<<<|||")
    node = discover(tmp_path)
    assert node.jetson is not None
    assert node.jetson.module == "Jetson AGX Orin 64GB"
    assert node.cpu.logical == 12
    problems = [problem for problem in node.problems if problem.source == name]
    # A log without an error line and a bus without a GPU are complete answers.
    assert problems or name in (
        "fabricmanager.log",
        "lspci.txt",
        "nvlink.txt",
        "nvidia-smi-L.txt",
        "nvidia-smi-lgip.txt",
    )


@pytest.mark.parametrize(
    "path",
    ["proc/cpuinfo", "proc/meminfo", "proc/device-tree/compatible", "etc/nv_tegra_release", "sys/block/nvme0n1/size"],
)
def test_a_missing_or_garbled_file_of_the_tree_costs_its_own_facts(path: str, tmp_path: Path) -> None:
    whole = discover(orin(tmp_path))
    for damage in ("remove", "garble"):
        if damage == "remove":
            (tmp_path / path).unlink()
        else:
            (tmp_path / path).write_bytes(b"\xff\xfe\x00 nothing 99999999999999999999999 kB")
        node = discover(tmp_path)
        changed = {
            name
            for name in Hardware.__struct_fields__
            if getattr(node, name) != getattr(whole, name) and name not in ("problems", "source")
        }
        owned = {
            "proc/cpuinfo": {"cpu"},
            "proc/meminfo": {"memory"},
            "proc/device-tree/compatible": {"jetson"},
            "etc/nv_tegra_release": {"jetson"},
            "sys/block/nvme0n1/size": {"disks"},
        }
        assert changed <= owned[path]
        assert node.jetson is not None
        assert node.jetson.module == "Jetson AGX Orin 64GB"


def test_what_is_no_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="does not exist") as caught:
        discover(tmp_path / "none")
    assert caught.value.hint
    with pytest.raises(HardwareError, match="holds no recording"):
        discover(tmp_path)
    (tmp_path / "metrics.txt").write_text("# HELP nvidia_smi_count count\n# TYPE nvidia_smi_count gauge\n")
    with pytest.raises(HardwareError, match=re.escape("metrics.txt")):
        discover(tmp_path)
    with pytest.raises(HardwareError, match="Prometheus metrics"):
        discover(tmp_path / "metrics.txt")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(XML.encode())[:40])
    with pytest.raises(HardwareError, match="cannot be read"):
        discover(tmp_path / "cut.gz")


def test_a_file_of_no_kind_beside_recordings_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"nvidia-smi-q.xml": XML, "notes.txt": "remember the milk", "README.md": "about"})
    node = discover(tmp_path)
    assert [(problem.source, problem.message) for problem in node.problems] == [
        ("notes.txt", "left out: its content is of no kind that millhand knows")
    ]


def test_every_named_file_has_a_kind() -> None:
    assert set(NAMES.values()) <= set(KINDS)


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.0", "6.1"), ("36.9.9", "6"), ("32.7.4", "4.6.4"), ("39.2.0", "7.2"), ("77.1", "")]
)
def test_jetpack_of_a_release(l4t: str, jetpack: str) -> None:
    assert jetpack_of(l4t) == jetpack


def test_live_node_is_this_machine() -> None:
    node = discover()
    assert node.source == "live"
    assert node.cpu.architecture == os.uname().machine
    assert node.cpu.online == os.cpu_count()
    assert node.cpu.usable is not None
    assert 0 < node.cpu.usable <= (node.cpu.online or 0)
    page_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert node.memory.total_bytes == pytest.approx(page_bytes, rel=0.01)
    assert (node.storage.free_bytes or 0) <= (node.storage.total_bytes or 0)


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU here")
def test_live_gpu_agrees_with_nvidia_smi(tmp_path: Path) -> None:
    xml = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "nvidia-smi-q.xml").write_text(xml)
    live, recorded = discover(), discover(tmp_path)
    assert (live.driver, live.cuda) == (recorded.driver, recorded.cuda)
    for field in ("name", "uuid", "memory_bytes", "compute_capability", "pci_bus", "mig_enabled", "power_limit_w"):
        assert [getattr(gpu, field) for gpu in live.accelerators] == [
            getattr(gpu, field) for gpu in recorded.accelerators
        ]


def test_import_is_light() -> None:
    """The daemon imports this at start: nothing of it may pull in NumPy, pydantic, psutil or NVML."""
    code = (
        "import sys, millhand.hardware, millhand.hardware.telemetry;"
        "print([name for name in ('numpy', 'pydantic', 'psutil', 'pynvml', 'xml.etree.ElementTree', 'csv')"
        " if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
