"""The plant's Ed25519 key as OpenPGP writes it (RFC 4880, RFC 9580), so that a bare node's own gpgv or sqv can verify.

One form of certificate and of signature, and no reader of any other: what is verified here is compared with what would
have been written. Every time in them is one second after the epoch: a node whose clock is wrong must not refuse.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millhand.proof.keys import PrivateKey, PublicKey

TIME = (1).to_bytes(4, "big")
OWNER = b"millhand plant"
_VERSION = b"\x04"
_EDDSA = b"\x16"
_SHA512 = b"\x0a"
_ED25519 = b"\x09\x2b\x06\x01\x04\x01\xda\x47\x0f\x01"
"""The curve's OID with its length (RFC 9580, 9.2)."""
_KEY, _USER, _SIGNATURE = 6, 13, 2
_OF_DATA, _OF_USER = b"\x00", b"\x13"
_MAY_CERTIFY_AND_SIGN = b"\x02\x1b\x03"
HALF_BYTES = 32


def fingerprint(key: PublicKey) -> str:
    """The key's fingerprint as gpgv and sqv print it: 40 hex digits in capitals."""
    return hashlib.sha1(_hashed_key(key.raw), usedforsecurity=False).hexdigest().upper()


def certificate(key: PrivateKey) -> bytes:
    """The public key with a user id that the private key binds to it: what a keyring holds."""
    public = key.public
    about = _hashed_key(public.raw) + b"\xb4" + len(OWNER).to_bytes(4, "big") + OWNER
    binding = _signed(_head(_OF_USER, public, _MAY_CERTIFY_AND_SIGN), about, key)
    return key_packet(public) + _packet(_USER, OWNER) + binding


def key_packet(key: PublicKey) -> bytes:
    """What every certificate of the key begins with."""
    return _packet(_KEY, _key(key.raw))


def signature(key: PrivateKey, message: bytes) -> bytes:
    """A detached signature, the same for the same message."""
    return _signed(_head(_OF_DATA, key.public), message, key)


def verifies(key: PublicKey, message: bytes, written: bytes) -> bool:
    """Whether `written` is byte for byte the signature of this key over the message."""
    head = _head(_OF_DATA, key)
    digest = _digest(head, message)
    begin = head + b"\0\0" + digest[:2]
    body = written[2:]
    if not body.startswith(begin):
        return False
    halves = _halves(body[len(begin) :])
    if halves is None or written != _packet(
        _SIGNATURE, begin + _number(halves[:HALF_BYTES]) + _number(halves[HALF_BYTES:])
    ):
        return False
    return key.verifies(digest, halves)


def _signed(head: bytes, message: bytes, key: PrivateKey) -> bytes:
    digest = _digest(head, message)
    made = key.sign(digest)
    return _packet(_SIGNATURE, head + b"\0\0" + digest[:2] + _number(made[:HALF_BYTES]) + _number(made[HALF_BYTES:]))


def _digest(head: bytes, message: bytes) -> bytes:
    return hashlib.sha512(message + head + _VERSION + b"\xff" + len(head).to_bytes(4, "big")).digest()


def _head(kind: bytes, key: PublicKey, more: bytes = b"") -> bytes:
    """The part of a signature that is hashed: when, by which key (both its names: gpgv 2.2 needs the short one)."""
    name = bytes.fromhex(fingerprint(key))
    fields = b"\x05\x02" + TIME + b"\x16\x21\x04" + name + b"\x09\x10" + name[-8:] + more
    return _VERSION + kind + _EDDSA + _SHA512 + len(fields).to_bytes(2, "big") + fields


def _key(raw: bytes) -> bytes:
    return _VERSION + TIME + _EDDSA + _ED25519 + _number(b"\x40" + raw)


def _hashed_key(raw: bytes) -> bytes:
    return b"\x99" + len(_key(raw)).to_bytes(2, "big") + _key(raw)


def _packet(tag: int, body: bytes) -> bytes:
    return bytes([0xC0 | tag, len(body)]) + body  # all of ours are shorter than 192 bytes


def _number(data: bytes) -> bytes:
    """A multiprecision integer: its length in bits, then no leading zero."""
    value = int.from_bytes(data, "big")
    return value.bit_length().to_bytes(2, "big") + value.to_bytes((value.bit_length() + 7) // 8, "big")


def _halves(data: bytes) -> bytes | None:
    """The 64 bytes of two multiprecision integers; None where they are not that."""
    found = b""
    for _ in range(2):
        size = (int.from_bytes(data[:2], "big") + 7) // 8
        if size > HALF_BYTES or len(data) < 2 + size:
            return None
        found += data[2 : 2 + size].rjust(HALF_BYTES, b"\0")
        data = data[2 + size :]
    return None if data else found
