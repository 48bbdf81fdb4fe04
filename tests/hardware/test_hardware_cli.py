"""`millhand hw` and `millhand profile` as a technician types them: real processes, 80 columns, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ORIN = (
    "01-02-2026 10:00:00 RAM 2000/62841MB (lfb 466x4MB) SWAP 0/31420MB (cached 0MB) CPU [1%@729,off] GR3D_FREQ 7% "
    "NVENC off VIC off cpu@50.5C tj@51C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW\n"
)
TOPOLOGY = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV12\t0-31\t0\nGPU1\tNV12\t X \t0-31\t0\n"
BUS = "".join(
    f"0{n}:00.0 3D controller [0302]: NVIDIA Corporation GA100 [A100 SXM4 80GB] [10de:20b2] (rev a1)\n" for n in (1, 2)
)


def millhand(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millhand", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **environment},
    )


def test_live_node() -> None:
    answer = millhand("hw", "show")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Source      live\nCPU ")
    data = json.loads(millhand("hw", "show", "--json").stdout)
    assert data["cpu"]["architecture"] == os.uname().machine
    assert json.loads(millhand("profile", "match", "--json").stdout)["workers"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ORIN, ["Jetson AGX Orin 64GB", "2 logical, 1 switched on", "tj 51 C", "VDD_GPU_SOC 2.412 W", "NVENC off"]),
        (TOPOLOGY, ["gpu1  NV12  X", "not known"]),
        (BUS, ["Problems", "2 x NVIDIA A100 SXM4 80GB on the PCI bus", "Try: install the NVIDIA driver"]),
    ],
)
def test_recordings_within_80_columns(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "capture.txt"
    path.write_text(text)
    answer = millhand("hw", "show", "--root", path)
    assert answer.returncode == 0, answer.stderr
    for word in words:
        assert word in answer.stdout
    assert max(len(line) for line in answer.stdout.splitlines() if str(path) not in line) <= 80


def test_match_of_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "tegrastats.txt"
    path.write_text(ORIN)
    answer = millhand("profile", "match", "--root", tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Profile     jetson-agx-orin-64gb ")
    assert "not generic-jetson: it matches too" in answer.stdout
    data = json.loads(millhand("--json", "profile", "match", "--root", path).stdout)
    assert (data["profile"], data["tensor_parallel"]) == ("jetson-agx-orin-64gb", 1)
    assert [worker["accelerator"] for worker in data["workers"]] == ["0"]


def test_match_says_what_is_too_hot(tmp_path: Path) -> None:
    (tmp_path / "tegrastats.txt").write_text(ORIN.replace("tj@51C", "tj@99.5C"))
    answer = millhand("profile", "match", "--root", tmp_path)
    assert "Too hot     jetson is at 99.5 C: the hardware lowers its clocks" in answer.stdout


def test_root_of_the_configuration_holds(tmp_path: Path) -> None:
    (tmp_path / "tegrastats.txt").write_text(ORIN)
    answer = millhand("hw", "show", MILLHAND_NODE__HARDWARE_ROOT=str(tmp_path))
    assert "Jetson AGX Orin 64GB" in answer.stdout


def test_list_and_show() -> None:
    listing = millhand("profile", "list")
    assert listing.returncode == 0, listing.stderr
    lines = listing.stdout.splitlines()
    assert len(lines) == 12
    assert lines[-1].split()[:2] == ["generic-cpu", "0"]
    assert max(map(len, lines)) <= 80
    shown = json.loads(millhand("profile", "show", "a30-mig", "--json").stdout)
    assert (shown["extends"], shown["match"]["mig"], shown["limits"]["power_w"]) == ("a30", True, 165)
    assert "[worker]" in millhand("profile", "show", "a30-mig").stdout


def test_profiles_of_the_owner_are_listed(tmp_path: Path) -> None:
    (tmp_path / "press.toml").write_text('extends = "generic-cpu"\ndescription = "The press"\n[match]\npriority = 5\n')
    environment = {"MILLHAND_NODE__PROFILES_DIR": str(tmp_path)}
    assert "The press" in millhand("profile", "list", **environment).stdout
    (tmp_path / "press.toml").write_text('extends = "generic-cpu"\n[worker]\nmax_bach = 5\n')
    answer = millhand("profile", "list", **environment)
    assert answer.returncode == 1
    assert "profile 'press.toml': key 'worker.max_bach' is not known" in " ".join(answer.stderr.split())


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    missing = millhand("hw", "show", "--root", tmp_path / "none")
    assert missing.returncode == 1
    assert "does not exist" in " ".join(missing.stderr.split())
    assert "Try: give a file or a folder of recordings" in missing.stderr
    metrics = tmp_path / "node.metrics"
    metrics.write_text("# HELP a_count a\n# TYPE a_count gauge\na_count 1\n")
    refused = millhand("hw", "show", "--root", metrics)
    assert refused.returncode == 1
    assert "Prometheus metrics" in " ".join(refused.stderr.split())
    unknown = millhand("profile", "show", "a3O")
    assert unknown.returncode == 1
    assert "did you mean 'a30'?" in " ".join(unknown.stderr.split())
