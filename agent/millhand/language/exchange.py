"""One HTTP/1.1 request to a server on this node: small, without a library of its own; the daemon speaks little HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools
import msgspec

from millhand.errors import LanguageError

BYTES_CAP = 16 << 20
CHUNK_BYTES = 1 << 16


class Reply(NamedTuple):
    """What came back."""

    status: int
    body: bytes


def bearer(key: str) -> dict[str, str]:
    """The headers that show a key; none for none."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Reading:
    """Callbacks of httptools' parser."""

    def __init__(self, bytes_cap: int) -> None:
        self.body = bytearray()
        self.done = False
        self._bytes_cap = bytes_cap

    def on_body(self, part: bytes) -> None:
        self.body += part
        if len(self.body) > self._bytes_cap:
            raise ValueError(f"the answer is longer than {self._bytes_cap} bytes")

    def on_message_complete(self) -> None:
        self.done = True


async def exchange(
    url: str,
    *,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    bytes_cap: int = BYTES_CAP,
) -> Reply:
    """GET, or POST `body` as JSON. Raises LanguageError where the server is not there, breaks off or answers no HTTP;
    TimeoutError after `timeout_s`.
    """
    async with asyncio.timeout(timeout_s), requested(url, body, headers or {}) as reader:
        return await _read(reader, bytes_cap)


@contextlib.asynccontextmanager
async def requested(url: str, body: object, headers: Mapping[str, str]) -> AsyncIterator[asyncio.StreamReader]:
    """Send a GET, or `body` as JSON by POST, and give the reader of the answer; the connection is closed at the end.

    Raises LanguageError where the server is not there, or the connection breaks.
    """
    parts = urlsplit(url)
    data = b"" if body is None else msgspec.json.encode(body)
    lines = [
        f"{'GET' if body is None else 'POST'} {parts.path or '/'} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Connection: close",
        f"Content-Length: {len(data)}",
        *(["Content-Type: application/json"] if data else []),
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    try:
        reader, writer = await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 80)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + data)
            await writer.drain()
            yield reader
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except OSError as error:
        raise LanguageError(f"{parts.netloc} does not answer: {error.strerror or error}") from error


async def _read(reader: asyncio.StreamReader, bytes_cap: int) -> Reply:
    reading = _Reading(bytes_cap)
    parser = httptools.HttpResponseParser(reading)
    try:
        while not reading.done:
            chunk = await reader.read(CHUNK_BYTES)
            if not chunk:
                break
            parser.feed_data(chunk)
        status = parser.get_status_code()
    except (httptools.HttpParserError, ValueError) as error:
        reason = error.__context__ or error  # the parser wraps what a callback raised
        raise LanguageError(f"its answer is not usable: {reason}") from error
    if not status:
        raise LanguageError("it closed the connection without an answer")
    if not reading.done:
        raise LanguageError("it broke off within its answer")
    return Reply(status, bytes(reading.body))
