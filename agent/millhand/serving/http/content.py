"""Compressed request bodies: gzip and deflate, with a bound on what they unpack to."""

from __future__ import annotations

import zlib

from millhand.errors import InputError
from millhand.serving.http.messages import BodyTooLarge

_WINDOW_BITS = {b"gzip": zlib.MAX_WBITS | 16, b"x-gzip": zlib.MAX_WBITS | 16, b"deflate": zlib.MAX_WBITS}


def decode_body(encoding: bytes, body: bytes | memoryview, cap: int) -> bytes | memoryview:
    """The body as it was before its content coding. Raises InputError, or BodyTooLarge beyond `cap` bytes."""
    encoding = encoding.strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise InputError(
            f"content-encoding '{encoding.decode(errors='replace')}' is not known", hint="use gzip, deflate or none"
        )
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        found = unpacker.decompress(body, cap + 1)
    except zlib.error as error:
        raise InputError(f"the body is not {encoding.decode()}: {error}", hint="check how it was compressed") from error
    if len(found) > cap:
        raise BodyTooLarge(cap, "the unpacked body")
    if not unpacker.eof or unpacker.unused_data:
        raise InputError(f"the body is cut off, or more follows its {encoding.decode()} data", hint="send all of it")
    return found
