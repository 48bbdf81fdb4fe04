"""A bundle's file: a plain tar (POSIX 1003.1-1988) with MANIFEST, its signature and the key first, and a last line.

The last line is the SHA-256 of every byte before it: damage anywhere is found. The signature is over MANIFEST, which
holds the hash of every file that follows.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from millhand.bundle import openpgp
from millhand.bundle.manifest import BYTES_CAP, HEAD, KEY, NAME, SIGNATURE, Manifest, decode
from millhand.errors import BundleError
from millhand.proof.keys import PublicKey

TRAILER_BYTES = len("sha256 ") + 64 + len("\n")
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Verified:
    """A bundle whose every byte is as the plant signed it."""

    path: Path
    manifest: Manifest
    key: PublicKey
    """The trusted key that has signed."""

    def read(self, name: str) -> bytes:
        """One of its files, held against the signed hash once more. Raises BundleError."""
        wanted = next((file for file in self.manifest.files if file.path == name), None)
        if wanted is None:
            raise BundleError(f"bundle '{self.path}' has no '{name}'", hint="build it anew")
        with _opened(self.path) as archive:
            source = archive.extractfile(name)
            data = b"" if source is None else source.read()
        if hashlib.sha256(data).hexdigest() != wanted.sha256:
            raise _damaged(self.path, f"'{name}' has changed")
        return data


def verify(path: Path, keys: Iterable[PublicKey]) -> Verified:
    """Check a bundle's sum, signature and every hash. Raises BundleError naming what is wrong."""
    try:
        _check_sum(path)
        with _opened(path) as archive:
            head = [_head_file(path, archive, name) for name in HEAD]
            key = _signer(path, keys, head[HEAD.index(NAME)], head[HEAD.index(SIGNATURE)], head[HEAD.index(KEY)])
            manifest = decode(head[HEAD.index(NAME)])
            _check_files(path, archive, manifest)
    except OSError as error:
        raise BundleError(f"bundle '{path}' cannot be read: {error.strerror or error}", hint="name a file") from error
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    return Verified(path, manifest, key)


def _check_sum(path: Path) -> None:
    """Hold every byte against the last line. Raises BundleError, OSError."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - TRAILER_BYTES
        while left > 0 and (part := file.read(min(READ_BYTES, left))):
            found.update(part)
            left -= len(part)
        if left or file.read() != trailer(found.hexdigest()):
            raise _damaged(path, "its last line is not the sum of what is before it")


def trailer(sha256: str) -> bytes:
    """The last line of a bundle."""
    return f"sha256 {sha256}\n".encode()


def _opened(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, "r:")


def _head_file(path: Path, archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.next()
    if member is None or member.name != name or not member.isreg() or member.size > BYTES_CAP:
        raise _damaged(path, f"'{name}' is not where it belongs")
    return _source(archive, member).read()


def _signer(path: Path, keys: Iterable[PublicKey], manifest: bytes, signature: bytes, certificate: bytes) -> PublicKey:
    """The trusted key that has signed. Raises BundleError."""
    trusted = list(keys)
    for key in trusted:
        if openpgp.verifies(key, manifest, signature):
            if not certificate.startswith(openpgp.key_packet(key)):
                raise _damaged(path, f"'{KEY}' is not the key that has signed")
            return key
    names = ", ".join(key.id for key in trusted) or "none"
    raise BundleError(
        f"bundle '{path}' is not signed by a key that this node trusts ({names})",
        hint="name the plant's public key: --key FILE, or [models] trusted_keys; or carry another bundle",
    )


def _check_files(path: Path, archive: tarfile.TarFile, manifest: Manifest) -> None:
    for file in manifest.files:
        member = archive.next()
        if member is None or member.name != file.path or not member.isreg() or member.size != file.bytes:
            raise _damaged(path, f"'{file.path}' is not where MANIFEST says")
        if _sha256(_source(archive, member)) != file.sha256:
            raise _damaged(path, f"'{file.path}' is not what MANIFEST says")
    if archive.next() is not None:
        raise _damaged(path, "it holds more than MANIFEST says")


def _source(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = archive.extractfile(member)
    if source is None:
        raise tarfile.TarError(f"'{member.name}' is no file")
    return source


def _sha256(source: IO[bytes]) -> str:
    found = hashlib.sha256()
    while part := source.read(READ_BYTES):
        found.update(part)
    return found.hexdigest()


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(f"bundle '{path}' is damaged or was changed: {why}", hint="carry it here again")
