"""Signatures of proofs: what exactly is signed, and whose signatures count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from millhand.errors import ModelError
from millhand.proof.document import Proof, Role, Signature
from millhand.proof.file import normal
from millhand.proof.keys import FOLDER, PrivateKey, PublicKey, private_path, public_path, read_private, read_public

CONTEXT = b"millhand proof 1\n"
"""So that a signature made here means nothing anywhere else."""


def message(proof: Proof, role: Role) -> bytes:
    """The bytes that are signed: "millhand proof 1", the role, and the proof without its signatures, a line each.

    The proof's line is JSON in UTF-8 without white space: every key written out, keys of every object sorted by code
    point, numbers in the shortest form that reads back as the same value (as msgspec writes them).
    """
    unsigned = msgspec.structs.replace(proof, signatures=())
    return CONTEXT + role.encode() + b"\n" + msgspec.json.encode(unsigned, order="sorted") + b"\n"


def sign(proof: Proof, key: PrivateKey, role: Role) -> Proof:
    """The proof with one signature more; an earlier one by the same key goes.

    Raises ModelError where the proof holds what cannot be written.
    """
    proof = normal(proof)
    signature = Signature(key=key.public.id, role=role, signature=key.sign(message(proof, role)).hex())
    others = (other for other in proof.signatures if other.key != signature.key)
    return msgspec.structs.replace(proof, signatures=(*others, signature))


@dataclass(frozen=True)
class Trust:
    """What a proof's signatures are worth here."""

    trusted: tuple[PublicKey, ...] = ()
    """Keys that have signed, and count."""
    false: tuple[Signature, ...] = ()
    """Signatures in the name of such a key that are not that key's: proof or signature was changed."""
    unknown: tuple[Signature, ...] = ()
    """Signatures by other keys, which cannot be checked."""


@dataclass(frozen=True)
class Keyring:
    """The public keys whose signatures count, in files that are read anew each time: a key may come meanwhile."""

    data_dir: Path | None = None
    """The node's, which holds its own key."""
    trusted: Sequence[Path] = ()

    def node(self) -> PublicKey | None:
        """This node's own key; None where there is none yet. Raises ModelError where it cannot be read."""
        if self.data_dir is None:
            return None
        folder = self.data_dir / FOLDER
        try:
            if public_path(folder).exists():
                return read_public(public_path(folder))
            return read_private(private_path(folder)).public if private_path(folder).exists() else None
        except OSError as error:
            raise ModelError(
                f"this node's keys in '{folder}' cannot be read: {error.strerror}",
                hint="run as the user that runs the agent",
            ) from error

    def read(self) -> tuple[dict[str, PublicKey], list[ModelError]]:
        """(key by id, what is wrong with those that cannot be read)."""
        keys: dict[str, PublicKey] = {}
        faults: list[ModelError] = []
        for read in (self.node, *(lambda path=path: read_public(path) for path in self.trusted)):
            try:
                if (key := read()) is not None:
                    keys.setdefault(key.id, key)
            except ModelError as error:
                faults.append(error)
        return keys, faults


def check(proof: Proof, keys: Mapping[str, PublicKey]) -> Trust:
    """Check every signature of a proof as it was read."""
    trusted, false, unknown = [], [], []
    for signature in proof.signatures:
        key = keys.get(signature.key)
        if key is None:
            unknown.append(signature)
        elif key.verifies(message(proof, signature.role), bytes.fromhex(signature.signature)):
            trusted.append(key)
        else:
            false.append(signature)
    return Trust(tuple(trusted), tuple(false), tuple(unknown))
