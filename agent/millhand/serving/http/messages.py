"""HTTP requests and responses as the connection and the endpoints pass them on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec

from millhand.errors import ControlError, DeadlineError, InputError, MillhandError
from millhand.serving.admin import PermissionDenied, TokenMissing
from millhand.serving.http.head import Head, HeadTooLarge
from millhand.serving.routing import NotServing, UnknownModel

JSON = b"application/json"
RETRY_AFTER = (b"retry-after", b"1")
"""With a 503 that ends by itself."""
BINARY = b"application/octet-stream"
CLIENT_LEFT = 499
COMPRESS_FROM_BYTES = 8192
"""Smaller bodies are not worth the time, even to a client that accepts it."""
COMPRESSION_LEVEL = 1

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {CLIENT_LEFT: "Client Closed Request"}
_HEADS = {status: f"HTTP/1.1 {status} {reason}\r\ncontent-type: ".encode() for status, reason in _REASONS.items()}


class BodyTooLarge(InputError):
    """A request's body exceeds [http] body_bytes_cap."""

    def __init__(self, bytes_cap: int, what: str = "the body") -> None:
        super().__init__(
            f"{what} is larger than {bytes_cap} bytes", hint="send less at once, or raise [http] body_bytes_cap"
        )


class WrongMethod(InputError):
    """The path exists, but not for this method."""

    allowed = ""


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

    def encode(self, request: Request | None, keep_alive: bool) -> tuple[bytes, bytes]:
        """Head and body on the wire; None for an answer to something that was no request."""
        body, extra = self.body, b"".join([b"\r\n%b: %b" % header for header in self.headers])
        if request is not None and request.head.accepted_coding and len(body) >= COMPRESS_FROM_BYTES:
            coding = request.head.accepted_coding
            packer = zlib.compressobj(COMPRESSION_LEVEL, wbits=zlib.MAX_WBITS | (16 if coding == b"gzip" else 0))
            body = packer.compress(body) + packer.flush()
            extra += b"\r\ncontent-encoding: %b\r\nvary: accept-encoding" % coding
        if not keep_alive:
            extra += b"\r\nconnection: close"
        head = b"%b%b\r\ncontent-length: %d%b\r\n\r\n" % (_HEADS[self.status], self.content_type, len(body), extra)
        return head, b"" if request is not None and request.head.method == "HEAD" else body


def json_response(data: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> Response:
    return Response(msgspec.json.encode(data), status, JSON, headers)


def error_response(error: Exception) -> Response:
    """The answer to a request that failed: {"error": what and what to do}."""
    if not isinstance(error, MillhandError):
        return json_response({"error": f"internal error: {type(error).__name__}"}, 500)
    headers = []
    if isinstance(error, WrongMethod):
        headers = [(b"allow", error.allowed.encode())]
    elif isinstance(error, TokenMissing):
        headers = [(b"www-authenticate", b"Bearer")]
    status = status_of(error)
    if status == 503 and not isinstance(error, NotServing):
        headers = [RETRY_AFTER]
    return json_response({"error": error.text}, status, headers)


_STATUSES: list[tuple[type[MillhandError], int]] = [
    (UnknownModel, 404),
    (BodyTooLarge, 413),
    (WrongMethod, 405),
    (TokenMissing, 401),
    (PermissionDenied, 403),
    (HeadTooLarge, 431),
    (DeadlineError, 504),
    (ControlError, 503),
]


def status_of(error: MillhandError) -> int:
    """4xx for the caller's mistakes, 503 for what may go well later, 504 for a deadline, 500 for a model's failure."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 503 if error.retriable else 400 if isinstance(error, InputError) else 500
