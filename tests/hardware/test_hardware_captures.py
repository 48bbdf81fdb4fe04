"""Every public capture is read, and what is read is true: each expectation was taken from the file by eye."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import HardwareError
from millhand.hardware import Hardware, discover
from millhand.hardware.joined import largest_by_nvlink

GIB, MIB = 1 << 30, 1 << 20
DATA = os.environ.get("MILLHAND_DATA")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets"),
]
FOLDER = Path(DATA or ".") / "hardware"


def read(name: str) -> Hardware:
    return discover(FOLDER / name)


def gpu_facts(node: Hardware) -> list[tuple[Any, ...]]:
    return [(gpu.name, (gpu.memory_bytes or 0) // MIB, gpu.compute_capability) for gpu in node.accelerators]


# ---- Jetson ---------------------------------------------------------------------------------------------------------

# file -> (module, RAM in MB, cores, cores on, swap in MB, load %, zones, rails, engines that are on)
TEGRASTATS: dict[str, tuple[Any, ...]] = {
    "tegrastats_agx_orin_64gb_jp7.2_2026-07-17.txt": (
        "Jetson AGX Orin 64GB", 62817, 12, 12, None, 32,
        {"cpu": 51.968, "soc2": 48.968, "soc0": 49.406, "gpu": 47.125, "tj": 51.968, "soc1": 47.906},
        {"VDD_GPU_SOC": (4.385, 3.787), "VDD_CPU_CV": (1.196, 0.897), "VIN_SYS_5V0": (5.552, 5.274)}, set(),
    ),
    "tegrastats_agx_orin_64gb_l4t35_2025-04-11.txt": (
        "Jetson AGX Orin 64GB", 62801, 12, 12, 31400, 0,
        {"cpu": 44.562, "tboard": 32, "soc2": 40.093, "tdiode": 33, "soc0": 41.093, "tj": 44.343, "soc1": 41.25},
        {"VDD_GPU_SOC": (2.34, 2.34), "VDD_CPU_CV": (0.39, 0.39), "VIN_SYS_5V0": (4.025, 4.025),
         "VDDQ_VDD2_1V8AO": (0.301, 0.301)}, {"VIC", "APE"},
    ),
    "tegrastats_agx_orin_64gb_l4t35_sudo_2023-04-24.txt": (
        "Jetson AGX Orin 64GB", 62795, 12, 12, 31398, 0,
        {"cpu": 42.593, "tboard": 32, "soc2": 39.343, "tdiode": 33.25, "soc0": 39.375, "tj": 42.593, "soc1": 40.468},
        {"VDD_GPU_SOC": (2.399, 2.399), "VDD_CPU_CV": (0.4, 0.4), "VIN_SYS_5V0": (4.032, 4.032),
         "VDDQ_VDD2_1V8AO": (0.301, 0.301)}, {"VIC", "APE"},
    ),
    "tegrastats_agx_orin_64gb_l4t36_sudo_2025-07-21.txt": (
        "Jetson AGX Orin 64GB", 62841, 12, 8, 31420, 0,
        {"cpu": 43.437, "soc2": 40.531, "soc0": 41.218, "gpu": 39.843, "tj": 43.437, "soc1": 40.437},
        {"VDD_GPU_SOC": (2.399, 2.692), "VDD_CPU_CV": (0.399, 0.666), "VIN_SYS_5V0": (2.813, 3.061)}, {"APE"},
    ),
    "tegrastats_agx_orin_64gb_r36.4.4_sudo.txt": (
        "Jetson AGX Orin 64GB", 62841, 12, 12, 31420, 0,
        {"cpu": 52.562, "soc2": 48.437, "soc0": 49.093, "tj": 52.562, "soc1": 49.656},
        {"VDD_GPU_SOC": (2.412, 2.412), "VDD_CPU_CV": (1.607, 1.607), "VIN_SYS_5V0": (4.707, 4.707)},
        {"NVENC", "VIC", "APE"},
    ),
    "tegrastats_agx_xavier_jp4.2.txt": (
        "Jetson AGX Xavier", 15692, 8, 8, 8192, 0,
        {"ao": 30, "gpu": 30.5, "tboard": 31, "tdiode": 32, "aux": 30.5, "cpu": 31.5, "thermal": 30.8, "pmic": 100},
        {"GPU": (0.463, 0.463), "CPU": (0.618, 0.618), "SOC": (2.936, 2.936), "CV": (0, 0), "VDDRQ": (0.309, 0.309),
         "SYS5V": (3.306, 3.306)}, set(),
    ),
    "tegrastats_orin_nano_8gb.txt": (
        "Jetson Orin Nano 8GB", 7620, 6, 6, 16384, 0,
        {"cpu": 50.031, "soc2": 49.031, "soc0": 50, "gpu": 49.031, "tj": 50.25, "soc1": 50.25},
        {"VDD_IN": (4.824, 4.824), "VDD_CPU_GPU_CV": (0.518, 0.518), "VDD_SOC": (1.475, 1.475)}, set(),
    ),
    "tegrastats_tx2_jp4.txt": (
        "Jetson TX2", 7859, 6, 6, 12122, 0,
        {"pll": 42.5, "mcpu": 42.5, "pmic": 50, "tboard": 38, "gpu": 39.5, "bcpu": 42.5, "thermal": 41.3,
         "tdiode": 39.25},
        {"VDD_SYS_GPU": (0.182, 0.182), "VDD_SYS_SOC": (0.73, 0.73), "VDD_4V0_WIFI": (0, 0), "VDD_IN": (5.297, 5.297),
         "VDD_SYS_CPU": (1.917, 1.917), "VDD_SYS_DDR": (1.241, 1.241)}, {"APE"},
    ),
    "tegrastats_xavier_nx_burn.txt": (
        "Jetson Xavier NX", 6834, 6, 4, 3417, 99,
        {"aux": 46.5, "cpu": 50.5, "thermal": 49.8, "ao": 49.5, "gpu": 53, "pmic": 50},
        {"VDD_IN": (13.751, 12.791), "VDD_CPU_GPU_CV": (7.539, 6.841), "VDD_SOC": (2.063, 1.951)}, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEGRASTATS)
def test_tegrastats(name: str) -> None:
    module, ram, cores, on, swap, load, zones, rails, engines = TEGRASTATS[name]
    node = read(f"jetson/{name}")
    assert node.jetson is not None
    assert node.jetson.module == module
    assert node.memory.total_bytes == ram * MIB
    assert (node.cpu.logical, node.cpu.online, node.cpu.architecture) == (cores, on, "aarch64")
    assert node.memory.swap_bytes == (swap * MIB if swap else None)
    assert node.jetson.gpu_load_percent == load
    assert node.jetson.temperatures_c == zones
    assert {rail.name: (rail.power_w, rail.average_w) for rail in node.jetson.rails} == rails
    assert {engine.name for engine in node.jetson.engines if engine.on} == engines
    assert [gpu.unified_memory for gpu in node.accelerators] == [True]


def test_tegrastats_engines_tell_load_and_clock() -> None:
    node = read("jetson/tegrastats_agx_orin_64gb_r36.4.4_sudo.txt")
    assert node.jetson is not None
    engines = {engine.name: engine for engine in node.jetson.engines}
    assert (engines["NVENC"].load_percent, engines["NVENC"].frequency_mhz) == (79, 166)
    assert (engines["VIC"].load_percent, engines["VIC"].frequency_mhz) == (36, 115)
    assert not engines["NVDLA0"].on
    assert not engines["PVA0"].on


RELEASES = {
    "nv_tegra_release_r35.2.1_orin_nx.txt": ("35.2.1", "5.1"),
    "nv_tegra_release_r35.4.1_agx_xavier_industrial.txt": ("35.4.1", "5.1.2"),
    "nv_tegra_release_r36.4.3.txt": ("36.4.3", "6.2"),
    "nv_tegra_release_r36.4.4_agx_orin_32gb_seeed.txt": ("36.4.4", "6.2.1"),
    "nv_tegra_release_r38.2.0_agx_thor.txt": ("38.2.0", "7.0"),
    "nv_tegra_release_r39.2.0_agx_orin.txt": ("39.2.0", "7.2"),
}


@pytest.mark.parametrize("name", RELEASES)
def test_nv_tegra_release(name: str, tmp_path: Path) -> None:
    node = read(f"jetson/{name}")
    assert node.jetson is not None
    assert (node.jetson.l4t, node.jetson.jetpack) == RELEASES[name]
    assert node.cpu.architecture == "aarch64"
    assert node.problems == ()
    # The same file at its own place in a recorded tree.
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text((FOLDER / "jetson" / name).read_text())
    recorded = discover(tmp_path)
    assert recorded.jetson == node.jetson


# (compatible's part number or memory decides) model of the device tree -> module, from device_tree_models.csv
BOARDS = [
    # Its device tree is that of p3701-0000, which boards of both sizes run: memory decides.
    ("39.2.0", "NVIDIA Jetson AGX Orin Developer Kit", 62_800, "Jetson AGX Orin 64GB"),
    ("36.x", "NVIDIA Jetson AGX Orin Developer Kit", None, "Jetson AGX Orin 64GB"),
    ("36.4.0", "NVIDIA Jetson AGX Orin Developer Kit", 62_800, "Jetson AGX Orin 64GB"),
    ("36.4.4", "NVIDIA Jetson AGX Orin Developer Kit", 30_500, "Jetson AGX Orin 32GB"),
    ("36.2.0", "NVIDIA Jetson AGX Orin Developer Kit", None, ""),
    ("35.3.1", "Jetson AGX Orin", 30_500, "Jetson AGX Orin 32GB"),
    ("35.4.1", "Jetson AGX Orin Industrial", 62_800, "Jetson AGX Orin Industrial 64GB"),
    ("34.1 (JetPack 5.0 DP)", "NVIDIA Orin Jetson-Small Developer Kit", 15_400, ""),
    ("35.3.1", "NVIDIA Orin Nano Developer Kit", 7_600, "Jetson Orin Nano 8GB"),
    ("38.2.0", "NVIDIA Jetson AGX Thor Developer Kit", 125_000, "Jetson AGX Thor 128GB"),
    ("36.4.7", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7_600, "Jetson Orin Nano 8GB"),
]


@pytest.mark.parametrize("row", range(len(BOARDS)))
def test_device_tree(row: int, tmp_path: Path) -> None:
    l4t, model, memory_mib, module = BOARDS[row]
    with (FOLDER / "jetson/device_tree_models.csv").open() as file:
        facts = list(csv.DictReader(file))[row]
    compatible = facts["compatible (NUL shown as space where the page ran them together)"]
    assert (facts["L4T"], facts["model"]) == (l4t, model)
    tree = tmp_path / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "model").write_text(model + "\0")
    (tree / "compatible").write_text(compatible.replace(" ", "\0") + "\0" if compatible else "")
    if memory_mib:
        (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {memory_mib * 1024} kB\n")
    node = discover(tmp_path)
    assert node.jetson is not None
    assert (node.jetson.model, node.jetson.module) == (model, module)
    assert node.jetson.compute_capability == ("11.0" if "Thor" in model else "8.7")
    assert any(problem.field == "jetson.module" for problem in node.problems) == (not module)


def test_table_of_boards_is_refused() -> None:
    with pytest.raises(HardwareError, match="lists many boards") as caught:
        read("jetson/device_tree_models.csv")
    assert "docs/hardware.md" in caught.value.hint


def test_jetson_release() -> None:
    node = read("jetson/jetson_release_agx_orin_32gb.txt")
    assert node.jetson is not None
    assert node.jetson.model == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (node.jetson.module, node.jetson.part_number) == ("Jetson AGX Orin 32GB", "p3701-0004")
    assert (node.jetson.l4t, node.jetson.jetpack) == ("36.4.4", "6.2.1")
    assert (node.jetson.power_mode, node.jetson.power_mode_id) == ("MODE_40W", 3)
    assert (node.jetson.soc, node.cuda) == ("Tegra234", "12.6")


def test_nvidia_smi_on_orin() -> None:
    node = read("jetson/nvidia-smi_agx_orin_r36.4.4.txt")
    assert (node.driver, node.cuda) == ("540.4.0", "12.6")
    assert gpu_facts(node) == [("Orin (nvgpu)", 0, "8.7")]
    assert node.accelerators[0].unified_memory
    assert node.jetson is not None
    assert (node.jetson.soc, node.jetson.compute_capability) == ("Tegra234", "8.7")


# ---- nvidia-smi -----------------------------------------------------------------------------------------------------

# file -> (driver, CUDA, GPUs, (name, MiB, compute capability), power limit W, temperature C, ECC, persistence)
NVIDIA_SMI: dict[str, tuple[Any, ...]] = {
    "nvidia-smi-qx_a100-sxm4-v12.xml": (
        "535.54.03", "12.2", 1, ("NVIDIA A100-SXM4-80GB", 81920, "8.0"), 500, 27, True, False),
    "nvidia-smi-qx_tesla-t4.xml": ("515.105.01", "11.7", 1, ("Tesla T4", 15360, "7.5"), 70, 40, True, False),
    "nvidia-smi-qx_gtx-1660-ti.xml": ("418.43", "10.1", 1, ("Graphics Device", 5912, ""), 130, 40, None, False),
    "nvidia-smi-qx_quadro-p400.xml": ("418.43", "10.1", 1, ("Quadro P400", 1998, "6.1"), None, 33, None, False),
    "nvidia-smi-qx_rtx-3080-v12.xml": (
        "536.40", "12.2", 1, ("NVIDIA GeForce RTX 3080", 10240, "8.6"), 336, 31, None, None),
    "nvidia-smi-qx_rtx-3080-v13.xml": (
        "595.58.03", "13.2", 1, ("NVIDIA GeForce RTX 3080", 10240, "8.6"), 320, 27, None, False),
    "nvidia-smi-qx_rtx-4000-sff-ada-v13.xml": (
        "595.84", "13.2", 1, ("NVIDIA RTX 4000 SFF Ada Generation", 20475, "8.9"), 70, 38, False, True),
    "nvidia-smi-q_8xH100_535.161.08.txt.gz": (
        "535.161.08", "12.2", 8, ("NVIDIA H100 80GB HBM3", 81559, "9.0"), 700, 29, True, True),
    "nvidia-smi-q_8xRTX4090_535.154.05.txt.gz": (
        "535.154.05", "12.2", 8, ("NVIDIA GeForce RTX 4090", 24564, "8.9"), 450, 41, False, True),
    "nvidia-smi-q_A10_535.129.03.txt": ("535.129.03", "12.2", 1, ("NVIDIA A10", 23028, "8.6"), 150, 33, True, True),
    "nvidia-smi_525.125.06.txt": ("525.125.06", "12.0", 1, ("NVIDIA GeForce ...", 23028, ""), 450, 38, True, False),
    "nvidia-smi_8xH100_550.90.07.txt": (
        "550.90.07", "12.4", 8, ("NVIDIA H100 80GB HBM3", 81559, "9.0"), 700, 27, True, True),
    "nvidia-smi_a30_mig_535.183.01.txt": (
        "535.183.01", "12.2", 1, ("NVIDIA A30", 24576, "8.0"), 165, 47, True, False),
    "capture_linux-x86_64__nvidia-geforce-rtx-4080-super__595.71.05.txt.gz": (
        "595.71.05", "13.2", 1, ("NVIDIA GeForce RTX 4080 SUPER", 16376, "8.9"), 320, 43, None, False),
    "capture_linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt.gz": (
        "590.48.01", "13.1", 1, ("NVIDIA H100 80GB HBM3", 81559, "9.0"), 700, 41, True, True),
    "capture_linux-x86_64__nvidia-h100-mig__590.48.01.txt.gz": (
        "590.48.01", "13.1", 1, ("NVIDIA H100 80GB HBM3", 81559, "9.0"), 700, 42, True, True),
    "capture_linux-x86_64__nvidia-h200__590.48.01.txt.gz": (
        "590.48.01", "13.1", 1, ("NVIDIA H200", 143771, "9.0"), 700, 28, True, True),
    "capture_linux-x86_64__nvidia-l40s__595.80.txt.gz": (
        "595.80", "13.2", 1, ("NVIDIA L40S", 46068, "8.9"), 350, 63, True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", NVIDIA_SMI)
def test_nvidia_smi(name: str) -> None:
    driver, cuda, count, facts, limit_w, heat_c, ecc, persistence = NVIDIA_SMI[name]
    node = read(f"nvidia/{name}")
    assert (node.driver, node.cuda) == (driver, cuda)
    assert gpu_facts(node) == [facts] * count
    first = node.accelerators[0]
    assert first.power_limit_w == limit_w
    assert first.temperature_c == heat_c
    assert (first.ecc_enabled, first.persistence) == (ecc, persistence)
    assert [gpu.index for gpu in node.accelerators] == list(range(count))
    assert all(gpu.ready and gpu.pci_bus for gpu in node.accelerators)
    assert node.jetson is None


def test_xml_tells_uuid_bus_and_slices() -> None:
    node = read("nvidia/nvidia-smi-qx_a100-sxm4-v12.xml")
    gpu = node.accelerators[0]
    assert (gpu.uuid, gpu.pci_bus) == ("GPU-513536b6-7d19-9063-b049-1e69664bb298", "00000000:01:00.0")
    assert (gpu.architecture, gpu.mig_enabled, gpu.power_w) == ("Ampere", True, 67.03)
    assert [part.gpu_instance for part in gpu.mig] == [3, 4, 5, 6]
    assert {(part.memory_bytes, part.multiprocessors, part.profile) for part in gpu.mig} == {
        (19968 * MIB, 14, "1g.20gb")
    }
    # The file was cut to one GPU of the four that its head names.
    assert [problem.message for problem in node.problems] == ["it says 4 GPUs are attached, but holds 1"]


def test_faults_that_the_gpu_reports_become_problems() -> None:
    rows = read("nvidia/nvidia-smi-q_A10_535.129.03.txt")
    assert [(p.field, p.message) for p in rows.problems] == [("accelerators[0]", "memory rows wait to be remapped")]
    brake = read("nvidia/nvidia-smi-q_8xH100_535.161.08.txt.gz")
    assert {problem.message for problem in brake.problems} == {"the power brake slows the GPU down"}
    assert all(problem.hint for problem in brake.problems)


def test_broken_off_output_is_used_up_to_its_end() -> None:
    node = read("nvidia/nvidia-smi-q_8gpu_535.183.01_invalid_truncated.txt.gz")
    assert (node.driver, len(node.accelerators)) == ("535.183.01", 1)
    gpu = node.accelerators[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA H100 80GB HBM3", "GPU-566e6f65-c38e-b12f-4824-6944218668b9")
    assert gpu.memory_bytes is None
    messages = {problem.field: problem.message for problem in node.problems}
    assert messages["accelerators"] == "it says 8 GPUs are attached, but holds 1"
    assert "accelerators[0].memory_bytes" in messages


def test_collection_joins_its_sections() -> None:
    node = read("nvidia/capture_linux-x86_64__nvidia-h100-mig__590.48.01.txt.gz")
    gpu = node.accelerators[0]
    # Memory and instance from -q, profile and UUID from -L, virtualisation from -q.
    assert [(part.profile, (part.memory_bytes or 0) // MIB, part.gpu_instance) for part in gpu.mig] == [
        ("3g.40gb", 40448, 2), ("2g.20gb", 20096, 3), ("1g.10gb", 9984, 9), ("1g.10gb", 9984, 10),
    ]  # fmt: skip
    assert [part.uuid for part in gpu.mig][1] == "MIG-00000001-0000-0000-0000-000000000001"
    assert node.virtualisation == "vm"
    assert node.problems == ()
    links = read("nvidia/capture_linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt.gz").accelerators[0]
    assert (links.nvlinks, links.nvlink_gb_s) == (18, 26.562)


def test_collection_is_read_idle_not_loaded() -> None:
    gpu = read("nvidia/capture_linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt.gz").accelerators[0]
    assert gpu.power_w is not None
    assert gpu.power_w < 100


# ---- MIG of the A30 -------------------------------------------------------------------------------------------------


def test_a30_mig_table() -> None:
    gpu = read("nvidia/nvidia-smi_a30_mig_535.183.01.txt").accelerators[0]
    assert gpu.mig_enabled
    assert gpu.pci_bus == "00000000:0b:00.0"
    assert [(p.gpu_instance, p.index, p.profile, (p.memory_bytes or 0) // MIB, p.multiprocessors) for p in gpu.mig] == [
        (2, 0, "2g.12gb", 11968, 28), (3, 1, "1g.6gb", 5952, 14), (4, 2, "1g.6gb", 5952, 14),
    ]  # fmt: skip


def test_a30_mig_list() -> None:
    node = read("nvidia/a30_mig_L_three_instances.txt")
    gpu = node.accelerators[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA A30", "GPU-1e44b340-5807-0dbe-62e6-343a6b8b8bcd")
    assert [part.profile for part in gpu.mig] == ["2g.12gb", "1g.6gb", "1g.6gb"]
    assert gpu.mig[2].uuid == "MIG-55dcd9bd-e6b1-549a-bcb4-0b0496bfee9c"


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("a30_mig_lgi_4x1g.txt", [("1g.6gb", 3), ("1g.6gb", 4), ("1g.6gb", 5), ("1g.6gb", 6)]),
        ("a30_mig_create_transcript.txt", [("1g.6gb", 3), ("1g.6gb", 4), ("2g.12gb", 2)]),
    ],
)
def test_a30_mig_instances(name: str, slices: list[tuple[str, int]]) -> None:
    gpu = read(f"nvidia/{name}").accelerators[0]
    assert gpu.mig_enabled
    assert [(part.profile, part.gpu_instance) for part in gpu.mig] == slices


def test_a30_mig_offers() -> None:
    node = read("nvidia/a30_mig_lgip_535.183.01.txt")
    assert node.accelerators[0].mig_profiles == ("1g.6gb", "1g.6gb+me", "2g.12gb", "2g.12gb+me", "4g.24gb")
    assert len(node.problems) == 1
    assert "has no slice" in node.problems[0].message
    placements = read("nvidia/a30_mig_lgipp_535.183.01.txt")
    assert placements.accelerators[0].mig_enabled


def test_a30_recordings_together(tmp_path: Path) -> None:
    """The table knows memory, -L the UUIDs: as one folder they make whole slices, without a contradiction."""
    for name in ("nvidia-smi_a30_mig_535.183.01.txt", "a30_mig_L_three_instances.txt", "a30_mig_lgip_535.183.01.txt"):
        (tmp_path / name).write_text((FOLDER / "nvidia" / name).read_text())
    node = discover(tmp_path)
    assert len(node.accelerators) == 1
    parts = node.accelerators[0].mig
    assert [(part.profile, part.gpu_instance, part.uuid[:8]) for part in parts] == [
        ("2g.12gb", 2, "MIG-1b85"), ("1g.6gb", 3, "MIG-41b9"), ("1g.6gb", 4, "MIG-55dc"),
    ]  # fmt: skip
    assert not [problem for problem in node.problems if "trusted" in problem.message]


# ---- topology, bus, fabric, disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group", "affinity", "numa"),
    [
        ("topo-m_8xA100_4nic.txt", 8, "0-31,64-95", ["0"] * 4 + ["1"] * 4),
        ("topo-m_8xA100_aws.txt", 8, "0-23,48-71", ["0"] * 4 + ["1"] * 4),
        ("topo-m_8gpu_pcie_no_nvlink.txt", 1, "0-15,32-47", ["0"] * 6 + ["1"] * 2),
    ],
)
def test_topology(name: str, group: int, affinity: str, numa: list[str]) -> None:
    node = read(f"nvidia/{name}")
    assert [len(row) for row in node.topology.links] == [8] * 8
    assert [row[index] for index, row in enumerate(node.topology.links)] == ["X"] * 8
    assert largest_by_nvlink(node.topology, range(8)) == group
    assert node.topology.cpu_affinity[0] == affinity
    assert list(node.topology.numa) == numa
    assert len(node.accelerators) == 8


def test_pcie_links_are_told_apart() -> None:
    links = read("nvidia/topo-m_8gpu_pcie_no_nvlink.txt").topology.links
    assert (links[0][1], links[1][2], links[0][6]) == ("NODE", "PHB", "SYS")


def test_nvlink_status() -> None:
    node = read("nvidia/nvidia-smi_nvlink_status_8xA100.txt")
    assert [gpu.name for gpu in node.accelerators] == ["NVIDIA A100-SXM4-80GB"] * 8
    assert {(gpu.nvlinks, gpu.nvlink_gb_s) for gpu in node.accelerators} == {(12, 25)}
    assert node.accelerators[7].uuid == "GPU-754035b4-4708-efcd-b261-623aea38bcad"


def test_lspci() -> None:
    node = read("nvidia/lspci-nn_8xA100.txt")
    assert {gpu.name for gpu in node.accelerators} == {"NVIDIA A100 SXM4 80GB"}
    assert (len(node.accelerators), node.topology.nvswitches) == (8, 6)
    assert node.accelerators[0].pci_bus == "00000001:00:00.0"
    assert not any(gpu.ready for gpu in node.accelerators)
    assert [problem.message for problem in node.problems] == [
        "8 x NVIDIA A100 SXM4 80GB on the PCI bus, but no driver answers"
    ]
    single = read("nvidia/lspci-nn_A10.txt")
    assert gpu_facts(single) == [("NVIDIA A10", 0, "8.6")]


def test_fabric_manager_log() -> None:
    node = read("nvidia/fabricmanager.log")
    assert [problem.message for problem in node.problems] == [
        "detected NVSwitch non-fatal error 12028 on fid 0 on NVSwitch pci bus id 00000000:86:00.0 physical id 3 port 61"
    ]


SMART = {
    "smartctl_nvme0.json": ("nvme0", "PELADN 512GB", "nvme", 512110190592, True, 61, 0),
    "smartctl_sda.json": ("sda", "P3-2TB", "ssd", 2048408248320, True, 31, 0),
    "smartctl_scsi.json": ("sde", "YADRO WUH721414AL4204", "hdd", 14000519643136, True, 34, None),
}


@pytest.mark.parametrize("name", SMART)
def test_smart(name: str) -> None:
    disk = read(f"smart/{name}").disks[0]
    facts = (
        disk.name, disk.model, disk.kind, disk.total_bytes, disk.healthy, disk.temperature_c, disk.wear_percent
    )  # fmt: skip
    assert facts == SMART[name]


def test_smart_scan() -> None:
    assert [disk.name for disk in read("smart/smartctl_scan.json").disks] == ["sda", "nvme0"]


# ---- what is no recording -------------------------------------------------------------------------------------------


def test_metrics_are_refused() -> None:
    names = sorted(path.name for path in (FOLDER / "nvidia").glob("prometheus_*"))
    assert len(names) == 10
    for name in names:
        with pytest.raises(HardwareError, match="Prometheus metrics"):
            read(f"nvidia/{name}")


def test_every_capture_is_a_case() -> None:
    """No file of the folder is forgotten by the tables above."""
    tested = {f"jetson/{name}" for name in (*TEGRASTATS, *RELEASES)} | {f"nvidia/{name}" for name in NVIDIA_SMI}
    tested |= {f"smart/{name}" for name in SMART}
    source = Path(__file__).read_text()
    for path in sorted(FOLDER.glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name.startswith(("LICENSE", "prometheus_")) or name in tested:
            continue
        assert path.name in source, f"{name} has no test"


def test_a_folder_of_many_nodes_says_so() -> None:
    """Recordings of different machines in one folder contradict each other, and the answer names where."""
    node = read("nvidia")
    assert any("a more trusted source says" in problem.message for problem in node.problems)
    left_out = [problem for problem in node.problems if problem.message.startswith("left out")]
    assert len(left_out) == 10
