"""What a package is built for: an architecture and a Python."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
"""The project's folder."""
IMAGES = ROOT / "edge_images"

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's name of an architecture -> the one in the names of wheels."""

GLIBC_MINOR_CAP = 36
"""Debian 12 has glibc 2.36; Ubuntu 24.04 and JetPack 7 have 2.39."""
GLIBC_MINOR_FIRST = 17
"""manylinux2014 (PEP 599) is the oldest that wheels are still made for on both architectures."""


@dataclass(frozen=True)
class Target:
    """`arch` as Debian names it, `python` as `3.11`; `kind` is one of lock.KINDS, empty for a package."""

    arch: str
    python: str
    kind: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.arch, f"python{self.python}", self.kind)))

    @property
    def lock_path(self) -> Path:
        """The wheels of this target, with their hashes."""
        return IMAGES / "locks" / f"{self.name}.txt"

    @property
    def platforms(self) -> list[str]:
        """Platform tags of wheels that run there, the best first (PEP 600)."""
        machine = MACHINES[self.arch]
        newest_first = range(GLIBC_MINOR_CAP, GLIBC_MINOR_FIRST - 1, -1)
        return [f"manylinux_2_{minor}_{machine}" for minor in newest_first] + [f"manylinux2014_{machine}"]

    def pip_options(self) -> list[str]:
        """Options of pip that choose wheels for this target and not for this machine."""
        platforms = [word for platform in self.platforms for word in ("--platform", platform)]
        return ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *platforms]


def glibc_minor(wheel_name: str) -> int:
    """The n of the oldest glibc 2.n that a wheel says it runs with; 0 for one without native code."""
    minors = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel_name)]
    if "manylinux2014" in wheel_name:
        minors.append(17)
    return min(minors, default=0)


def target_options(function: Any) -> Any:
    """`--arch` and `--python`."""
    function = click.option(
        "--python", default="3.11", show_default=True, help="The system's Python there: 3.11 is Debian 12's."
    )(function)
    return click.option("--arch", type=click.Choice(list(MACHINES)), default="amd64", show_default=True)(function)


def not_emulated(arch: str) -> str:
    """What keeps programs of a Debian architecture from being run here, with the remedy; empty where nothing does."""
    machine = MACHINES[arch]
    if machine == os.uname().machine or Path(f"/proc/sys/fs/binfmt_misc/qemu-{machine}").exists():
        return ""
    return (
        f"{arch} cannot be emulated: apt-get install qemu-user-static binfmt-support, "
        "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc"
    )
