"""A language server without a model that decodes in steps, as vLLM and llama.cpp do: at each step every open stream
gets its next token. For what a gateway costs, apart from a model. `python step_server.py STEP_MS`; 0 never waits.

It prints its URL. `GET /state` says how many streams are open.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import uvloop
from aiohttp import web

WORDS = ("the", "bearing", "on", "the", "drive", "side", "runs", "warm", "and", "should", "be", "greased", "today")


class StepServer:
    """Streams that move in step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._stepped = asyncio.Event()
        self.open = 0

    async def run(self) -> None:
        """Step for ever, by the clock."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s = max(due_s + self._step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            stepped, self._stepped = self._stepped, asyncio.Event()
            stepped.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if request.path == "/state":
            return web.json_response({"open": self.open})
        asked = json.loads(await request.read())
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        self.open += 1
        try:
            for event in _events(asked):
                if self._step_s:
                    await self._stepped.wait()
                await answer.write(event)
        finally:
            self.open -= 1
        await answer.write_eof()
        return answer


def _events(asked: dict[str, Any]) -> Iterator[bytes]:
    tokens = asked.get("max_tokens", 64)
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": asked["model"]}

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        content = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
        return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"

    words = [event({"content": f" {word}"}) for word in WORDS]
    yield event({"role": "assistant", "content": ""}) + words[0]
    for number in range(1, tokens):
        yield words[number % len(words)]
    yield event({}, "length")
    if (asked.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
        yield b"data: " + json.dumps({**head, "choices": [], "usage": usage}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


async def serve(step_s: float) -> None:
    server = StepServer(step_s)
    runner = web.ServerRunner(web.Server(server.handle, handler_cancellation=True, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    if step_s:
        await server.run()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]) / 1000))
