"""How a call ends: its code, and an error as google.rpc.Status with an ErrorInfo beside it."""

from __future__ import annotations

import base64
import logging
from enum import IntEnum
from urllib.parse import quote

from millhand.errors import (
    ControlError,
    DeadlineError,
    InputError,
    MillhandError,
    OverloadError,
    WorkerError,
)
from millhand.serving.grpc import wire
from millhand.serving.routing import UnknownModel

log = logging.getLogger("millhand.grpc")

DOMAIN = "millhand"
ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
TEXT_BYTES_CAP = 1024
"""Clients refuse trailers of more than 8 KiB; the message stands there twice, once escaped."""
PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class Code(IntEnum):
    """gRPC's codes, as far as they are given. UNKNOWN never is."""

    OK = 0
    CANCELED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16

    @property
    def label(self) -> str:
        """The name in metrics, as other servers write it: `DeadlineExceeded`."""
        return "OK" if self is Code.OK else "".join(word.capitalize() for word in self.name.split("_"))


class Refusal(MillhandError):
    """A call is refused with a code of its own."""

    code = "refused"

    def __init__(self, status: Code, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, retriable=status is Code.UNAVAILABLE)
        self.status = status


def code_of(error: BaseException) -> Code:
    """The code of an error. Overload is UNAVAILABLE, as 503 is over HTTP: clients try that again, or elsewhere."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, UnknownModel):
        return Code.NOT_FOUND
    if isinstance(error, DeadlineError):
        return Code.DEADLINE_EXCEEDED
    if isinstance(error, OverloadError | WorkerError | ControlError) or getattr(error, "retriable", False):
        return Code.UNAVAILABLE
    return Code.INVALID_ARGUMENT if isinstance(error, InputError) else Code.INTERNAL


def text_of(error: BaseException) -> str:
    """What the client reads: what is wrong, and the remedy."""
    if not isinstance(error, MillhandError):
        return f"internal error: {type(error).__name__}"
    return _cut(error.text)


def trailers_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """The trailers that end a call with an error."""
    code, text = code_of(error), text_of(error)
    known = error if isinstance(error, MillhandError) else MillhandError("", hint="look at the log")
    metadata = {"retriable": str(code is Code.UNAVAILABLE or known.retriable).lower()}
    if known.hint:
        metadata["hint"] = _cut(known.hint)
    info = wire.ErrorInfo(reason=known.code.upper(), domain=DOMAIN, metadata=metadata)
    status = wire.Status(code=int(code), message=text)
    status.details.add(type_url=ERROR_INFO, value=info.SerializeToString())
    return (
        ("grpc-status", str(int(code))),
        ("grpc-message", quote(text, safe=PLAIN)),
        ("grpc-status-details-bin", base64.b64encode(status.SerializeToString()).decode().rstrip("=")),
    )


def _cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= TEXT_BYTES_CAP else data[:TEXT_BYTES_CAP].decode(errors="ignore") + "..."
