"""Errors in OpenAI's shape: what went wrong, what to do, and a code that programs can read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from millhand.errors import (
    DeadlineError,
    InputError,
    LanguageError,
    MillhandError,
    ModelError,
    OverloadError,
    RefusedError,
)

_KINDS: tuple[tuple[type[MillhandError], int, str, str], ...] = (
    (InputError, 400, "invalid_request_error", "invalid_value"),
    (RefusedError, 400, "invalid_request_error", "content_filter"),
    (DeadlineError, 504, "server_error", "timeout"),
    (OverloadError, 503, "server_error", "overloaded"),
    (ModelError, 404, "invalid_request_error", "model_not_found"),
    (LanguageError, 502, "server_error", "server_failed"),
)


class Failure(Exception):
    """A request that ends with an error. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        hint: str = "",
        kind: str = "invalid_request_error",
        code: str = "invalid_value",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = f"{message} ({hint})" if hint else message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def event(self) -> bytes:
        """The same as an event of a stream that has begun."""
        return b"data: " + self.body + b"\n\n"

    @property
    def headers(self) -> Mapping[str, str]:
        """`Retry-After`, where the same request may succeed later."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def failure_of(error: MillhandError) -> Failure:
    """What a client is told of an error that millhand raised."""
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            retry_after_s = 1.0 if status in (502, 503) else None
            return Failure(status, error.message, hint=error.hint, kind=name, code=code, retry_after_s=retry_after_s)
    return Failure(500, error.message, hint=error.hint, kind="server_error", code=error.code)
