"""An answer while it comes: server-sent events of one streamed request (WHATWG HTML, section 9.2; OpenAI's form)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httptools
import msgspec

from millhand.errors import LanguageError, RefusedError
from millhand.language.exchange import requested

CHUNK_BYTES = 1 << 16
WAITING_BYTES_CAP = 1 << 20
"""An event that is longer is no event."""
REFUSED = "content_filter"
END = b"[DONE]"


class _Reading:
    """Callbacks of httptools' parser: gathers the body, and cuts it into events."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.done = False

    def on_body(self, part: bytes) -> None:
        self.waiting += part
        if len(self.waiting) > WAITING_BYTES_CAP:
            raise ValueError(f"an event is longer than {WAITING_BYTES_CAP} bytes")

    def on_message_complete(self) -> None:
        self.done = True

    def events(self) -> list[bytes]:
        """The data of every event that is there as a whole."""
        *whole, rest = bytes(self.waiting).replace(b"\r\n", b"\n").split(b"\n\n")
        if whole:
            self.waiting[:] = rest
        lines = [line for event in whole for line in event.split(b"\n")]
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


async def stream(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str], idle_s: float
) -> AsyncIterator[dict[str, Any]]:
    """POST `body` and yield the chunks of the answer. Leaving the iterator closes the connection.

    Raises LanguageError where the server is not there, breaks off or says nothing for `idle_s`; RefusedError where a
    guard said no, before or within the answer.
    """
    async with requested(url, body, headers) as reader:
        async for chunk in _chunks(reader, idle_s):
            yield chunk


async def _chunks(reader: asyncio.StreamReader, idle_s: float) -> AsyncIterator[dict[str, Any]]:
    reading = _Reading()
    parser = httptools.HttpResponseParser(reading)
    while not reading.done:
        part = await _read(reader, idle_s)
        try:
            parser.feed_data(part)
        except (httptools.HttpParserError, ValueError) as error:
            raise LanguageError(f"the answer is not usable: {error.__context__ or error}") from error
        status = parser.get_status_code()
        if status == 200:
            for event in reading.events():
                if event == END:
                    return
                yield _chunk(event)
    if parser.get_status_code() != 200:
        _raise_error(bytes(reading.waiting), parser.get_status_code())
    raise LanguageError("the language model's server broke off within its answer", hint="ask again")


async def _read(reader: asyncio.StreamReader, idle_s: float) -> bytes:
    try:
        async with asyncio.timeout(idle_s):
            part = await reader.read(CHUNK_BYTES)
    except TimeoutError as error:
        raise LanguageError(f"the language model said nothing for {idle_s:g} s", hint="ask again") from error
    if not part:
        raise LanguageError("the language model's server broke off within its answer", hint="ask again")
    return part


def _chunk(event: bytes) -> dict[str, Any]:
    try:
        chunk = msgspec.json.decode(event, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise LanguageError(f"an event of the answer is no JSON object: {error}") from error
    if "error" in chunk:
        _raise_error(event, 500)
    return chunk


def _raise_error(body: bytes, status: int) -> None:
    """Raise what an error in OpenAI's shape says."""
    try:
        error = msgspec.json.decode(body)["error"]
        code, message = error.get("code"), str(error.get("message", ""))
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        code, message = None, f"the language model's server answered with status {status}"
    if code == REFUSED:
        raise RefusedError(message, hint="say it in other words, or ask who looks after the node's guards")
    raise LanguageError(message, hint="see 'millhand language show'", retriable=status >= 500 or status == 429)
