"""Asks language servers: one HTTP client for all, the least busy server first.

Each request has a connection of its own, which costs a tenth of a millisecond on loopback: llama.cpp's server closes
one after a stream without saying so, and a request on it would be lost.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from millhand.language.exchange import bearer
from millhand.serving.openai.failure import Failure
from millhand.serving.openai.relay import server_failure
from millhand.serving.openai.routes import LanguageRoutes, Route, unanswered

log = logging.getLogger("millhand.gateway")

CONNECT_DEADLINE_S = 3.0
ANSWER_BYTES_CAP = 64 << 20
ERROR_BYTES_CAP = 1 << 16
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


class Upstream:
    """The servers behind the gateway."""

    def __init__(self, routes: LanguageRoutes) -> None:
        self._routes = routes
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=HEADERS,
        )

    @asynccontextmanager
    async def ask(self, route: Route, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's answer, whose body is still to come; leaving early closes the request at once.

        A server that takes no connection is passed over. Raises Failure: 502 or 503, or what the server answered.
        """
        url, response = await self._post(route, path, body)
        try:
            if response.status >= 400:
                raise server_failure(response.status, await _error(response))
            yield response
        finally:
            response.close()  # ends the connection, unless the answer was read to its end
            self._routes.end(url)

    async def _post(self, route: Route, path: str, body: bytes) -> tuple[str, aiohttp.ClientResponse]:
        tried: frozenset[str] = frozenset()
        while url := self._routes.least_busy(route, tried):
            self._routes.begin(url)
            try:
                return url, await self._session.post(f"{url}{path}", data=body, headers=bearer(route.keys.get(url, "")))
            except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
                self._routes.end(url)
                tried |= {url}
                log.warning("the language server at %s takes no connection: %s", url, error)
            except (aiohttp.ClientError, OSError) as error:
                self._routes.end(url)
                raise _gone(error) from error
            except BaseException:
                self._routes.end(url)
                raise
        raise unanswered(msgspec.structs.replace(route, state="restarting", reason="its server takes no connection"))

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()


async def read_whole(response: aiohttp.ClientResponse) -> bytes:
    """A whole answer. Raises Failure where the server dies before its end, or says too much."""
    parts, size = [], 0
    while part := await read_some(response):
        parts.append(part)
        size += len(part)
        if size > ANSWER_BYTES_CAP:
            raise Failure(
                502, f"the answer is larger than {ANSWER_BYTES_CAP} bytes", kind="server_error", code="too_large"
            )
    return b"".join(parts)


async def read_some(response: aiohttp.ClientResponse) -> bytes:
    """What has come of an answer, empty at its end. Raises Failure where the server dies."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise _gone(error) from error


async def _error(response: aiohttp.ClientResponse) -> Any:
    """The server's own words for what is wrong."""
    body = b""
    while len(body) < ERROR_BYTES_CAP and (part := await read_some(response)):
        body += part
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace")[:500]
    return found.get("error", found) if isinstance(found, dict) else found


def _gone(error: Exception) -> Failure:
    log.warning("a language server broke off: %s", error or type(error).__name__)
    return Failure(
        502,
        "the language server broke off",
        hint="send the request again",
        kind="server_error",
        code="server_failed",
        retry_after_s=1.0,
    )
