"""MANIFEST: what a bundle is for and what it holds. Lines that a shell reads too; the signature is over these bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from millhand.errors import BundleError

FIRST = "millhand bundle 1"
NAME, SIGNATURE, KEY = "MANIFEST", "MANIFEST.sig", "KEY.pgp"
HEAD = (NAME, SIGNATURE, KEY)
SCRIPT = "install.sh"
INDEX = "debs/Packages"
"""What apt reads of the packages."""
FOLDERS = ("debs", "wheels", "data", "docs")
FILES = (SCRIPT, "sbom.cdx.json")
BYTES_CAP = 4 << 20
_PATH = r"[A-Za-z0-9_][A-Za-z0-9_.+~@=-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+~@=-]*)*"
_WORD = r"[A-Za-z0-9][A-Za-z0-9.+~:-]*"


class File(NamedTuple):
    """One file of a bundle."""

    sha256: str
    bytes: int
    path: str


class Deb(NamedTuple):
    """One package of a bundle, in the order in which dpkg takes them."""

    path: str
    package: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of it. `fields` of the file in their order, then the packages and the files."""

    version: str
    """The project's."""
    package: str
    """The version of the package millhand, as dpkg compares it."""
    target: str
    """`cpu`, `a100`, `orin`: what it was put together for."""
    architecture: str
    """As `dpkg --print-architecture` says it."""
    system: str
    """ID and VERSION_ID of os-release: `debian 12`."""
    python: str
    date: str
    """UTC, ISO 8601: of the commit that it was built from."""
    staged_bytes: int
    """Of all files, which are laid down once before anything is installed."""
    system_bytes: int
    """What packages and libraries take below /usr, at most."""
    data_bytes: int
    """What models take in the data folder."""
    debs: tuple[Deb, ...]
    files: tuple[File, ...]

    def encode(self) -> bytes:
        """The file's bytes."""
        lines = [
            FIRST,
            f"Version: {self.version}",
            f"Package: {self.package}",
            f"Target: {self.target}",
            f"Architecture: {self.architecture}",
            f"System: {self.system}",
            f"Python: {self.python}",
            f"Date: {self.date}",
            f"Staged-Bytes: {self.staged_bytes}",
            f"System-Bytes: {self.system_bytes}",
            f"Data-Bytes: {self.data_bytes}",
            "Debs:",
            *(f" {deb.path} {deb.package} {deb.version}" for deb in self.debs),
            "Files:",
            *(f" {file.sha256} {file.bytes} {file.path}" for file in self.files),
        ]
        return ("\n".join(lines) + "\n").encode("ascii")


_FORM = re.compile(
    rf"{FIRST}\nVersion: ({_WORD})\nPackage: ({_WORD})\nTarget: ({_WORD})\nArchitecture: ({_WORD})\n"
    rf"System: ({_WORD} {_WORD})\nPython: ({_WORD})\nDate: ({_WORD})\n"
    r"Staged-Bytes: (\d+)\nSystem-Bytes: (\d+)\nData-Bytes: (\d+)\nDebs:\n((?: .+\n)*)Files:\n((?: .+\n)*)"
)


def decode(data: bytes) -> Manifest:
    """Read a manifest. Raises BundleError for any other form than `Manifest.encode` writes."""
    try:
        found = _FORM.fullmatch(data.decode("ascii"))
    except UnicodeDecodeError:
        found = None
    if found is None:
        raise _unknown()
    version, package, target, architecture, system, python, date, staged, needed, kept, debs, files = found.groups()
    manifest = Manifest(
        version=version,
        package=package,
        target=target,
        architecture=architecture,
        system=system,
        python=python,
        date=date,
        staged_bytes=int(staged),
        system_bytes=int(needed),
        data_bytes=int(kept),
        debs=tuple(Deb(*_split(line, rf" ({_PATH}) ({_WORD}) ({_WORD})")) for line in debs.splitlines()),
        files=tuple(_file(line) for line in files.splitlines()),
    )
    paths = [file.path for file in manifest.files]
    if len(set(paths)) < len(paths) or not {deb.path for deb in manifest.debs} <= set(paths):
        raise _unknown()
    if manifest.encode() != data:
        raise _unknown()
    return manifest


def may_hold(path: str) -> bool:
    """Whether a bundle may have a file of this name."""
    return re.fullmatch(_PATH, path) is not None and (path in FILES or path.partition("/")[0] in FOLDERS)


def _file(line: str) -> File:
    sha256, size, path = _split(line, r" ([0-9a-f]{64}) (\d+) (.+)")
    if not may_hold(path):
        raise _unknown()
    return File(sha256, int(size), path)


def _split(line: str, form: str) -> tuple[str, ...]:
    found = re.fullmatch(form, line)
    if found is None:
        raise _unknown()
    return found.groups()


def _unknown() -> BundleError:
    return BundleError(
        "the bundle's MANIFEST is not of a form that this version knows",
        hint="take the install.sh that came with the bundle",
    )
