"""Environments for what cannot live beside millhand: each is made once in build/venvs and kept there."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
UNREACHABLE = re.compile(r"Retrying \(|ConnectionError|Temporary failure|timed out|Network is unreachable")
"""What pip says where the package index does not answer."""


def environment(requirements: Path) -> Path:
    """The `bin` folder of a virtual environment that holds exactly these requirements.

    Skips the test where the package index cannot be reached, fails it where the requirements cannot be installed.
    """
    text = requirements.read_bytes() + sys.version.encode()
    name = requirements.stem.removeprefix("requirements-")
    folder = REPOSITORY / "build" / "venvs" / f"{name}-{hashlib.sha256(text).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs may want it at once
        if not (folder / "complete").exists():
            _make(folder, requirements)
    return folder / "bin"


def _make(folder: Path, requirements: Path) -> None:
    for older in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        shutil.rmtree(older)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    done = subprocess.run(
        [*pip, "install", "-q", "-r", requirements], capture_output=True, text=True, check=False, timeout=400
    )
    if done.returncode == 0:
        (folder / "complete").touch()
    elif UNREACHABLE.search(done.stderr):
        pytest.skip(f"the package index cannot be reached, so {requirements.name} was not installed")
    else:
        pytest.fail(f"{requirements.name} cannot be installed:\n{done.stderr[-2000:]}", pytrace=False)
