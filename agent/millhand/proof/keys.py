"""Ed25519 keys (RFC 8032) as PEM files (RFC 8410): the node's own, made once, and the plant's.

`cryptography` is imported by the first call that needs it, so that neither the command line nor workers carry it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millhand.durable import sync_folder, temporary_prefix, write_durably
from millhand.errors import ModelError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FOLDER = "keys"
NODE = "node"
ID_DIGITS = 16
PEM_BYTES_CAP = 64 << 10
PRIVATE_MODE = 0o600


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with."""

    id: str
    """The SHA-256 of its 32 bytes, hex, first 16 digits."""
    path: Path
    key: Ed25519PublicKey

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature (64 bytes) is this key's over the message."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    @property
    def raw(self) -> bytes:
        """Its 32 bytes."""
        return self.key.public_bytes_raw()

    def pem(self) -> bytes:
        """SubjectPublicKeyInfo, PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs."""

    path: Path
    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return _public(self.path, self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        """64 bytes, the same for the same message."""
        return self.key.sign(message)


def private_path(folder: Path, name: str = NODE) -> Path:
    """Where a pair's private key lies."""
    return folder / f"{name}.pem"


def public_path(folder: Path, name: str = NODE) -> Path:
    """Where a pair's public key lies."""
    return folder / f"{name}.public.pem"


def node_key(data_dir: Path) -> PrivateKey:
    """The node's own key; made where there is none. Raises ModelError."""
    folder = data_dir / FOLDER
    try:
        if public_path(folder).exists() and not private_path(folder).exists():
            raise ModelError(
                f"the node's private key '{private_path(folder)}' is gone",
                hint=f"restore it, or remove '{public_path(folder)}' too: then a new key is made",
            )
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was first: its key holds
            _make(private_path(folder), _owner(data_dir))
        key = read_private(private_path(folder))
        _publish(key, public_path(folder))
    except OSError as error:
        raise ModelError(
            f"the node's key cannot be made in '{folder}': {error.strerror}",
            hint="run as the user that runs the agent, or mend the folder's permissions",
        ) from error
    return key


def new_pair(folder: Path, name: str) -> PrivateKey:
    """Make a pair of keys in a folder. Raises ModelError where one of that name is there already."""
    private, public = private_path(folder, name), public_path(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (private, public):
            if path.exists():
                raise ModelError(f"'{path}' is there already", hint="give another --name, or another folder")
        _make(private, None)
        key = read_private(private)
        write_durably(public, key.public.pem())
    except OSError as error:
        raise ModelError(f"no key can be made in '{folder}': {error.strerror}", hint="name another folder") from error
    return key


def read_private(path: Path) -> PrivateKey:
    """Read a private key (PKCS 8, PEM, no password).

    Raises ModelError: it is not there, others can read it, it is damaged, or of another algorithm.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data, mode = _read(path)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ModelError(
            f"private key '{path}' can be used by others (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 '{path}'; if others may have read it, take a new key",
        )
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise ModelError(
            f"private key '{path}' is protected by a password",
            hint=f"openssl pkey -in '{path}' -out OTHER.pem takes it off",
        ) from error
    except Exception as error:
        raise _unreadable(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_algorithm(path, type(key).__name__)
    return PrivateKey(path, key)


def read_public(path: Path) -> PublicKey:
    """Read a public key (SubjectPublicKeyInfo, PEM).

    Raises ModelError: it is not there, damaged, or of another algorithm.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data, _ = _read(path)
    if b"PRIVATE KEY" in data:
        raise ModelError(
            f"'{path}' is a private key; a public one belongs here",
            hint=f"openssl pkey -in '{path}' -pubout, and keep the private key off the node",
        )
    try:
        key = load_pem_public_key(data)
    except Exception as error:
        raise _unreadable(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _other_algorithm(path, type(key).__name__)
    return _public(path, key)


def _public(path: Path, key: Ed25519PublicKey) -> PublicKey:
    return PublicKey(hashlib.sha256(key.public_bytes_raw()).hexdigest()[:ID_DIGITS], path, key)


def _read(path: Path) -> tuple[bytes, int]:
    """What a key's file holds, and its mode."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            mode = os.fstat(number).st_mode
            data = file.read(PEM_BYTES_CAP) if stat.S_ISREG(mode) else b""
    except OSError as error:
        hint = "give the path of a PEM file, or mend its permissions"
        raise ModelError(f"key '{path}' cannot be read: {error.strerror}", hint=hint) from error
    return data, mode


def _make(path: Path, owner: tuple[int, int] | None) -> None:
    """Write a new private key, durably and with all its bytes at once. Raises FileExistsError where one is there."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if path.exists():
        raise FileExistsError(path)
    key = Ed25519PrivateKey.generate()
    number, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path))
    try:
        with os.fdopen(number, "wb") as file:
            os.fchmod(number, PRIVATE_MODE)
            if owner is not None:
                os.fchown(number, *owner)
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(number)
        os.link(name, path)  # unlike a rename, it never takes the place of a key that is there
    finally:
        Path(name).unlink(missing_ok=True)
    sync_folder(path.parent)


def _publish(key: PrivateKey, path: Path) -> None:
    """Keep the public half beside the private one, for users that may not read that."""
    data = key.public.pem()
    if not path.exists() or path.read_bytes() != data:
        write_durably(path, data)


def _owner(data_dir: Path) -> tuple[int, int] | None:
    """Whose the key shall be where root makes it: the agent's, whose folder it is."""
    status = data_dir.stat()
    return (status.st_uid, status.st_gid) if os.geteuid() == 0 else None


def _unreadable(path: Path, kind: str) -> ModelError:
    return ModelError(
        f"'{path}' holds no readable {kind} key (PEM)",
        hint="restore the file; a lost key cannot be made again, and what it signed must be signed anew",
    )


def _other_algorithm(path: Path, name: str) -> ModelError:
    algorithm = name.removesuffix("PrivateKey").removesuffix("PublicKey").strip("_")
    return ModelError(
        f"'{path}' is a key for {algorithm}; proofs are signed with Ed25519",
        hint="millhand key new FOLDER makes a pair, or openssl genpkey -algorithm ed25519",
    )
