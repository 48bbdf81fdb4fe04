"""Packages, and root folders of Debian 12 that they are installed into."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from millhand_images.target import MACHINES, not_emulated

ROOT = Path(__file__).parents[3]
WITH_PYTHON = ("python3", "ca-certificates")
BUILD_DEADLINE_S = 900
BASE_DEADLINE_S = 1800


def missing(architecture: str = "amd64") -> str:
    """Why no node of an architecture can be made on this machine; empty where one can."""
    if os.geteuid() != 0:
        return "only root makes the root folder of a node"
    for program in ("debootstrap", "unshare", "nsenter", "setpriv", "ip", "dpkg-deb", "gcc"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.uname().machine not in MACHINES.values():
        return f"no package is built for {os.uname().machine}"
    return not_emulated(architecture)


def package(architecture: str, folder: Path) -> Path:
    """The Debian package: one of the folder that TEST_PACKAGES names, else built anew into `folder`."""
    if ready := os.environ.get("TEST_PACKAGES"):
        found = sorted(Path(ready).glob(f"millhand_*_{architecture}.deb"), key=lambda path: path.stat().st_mtime)
        assert found, f"TEST_PACKAGES={ready} holds no package for {architecture}"
        return found[-1]
    command = [
        sys.executable,
        "-m",
        "millhand_images",
        "deb",
        "--arch",
        architecture,
        "--quick",
        "--out",
        os.fspath(folder),
    ]
    folders = [os.fspath(ROOT / name) for name in ("edge_images", "agent", "plugins", "profiles", "hub")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=BUILD_DEADLINE_S)
    (made,) = folder.glob(f"millhand_*_{architecture}.deb")
    return made


def bare_root(architecture: str, root: Path, include: Sequence[str] = WITH_PYTHON) -> None:
    """Unpack Debian 12 with some packages into `root`; made once, kept below TEST_CHROOTS or build/chroots."""
    cache = Path(os.environ.get("TEST_CHROOTS", ROOT / "build/chroots"))
    cache.mkdir(parents=True, exist_ok=True)
    further = sorted(set(include) - set(WITH_PYTHON))
    base = cache / "-".join(["bookworm", architecture, "minbase", *(["python"] if include else []), *further])
    base = base.with_name(f"{base.name}.tar")
    with (cache / f"{base.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.exists():
            _make_base(architecture, base, include)
    root.mkdir(parents=True)
    subprocess.run(["tar", "-C", root, "-xf", base], check=True)


def _make_base(architecture: str, base: Path, include: Sequence[str]) -> None:
    folder, part = base.with_suffix(".root"), base.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    options = [f"--arch={architecture}", "--variant=minbase"]
    options += [f"--include={','.join(include)}"] if include else []
    subprocess.run(["debootstrap", *options, "bookworm", folder], check=True, timeout=BASE_DEADLINE_S)
    subprocess.run(["tar", "-C", folder, "-cf", part, "."], check=True)
    part.rename(base)
    shutil.rmtree(folder)


def install(node_root: Path, deb: Path) -> str:
    """Lay the package into the root's /root; returns its path there."""
    shutil.copy(deb, node_root / "root" / deb.name)
    return f"/root/{deb.name}"
