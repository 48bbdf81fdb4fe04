"""The profile that each public capture leads to, in one table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import millhand_profiles
from millhand.errors import HardwareError
from millhand.hardware import discover
from millhand.profiles import load_profiles, match

DATA = os.environ.get("MILLHAND_DATA")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets"),
]
FOLDER = Path(DATA or ".") / "hardware"

EXPECTED = {
    # Jetson: rails, part number or model name the module; a release file or nvidia-smi alone do not.
    "jetson/jetson_release_agx_orin_32gb.txt": "jetson-agx-orin-32gb",
    "jetson/nv_tegra_release_r35.2.1_orin_nx.txt": "generic-jetson",
    "jetson/nv_tegra_release_r35.4.1_agx_xavier_industrial.txt": "generic-jetson",
    "jetson/nv_tegra_release_r36.4.3.txt": "generic-jetson",
    "jetson/nv_tegra_release_r36.4.4_agx_orin_32gb_seeed.txt": "generic-jetson",
    "jetson/nv_tegra_release_r38.2.0_agx_thor.txt": "generic-jetson",
    "jetson/nv_tegra_release_r39.2.0_agx_orin.txt": "generic-jetson",
    "jetson/nvidia-smi_agx_orin_r36.4.4.txt": "generic-jetson",
    "jetson/tegrastats_agx_orin_64gb_jp7.2_2026-07-17.txt": "jetson-agx-orin-64gb",
    "jetson/tegrastats_agx_orin_64gb_l4t35_2025-04-11.txt": "jetson-agx-orin-64gb",
    "jetson/tegrastats_agx_orin_64gb_l4t35_sudo_2023-04-24.txt": "jetson-agx-orin-64gb",
    "jetson/tegrastats_agx_orin_64gb_l4t36_sudo_2025-07-21.txt": "jetson-agx-orin-64gb",
    "jetson/tegrastats_agx_orin_64gb_r36.4.4_sudo.txt": "jetson-agx-orin-64gb",
    "jetson/tegrastats_agx_xavier_jp4.2.txt": "generic-jetson",
    "jetson/tegrastats_orin_nano_8gb.txt": "generic-jetson",
    "jetson/tegrastats_tx2_jp4.txt": "generic-jetson",
    "jetson/tegrastats_xavier_nx_burn.txt": "generic-jetson",
    # A30: only -L and the table name the card; the tables of `nvidia-smi mig` name slices alone.
    "nvidia/a30_mig_L_three_instances.txt": "a30-mig",
    "nvidia/nvidia-smi_a30_mig_535.183.01.txt": "a30-mig",
    "nvidia/a30_mig_create_transcript.txt": "generic-nvidia",
    "nvidia/a30_mig_lgi_4x1g.txt": "generic-nvidia",
    "nvidia/a30_mig_lgip_535.183.01.txt": "generic-nvidia",
    "nvidia/a30_mig_lgipp_535.183.01.txt": "generic-nvidia",
    "nvidia/nvidia-smi-qx_a100-sxm4-v12.xml": "a100-80gb",
    "nvidia/nvidia-smi_nvlink_status_8xA100.txt": "a100-80gb-x8",
    "nvidia/capture_linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt.gz": "h100",
    "nvidia/capture_linux-x86_64__nvidia-h100-mig__590.48.01.txt.gz": "h100",
    "nvidia/capture_linux-x86_64__nvidia-h200__590.48.01.txt.gz": "h100",
    "nvidia/nvidia-smi-q_8gpu_535.183.01_invalid_truncated.txt.gz": "h100",
    "nvidia/nvidia-smi-q_8xH100_535.161.08.txt.gz": "h100",
    "nvidia/nvidia-smi_8xH100_550.90.07.txt": "h100",
    "nvidia/capture_linux-x86_64__nvidia-geforce-rtx-4080-super__595.71.05.txt.gz": "generic-nvidia",
    "nvidia/capture_linux-x86_64__nvidia-l40s__595.80.txt.gz": "generic-nvidia",
    "nvidia/nvidia-smi-q_8xRTX4090_535.154.05.txt.gz": "generic-nvidia",
    "nvidia/nvidia-smi-q_A10_535.129.03.txt": "generic-nvidia",
    "nvidia/nvidia-smi-qx_gtx-1660-ti.xml": "generic-nvidia",
    "nvidia/nvidia-smi-qx_rtx-3080-v12.xml": "generic-nvidia",
    "nvidia/nvidia-smi-qx_rtx-3080-v13.xml": "generic-nvidia",
    "nvidia/nvidia-smi-qx_rtx-4000-sff-ada-v13.xml": "generic-nvidia",
    "nvidia/nvidia-smi-qx_tesla-t4.xml": "generic-nvidia",
    "nvidia/nvidia-smi_525.125.06.txt": "generic-nvidia",
    # The matrix counts GPUs and does not name them.
    "nvidia/topo-m_8gpu_pcie_no_nvlink.txt": "generic-nvidia",
    "nvidia/topo-m_8xA100_4nic.txt": "generic-nvidia",
    "nvidia/topo-m_8xA100_aws.txt": "generic-nvidia",
    # Pascal is too old; GPUs on the bus without a driver cannot be used; the rest tells of no GPU.
    "nvidia/nvidia-smi-qx_quadro-p400.xml": "generic-cpu",
    "nvidia/lspci-nn_8xA100.txt": "generic-cpu",
    "nvidia/lspci-nn_A10.txt": "generic-cpu",
    "nvidia/fabricmanager.log": "generic-cpu",
    "smart/smartctl_nvme0.json": "generic-cpu",
    "smart/smartctl_scan.json": "generic-cpu",
    "smart/smartctl_scsi.json": "generic-cpu",
    "smart/smartctl_sda.json": "generic-cpu",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_capture_takes_profile(name: str) -> None:
    profiles = load_profiles([Path(millhand_profiles.__file__).parent])
    node = discover(FOLDER / name)
    found = match(profiles, node)
    assert found.profile.name == EXPECTED[name], found.reasons
    assert found.workers
    told = {gpu.compute_capability for gpu in node.accelerators if gpu.compute_capability}
    if found.profile.compute_capability and told:
        assert told == {found.profile.compute_capability}


def test_the_table_is_whole() -> None:
    """What is not in the table is no recording of a node, and is refused."""
    for path in sorted(FOLDER.glob("*/*")):
        if f"{path.parent.name}/{path.name}" not in EXPECTED:
            with pytest.raises(HardwareError):
                discover(path)


def test_a_whole_a100_board(tmp_path: Path) -> None:
    """NVLink status names the cards, `topo -m` how they are joined: together they allow tensor parallelism."""
    for name in ("nvidia-smi_nvlink_status_8xA100.txt", "topo-m_8xA100_4nic.txt"):
        (tmp_path / name).write_text((FOLDER / "nvidia" / name).read_text())
    found = match(load_profiles([Path(millhand_profiles.__file__).parent]), discover(tmp_path))
    assert (found.profile.name, found.tensor_parallel, len(found.workers)) == ("a100-80gb-x8", 8, 8)
    assert found.workers[0].cpus[:2] == (0, 1)
    assert found.workers[7].cpus[0] == 32
