"""Writes a bundle: the same bytes for the same content and key."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from millhand.bundle import openpgp
from millhand.bundle.archive import READ_BYTES, trailer
from millhand.bundle.manifest import KEY, NAME, SIGNATURE, Deb, File, Manifest, decode, may_hold
from millhand.errors import BundleError
from millhand.proof.keys import PrivateKey


@dataclass(frozen=True, kw_only=True)
class Content:
    """What goes into a bundle, and whom it is for; fields as `Manifest` has them."""

    version: str
    package: str
    target: str
    architecture: str
    system: str
    python: str
    epoch_s: int
    """Seconds of the commit that it is built from; also of every file in it."""
    system_bytes: int
    debs: tuple[Deb, ...]
    files: Mapping[str, Path]
    """Path in the bundle -> the file."""


class _Summed:
    """A file that keeps the SHA-256 of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self._file.write(data)


def write(path: Path, content: Content, key: PrivateKey) -> Manifest:
    """Write a bundle, whole or not at all. Raises BundleError for a path that no bundle holds; OSError."""
    manifest = _manifest(content)
    text = manifest.encode()
    head = {NAME: text, SIGNATURE: openpgp.signature(key, text), KEY: openpgp.certificate(key)}
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            summed = _Summed(file)
            with tarfile.open(fileobj=summed, mode="w|", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
                for name, data in head.items():
                    archive.addfile(_member(name, len(data), content.epoch_s), io.BytesIO(data))
                for entry in manifest.files:
                    with content.files[entry.path].open("rb") as source:
                        archive.addfile(_member(entry.path, entry.bytes, content.epoch_s), source)
            file.write(trailer(summed.sum.hexdigest()))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return manifest


def _manifest(content: Content) -> Manifest:
    for path in content.files:
        if not may_hold(path):
            raise BundleError(
                f"no bundle holds a file of the name '{path}'",
                hint="rename it: letters, digits and '_.+~@=-', of which '.+~@=-' not first; no spaces",
            )
    files = tuple(File(_sha256(source), source.stat().st_size, path) for path, source in sorted(content.files.items()))
    manifest = Manifest(
        version=content.version,
        package=content.package,
        target=content.target,
        architecture=content.architecture,
        system=content.system,
        python=content.python,
        date=datetime.fromtimestamp(content.epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        staged_bytes=sum(file.bytes for file in files),
        system_bytes=content.system_bytes,
        data_bytes=sum(file.bytes for file in files if file.path.startswith("data/")),
        debs=content.debs,
        files=files,
    )
    return decode(manifest.encode())  # what no node could read is not written


def _member(name: str, size: int, epoch_s: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, epoch_s, 0o644
    return member


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            found.update(part)
    return found.hexdigest()
