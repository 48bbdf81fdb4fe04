"""The bench's way over HTTP, to this or another node: one kept connection a caller, requests encoded beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import struct
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import httptools
import numpy as np
from numpy.typing import NDArray

from millhand.errors import DeadlineError, InputError, ModelError, OverloadError, WorkerError
from millhand.serving.bench import Timing
from millhand.serving.tensors import DATATYPE_OF, Tensors

BINARY = "binary_tensor_data"
"""The extension's name in the server's metadata."""
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Server:
    """Where a server of the Open Inference Protocol v2 listens."""

    url: str
    host: str
    port: int
    secure: bool

    @classmethod
    def parse(cls, url: str) -> Server:
        """Read `http://host[:port]` or `https://…`. Raises InputError."""
        hint = "give http://host:port, without a path"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"'{url}' is no address: {error}", hint=hint) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise InputError(f"'{url}' is no address of a server", hint=hint)
        secure = parts.scheme == "https"
        return cls(url.rstrip("/"), parts.hostname, port or (443 if secure else 80), secure)

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises InputError where nobody answers, ModelError for what is not there."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}{path}", timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                raise ModelError(f"{self.url}{path}: {error.code} {_message(error.read())}") from error
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            hint = "is that node's [http] enabled, and its host an address that can be reached from here?"
            raise InputError(f"'{self.url}' does not answer: {reason}", hint=hint) from error
        except ValueError as error:
            raise InputError(f"'{self.url}{path}' answers something else than JSON", hint="is it a server?") from error


def encoded(server: Server, model: str, version: int | None, tensors: Tensors, binary: bool) -> bytes:
    """A whole HTTP/1.1 request."""
    path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "") + "/infer"
    inputs: list[dict[str, Any]] = []
    data = b""
    for name, array in tensors.items():
        if not binary and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"input '{name}' holds NaN or infinity, which JSON has not", hint="send --body binary")
        tensor = {"name": name, "datatype": DATATYPE_OF[array.dtype.name], "shape": list(array.shape)}
        raw = _raw(array) if binary else b""
        inputs.append(
            {**tensor, "parameters": {"binary_data_size": len(raw)}} if binary else {**tensor, "data": _listed(array)}
        )
        data += raw
    request = {"inputs": inputs, **({"parameters": {"binary_data_output": True}} if binary else {})}
    head = json.dumps(request, separators=(",", ":")).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {server.host}:{server.port}",
        f"Content-Type: {'application/octet-stream' if binary else 'application/json'}",
        f"Content-Length: {len(head) + len(data)}",
        *([f"Inference-Header-Content-Length: {len(head)}"] if binary else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + data


def _raw(array: NDArray[Any]) -> bytes:
    """Little-endian bytes in row-major order; BYTES: each element's length in 4 bytes before it."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in array.ravel())
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _listed(array: NDArray[Any]) -> list[Any]:
    return [element.decode() for element in array.ravel()] if array.dtype == object else array.ravel().tolist()


class HttpLine:
    """One caller's connection; opened anew after an error or where the server closes it."""

    def __init__(self, server: Server, requests: Sequence[bytes]) -> None:
        self._server = server
        self._requests = requests
        self._connection: _Connection | None = None

    async def ask(self, index: int) -> Timing | None:
        connection = self._connection
        if connection is None or connection.transport.is_closing():
            connection = self._connection = await self._connect()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, body = await connection.ask(self._requests[index % len(self._requests)])
        except TimeoutError as error:
            self.close()
            raise DeadlineError(f"'{self._server.url}' did not answer within {TIMEOUT_S:g} s") from error
        if status != 200:
            raise _failure(status, _message(body))
        return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()
            self._connection = None

    async def _connect(self) -> _Connection:
        server = self._server
        context = ssl.create_default_context() if server.secure else None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(server.url), server.host, server.port, ssl=context
                )
        except (OSError, TimeoutError) as error:
            raise WorkerError(f"'{server.url}' does not answer: {error}") from error
        return connection


class _Connection(asyncio.Protocol):
    """Asyncio's and httptools' callbacks: one request at a time."""

    transport: asyncio.Transport

    def __init__(self, url: str) -> None:
        self._url = url
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body = bytearray()

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send; the future gives status and body."""
        self._answer = asyncio.get_running_loop().create_future()
        self._body = bytearray()
        self.transport.write(request)
        return self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(InputError(f"'{self._url}' does not answer in HTTP: {error}", hint="give a server's address"))
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(WorkerError(f"'{self._url}' closed the connection", hint="send the request again"))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.transport.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _failure(status: int, message: str) -> InputError | OverloadError | DeadlineError:
    """429, 499, 503 and 504 are worth another try, as the protocol's codes here say; the rest are not."""
    text = f"{status} {message}"
    if status in (499, 504):
        return DeadlineError(text)
    return OverloadError(text) if status in (429, 503) else InputError(text)


def _message(body: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found: Mapping[str, Any] = json.loads(body)
        return str(found["error"])
    return body[:200].decode(errors="replace")
