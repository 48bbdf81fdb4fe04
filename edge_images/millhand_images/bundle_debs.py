"""The packages that a bare node lacks, found and fetched by apt itself, in folders of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millhand_images.process import BuildError, call

BASE = ("apt", "base-files")
"""Beside the packages of priority `required`: what `debootstrap --variant=minbase` installs."""


@dataclass(frozen=True)
class System:
    """A distribution's release; `name` as os-release has it, ID and VERSION_ID."""

    name: str
    python: str
    sources: tuple[str, ...]
    """Lines of a sources.list; the first is the release itself, without what came after it."""
    keyring: str
    ports: str = ""
    """Where other architectures than amd64 are, in place of the first lines' server."""


SYSTEMS = {
    "debian 12": System(
        "debian 12",
        "3.11",
        (
            "http://deb.debian.org/debian bookworm main",
            "http://deb.debian.org/debian bookworm-updates main",
            "http://deb.debian.org/debian-security bookworm-security main",
        ),
        "/usr/share/keyrings/debian-archive-keyring.gpg",
    ),
    "ubuntu 24.04": System(
        "ubuntu 24.04",
        "3.12",
        tuple(
            f"http://archive.ubuntu.com/ubuntu {suite} main universe"
            for suite in ("noble", "noble-updates", "noble-security")
        ),
        "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
        "http://ports.ubuntu.com/ubuntu-ports",
    ),
}


@dataclass(frozen=True)
class Found:
    """A package's file, in dpkg's order."""

    path: Path
    package: str
    version: str
    installed_kib: int


class Archive:
    """apt's view of a distribution for an architecture, as if nothing of it were installed."""

    def __init__(self, system: System, architecture: str, folder: Path) -> None:
        """folder: where apt keeps lists and files; what is there is used again."""
        self._options = [
            *("-o", f"Dir={folder}", "-o", f"Dir::State::status={folder}/status"),
            *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-o", "Debug::NoLocking=1"),
            *("-o", "APT::Install-Recommends=false", "-q"),
        ]
        if not Path(system.keyring).exists():
            raise BuildError(
                f"'{system.keyring}' is not here: packages of {system.name} cannot be verified",
                hint="apt-get install debian-archive-keyring ubuntu-keyring",
            )
        for name in ("etc/apt/sources.list.d", "etc/apt/preferences.d", "etc/apt/apt.conf.d", "var/lib/apt/lists"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "var/cache/apt/archives/partial").mkdir(parents=True, exist_ok=True)
        (folder / "status").write_text("", encoding="ascii")
        lines = system.sources
        if architecture != "amd64" and system.ports:
            lines = tuple(re.sub(r"^\S+", system.ports, line) for line in lines)
        texts = [f"deb [signed-by={system.keyring}] {line}\n" for line in lines]
        (folder / "etc/apt/sources.list").write_text("".join(texts), encoding="ascii")
        (folder / "etc/apt/first.list").write_text(texts[0], encoding="ascii")

    def update(self) -> None:
        """Fetch the lists. Raises BuildError."""
        said = call(["apt-get", *self._options, "update", "-o", "APT::Update::Error-Mode=any"])
        if "Err:" in said:
            raise BuildError(f"the package lists cannot be fetched:\n{said}")

    def lacking(self, packages: list[str], out: Path) -> list[Found]:
        """Fetch these packages with all that they need into `out`, but what every bare node has. Raises BuildError."""
        base = self._base()
        wanted = [(name, version) for name, version in self._closure(packages) if name not in base]
        out.mkdir(parents=True, exist_ok=True)
        if wanted:
            call(["apt-get", *self._options, "download", *(f"{name}={version}" for name, version in wanted)], cwd=out)
        return [_found(out, name, version) for name, version in wanted]

    def _base(self) -> set[str]:
        """What a node has from the day of the release on: an update of a base package may need one that others lack."""
        found = []
        for options in ((), ("-o", "Dir::Etc::sourcelist=first.list")):
            packages = [*BASE, *self._required(*options)]
            found.append({name for name, _ in self._closure(packages, *options)})
        return found[0] & found[1]

    def _closure(self, packages: list[str], *options: str) -> list[tuple[str, str]]:
        """(package, version), in the order in which apt would install them."""
        said = call(["apt-get", *self._options, *options, "-s", "install", *packages])
        return re.findall(r"^Inst (\S+) \((\S+) ", said, re.MULTILINE)

    def _required(self, *options: str) -> list[str]:
        text = call(["apt-cache", *self._options, *options, "dumpavail"])
        return re.findall(r"^Package: (\S+)\n(?:\S.*\n| .*\n)*?Priority: required\n", text, re.MULTILINE)


def describe(path: Path) -> Found:
    """What a package's own control file says. Raises BuildError."""
    said = call(["dpkg-deb", "--field", path, "Package", "Version", "Installed-Size"])
    fields = dict(line.split(": ", 1) for line in said.splitlines())
    return Found(path, fields["Package"], fields["Version"], int(fields.get("Installed-Size", "0")))


def index(debs: Mapping[str, Path]) -> str:
    """What apt reads of packages without their files, by their paths (an archive's `Packages`). Raises BuildError."""
    stanzas = []
    for place, path in debs.items():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        control = call(["dpkg-deb", "--field", path]).strip()
        stanzas.append(f"{control}\nFilename: {place}\nSize: {path.stat().st_size}\nSHA256: {sha256}\n")
    return "\n".join(stanzas)


def depends(path: Path) -> list[str]:
    """The packages that a package needs, of alternatives the first. Raises BuildError."""
    text = call(["dpkg-deb", "--field", path, "Depends"]).strip()
    return [re.split(r"[ (|]", part.strip())[0] for part in text.split(",") if part.strip()]


def _found(folder: Path, name: str, version: str) -> Found:
    escaped = version.replace(":", "%3a")
    paths = list(folder.glob(f"{name}_{escaped}_*.deb"))
    if not paths:
        raise BuildError(f"apt did not fetch {name} {version}", hint="build again; the archive may have changed")
    return describe(paths[0])
