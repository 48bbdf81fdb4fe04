"""A request's head: httptools (llhttp) parses it, in one piece; what is no HTTP/1 is refused here."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

import httptools

from millhand.errors import InputError

HEADERS_CAP = 100

# Given twice, they could mean one thing here and another to a proxy in front.
_ONCE = {b"content-length", b"transfer-encoding", b"host", b"inference-header-content-length"}


class HeadTooLarge(InputError):
    """A request's head is too long, or has too many headers."""


class Head:
    """A request's head. Header names are lower-case. Shared by all requests that begin with the same bytes."""

    __slots__ = (
        "accepted_coding",
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
        self.accepted_coding = _accepted_coding(headers.get(b"accept-encoding", b""))
        """What a large answer is compressed with: gzip, deflate, or empty."""
        self.target: Any = None
        """What the endpoints made of method and path, once they have."""
        value = headers.get(b"content-length", b"0")
        if not value.isdigit() or len(value) > 18:
            raise InputError(f"content-length '{value.decode(errors='replace')}' is no size", hint="give bytes")
        self.content_length = int(value)


class _Callbacks:
    """What httptools tells."""

    __slots__ = ("complete", "count", "headers", "twice", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.count = 0
        self.twice = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self.count += 1
        if name in self.headers:
            if name in _ONCE:
                self.twice = name
            value = self.headers[name] + b", " + value
        self.headers[name] = value

    def on_headers_complete(self) -> None:
        self.complete = True


def read_head(data: bytes) -> Head:
    """Parse a head with its blank line. Raises InputError for what is none, HeadTooLarge beyond HEADERS_CAP."""
    found = _Callbacks()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer that may be declined
    except httptools.HttpParserError as error:
        raise InputError(f"this is no HTTP/1.1 request: {error}", hint="speak HTTP/1.1") from error
    headers, version = found.headers, parser.get_http_version()
    if not found.complete or version not in ("1.0", "1.1"):
        raise InputError("this is no HTTP/1.1 request", hint="speak HTTP/1.1")
    if found.count > HEADERS_CAP:
        raise HeadTooLarge(f"the request has more than {HEADERS_CAP} headers", hint="send fewer")
    if found.twice:
        raise InputError(f"header '{found.twice.decode()}' is given twice", hint="give it once")
    if b"transfer-encoding" in headers:
        if b"content-length" in headers:
            raise InputError("the request has both content-length and transfer-encoding", hint="give one of them")
        if headers[b"transfer-encoding"].lower() != b"chunked":
            raise InputError("transfer-encoding must be 'chunked'", hint="use it, or give content-length")
    if version == "1.0":
        headers.pop(b"expect", None)  # such a client does not know it
    elif b"host" not in headers:
        raise InputError("header 'host' is missing", hint="send it, as HTTP/1.1 demands")
    keep_alive = version == "1.1" and _stays(headers)  # HTTP/1.0 keeps one only where both sides say so
    return Head(parser.get_method().decode(), _origin(found.url), headers, keep_alive)


def _origin(url: bytes) -> bytes:
    """Path and query of a request's target, which may be a whole URL (RFC 9112, section 3.2.2)."""
    if url.startswith((b"http://", b"https://")):
        return b"/" + url.partition(b"://")[2].partition(b"/")[2]
    return url


def _stays(headers: dict[bytes, bytes]) -> bool:
    # The parser cannot say: it forgets the header as soon as a request without a body is complete.
    return b"close" not in [option.strip() for option in headers.get(b"connection", b"").lower().split(b",")]


def _accepted_coding(header: bytes) -> bytes:
    accepted = set()
    for part in header.lower().split(b","):
        name, _, weight = part.partition(b";")
        weight = weight.strip()
        if not weight or weight.removeprefix(b"q=").strip(b"0."):
            accepted.add(name.strip())
    return next((coding for coding in (b"gzip", b"deflate") if coding in accepted), b"")
