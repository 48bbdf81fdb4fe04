"""The gateway's HTTP side: aiohttp's server with bounds on connections, on slow clients and on the size of a body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web

from millhand.serving.openai.failure import Failure

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class GatewayServer(web.Server):
    """Accepts at most so many connections, and waits only so long for the first head of each."""

    def __init__(self, handler: Handler, connections_cap: int, head_timeout_s: float) -> None:
        super().__init__(self._spoken_to, handler_cancellation=True, access_log=None)
        self._answer = handler
        self._connections_cap = connections_cap
        self._head_timeout_s = head_timeout_s
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    async def _spoken_to(self, request: web.BaseRequest) -> web.StreamResponse:
        self._heard(request.protocol)
        return await self._answer(request)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection, or close it where there are too many."""
        super().connection_made(handler, transport)
        if len(self.connections) > self._connections_cap:
            transport.abort()
            return
        timer = asyncio.get_running_loop().call_later(self._head_timeout_s, transport.abort)
        self._silent[handler] = timer

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        self._heard(handler)
        super().connection_lost(handler, exc)

    def _heard(self, handler: web.RequestHandler) -> None:
        if timer := self._silent.pop(handler, None):
            timer.cancel()


async def read_body(request: web.BaseRequest, bytes_cap: int, timeout_s: float) -> bytes:
    """A request's body. Raises Failure: 413 where it is larger than `bytes_cap`, 408 where it does not come in time."""
    if (request.content_length or 0) > bytes_cap:
        raise _too_large(bytes_cap)
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            while not request.content.at_eof():
                part = await request.content.readany()
                parts.append(part)
                size += len(part)
                if size > bytes_cap:
                    raise _too_large(bytes_cap)
    except TimeoutError as error:
        raise Failure(408, f"the body did not come within {timeout_s:g} s", code="timeout") from error
    return b"".join(parts)


def _too_large(bytes_cap: int) -> Failure:
    return Failure(
        413,
        f"the request is larger than {bytes_cap} bytes",
        hint="send less at once; [gateway] body_bytes_cap sets the limit",
        code="request_too_large",
    )
