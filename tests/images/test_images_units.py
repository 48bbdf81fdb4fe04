"""The units as systemd itself judges them, and what the package lays for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from millhand_images.target import IMAGES

UNITS = sorted((IMAGES / "systemd").glob("*.service"))
EXPOSURE_CAP = 3.0

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_hardened(unit: Path) -> None:
    run = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", str(unit)], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", run.stdout)
    assert found, run.stderr
    assert float(found[1]) <= EXPOSURE_CAP


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_no_fault_in_a_unit(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "millhand"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for other in UNITS:  # units name each other; their program need not be installed here
        text = other.read_text().replace("/usr/bin/millhand", str(program))
        (tmp_path / other.name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_names_pages_that_the_package_brings(unit: Path) -> None:
    for page in re.findall(r"^Documentation=file:///usr/share/doc/millhand/(\S+)$", unit.read_text(), re.MULTILINE):
        assert (IMAGES.parent / page).exists(), page
