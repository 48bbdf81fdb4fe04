"""HTTP requests and responses as the connection and the endpoints pass them on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from millhand.errors import DeadlineError, InputError, MillhandError
from millhand.serving.admin import PermissionDenied
from millhand.serving.routing import UnknownModel

JSON = b"application/json"
BINARY = b"application/octet-stream"
CLIENT_LEFT = 499
COMPRESS_FROM_BYTES = 8192
"""Smaller bodies are not worth the time, even to a client that accepts gzip."""
COMPRESSION_LEVEL = 1

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {CLIENT_LEFT: "Client Closed Request"}
_HEADS = {status: f"HTTP/1.1 {status} {reason}\r\ncontent-type: ".encode() for status, reason in _REASONS.items()}


class BodyTooLarge(InputError):
    """A request's body exceeds [http] body_bytes_cap."""


class WrongMethod(InputError):
    """The path exists, but not for this method."""

    allowed = ""


class Head:
    """A request's head. Header names are lower-case. Shared by all requests that begin with the same bytes."""

    __slots__ = (
        "accepts_gzip",
        "chunked",
        "content_length",
        "headers",
        "keep_alive",
        "method",
        "path",
        "query",
        "raw_path",
        "target",
    )

    def __init__(self, method: str, url: bytes, headers: dict[bytes, bytes], keep_alive: bool) -> None:
        """Raises InputError for a path that is no UTF-8, or a content-length that is no number."""
        self.method = method
        self.raw_path, _, query = url.partition(b"?")
        try:
            self.path = (unquote_to_bytes(self.raw_path) if b"%" in self.raw_path else self.raw_path).decode()
            self.query = query.decode()
        except UnicodeDecodeError as error:
            raise InputError("the request's path is no UTF-8", hint="percent-encode UTF-8") from error
        self.headers = headers
        self.keep_alive = keep_alive
        self.chunked = b"transfer-encoding" in headers
        self.accepts_gzip = b"gzip" in headers.get(b"accept-encoding", b"")
        self.target: Any = None
        """What the endpoints made of method and path, once they have."""
        value = headers.get(b"content-length", b"0")
        if not value.isdigit() or len(value) > 18:
            raise InputError(f"content-length '{value.decode(errors='replace')}' is no size", hint="give bytes")
        self.content_length = int(value)


class Request:
    """One request; `body` is complete."""

    __slots__ = ("body", "head", "route", "started_ns")

    def __init__(self, head: Head, started_ns: int) -> None:
        """`started_ns`: CLOCK_MONOTONIC when its head was complete."""
        self.head = head
        self.started_ns = started_ns
        self.body: bytes | memoryview = b""
        self.route = "other"
        """The path's template, for metrics."""


class Inference(NamedTuple):
    """What a worker said of an inference, for traces."""

    model: str
    version: int
    sent_ns: int
    """CLOCK_MONOTONIC when it was given to the worker."""
    queue_ns: int
    compute_ns: int


class Response:
    """A complete answer."""

    __slots__ = ("body", "content_type", "headers", "inference", "status")

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        content_type: bytes = JSON,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers
        self.inference: Inference | None = None

    def encode(self, request: Request | None, keep_alive: bool) -> bytes:
        """The bytes on the wire; None for an answer to something that was no request."""
        body, extra = self.body, b"".join([b"\r\n%b: %b" % header for header in self.headers])
        if request is not None and request.head.accepts_gzip and len(body) >= COMPRESS_FROM_BYTES:
            packer = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16)
            body = packer.compress(body) + packer.flush()
            extra += b"\r\ncontent-encoding: gzip\r\nvary: accept-encoding"
        if not keep_alive:
            extra += b"\r\nconnection: close"
        head = b"%b%b\r\ncontent-length: %d%b\r\n\r\n" % (_HEADS[self.status], self.content_type, len(body), extra)
        return head if request is not None and request.head.method == "HEAD" else head + body


def json_response(data: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> Response:
    return Response(msgspec.json.encode(data), status, JSON, headers)


def error_response(error: Exception) -> Response:
    """The answer to a request that failed: {"error": what and what to do}."""
    if not isinstance(error, MillhandError):
        return json_response({"error": f"internal error: {type(error).__name__}"}, 500)
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    headers = [(b"allow", error.allowed.encode())] if isinstance(error, WrongMethod) else []
    return json_response({"error": text}, status_of(error), headers)


_STATUSES: list[tuple[type[MillhandError], int]] = [
    (UnknownModel, 404),
    (BodyTooLarge, 413),
    (WrongMethod, 405),
    (PermissionDenied, 403),
    (DeadlineError, 504),
]


def status_of(error: MillhandError) -> int:
    """400, 403, 404, 405 and 413 for the caller's mistakes, 503 for what may go well later, 504 for a deadline."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 503 if error.retriable else 400 if isinstance(error, InputError) else 500
