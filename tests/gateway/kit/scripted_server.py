"""A language server that does what the last message asks of it, as JSON: speak, wait, hang, lie, die. Not a model.

A script's keys: `tokens` (texts to send, or how many, of so many `characters`), `every_s` (pause between them),
`first_s` (pause before the first), `field` (of the delta), `stop_after` (tokens after which it dies or hangs), `ending`
(`die`, `hang`, `garbage`, `error`), `status` and `error` (an answer that is none), `finish`, `raw` (a whole answer),
`calls` (of tools).

Run as `python scripted_server.py PORT` it serves alone, for benchmarks.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from aiohttp import web

DEFAULT: dict[str, Any] = {"tokens": ["All", " is", " well", "."]}


class ScriptedServer:
    """Counts what it sees."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.open = 0
        """Answers that are under way."""
        self.left = 0
        """Answers whose client left before their end."""
        self.always: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        """Makes the script of every body, where messages hold none."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if request.path == "/state":
            return web.json_response({"open": self.open, "left": self.left, "requests": len(self.bodies)})
        raw = await request.read()
        body = json.loads(raw)
        self.raw.append(raw)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.open += 1
        try:
            if request.path == "/v1/embeddings":
                return web.json_response(_embedded(body))
            script = {**DEFAULT, **self.always(body)} if self.always else _script(body)
            return await self._answer(request, body, script)
        except asyncio.CancelledError:
            self.left += 1
            raise
        except ConnectionResetError:
            self.left += 1
            raise
        finally:
            self.open -= 1

    async def _answer(self, request: web.BaseRequest, body: dict[str, Any], script: dict[str, Any]) -> Any:
        if "status" in script:
            return web.json_response({"error": script.get("error", {"message": "no"})}, status=script["status"])
        tokens = script["tokens"]
        if isinstance(tokens, int):
            tokens = [f" w{number}".ljust(script.get("characters", 0), "x") for number in range(tokens)]
        if script.get("ending") == "die" and not script.get("stop_after"):
            request.transport.abort()
            await asyncio.sleep(10)
        if not body.get("stream"):
            await asyncio.sleep(script.get("first_s", 0))
            return web.json_response(_whole(body, script, tokens))
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await asyncio.sleep(script.get("first_s", 0))
        chat = "messages" in body
        await answer.write(_event(body, {"role": "assistant", "content": ""}) if chat else b": begin\n\n")
        every_s = script.get("every_s", 0)
        start_s = asyncio.get_running_loop().time()
        if "calls" in script:
            tokens = []
            for place, call in enumerate(script["calls"]):
                await _send_call(answer, body, place, call)
        for number, token in enumerate(tokens):
            if number == script.get("stop_after"):
                await _end_badly(request, answer, script["ending"])
            await answer.write(_event(body, {script.get("field", "content"): token} if chat else token))
            if every_s:  # by the clock, as a server that decodes in steps
                wait_s = start_s + (number + 1) * every_s - asyncio.get_running_loop().time()
                await asyncio.sleep(max(wait_s, 0))
        await answer.write(_event(body, {} if chat else "", script.get("finish", "stop")))
        if (body.get("stream_options") or {}).get("include_usage"):
            await answer.write(_data({**_head(body), "choices": [], "usage": _usage(tokens)}))
        await answer.write(b"data: [DONE]\n\n")
        await answer.write_eof()
        return answer


async def _send_call(answer: web.StreamResponse, body: dict[str, Any], place: int, call: dict[str, Any]) -> None:
    """A call of a tool in pieces, as servers stream them."""
    function = call["function"]
    first = {**call, "index": place, "function": {"name": function["name"], "arguments": ""}}
    await answer.write(_event(body, {"tool_calls": [first]}))
    for letter in function["arguments"]:
        await answer.write(_event(body, {"tool_calls": [{"index": place, "function": {"arguments": letter}}]}))


async def _end_badly(request: web.BaseRequest, answer: web.StreamResponse, ending: str) -> None:
    if ending == "garbage":
        await answer.write(b"data: {not json\n\n")
    elif ending == "error":
        await answer.write(b'data: {"error": {"code": 500, "message": "out of memory", "type": "server_error"}}\n\n')
    elif ending == "die":
        await asyncio.sleep(0.05)
        request.transport.abort()
    await asyncio.sleep(600)


def _script(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    text = text.rpartition("\n\n")[2] if isinstance(text, str) else ""
    try:
        return {**DEFAULT, **json.loads(text)} if text.startswith("{") else DEFAULT
    except ValueError:
        return DEFAULT


def _head(body: dict[str, Any]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if "messages" in body else "text_completion"
    return {"id": "x-1", "object": kind, "created": 1, "model": body["model"]}


def _usage(tokens: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": len(tokens), "total_tokens": 7 + len(tokens)}


def _event(body: dict[str, Any], said: Any, finish: str | None = None) -> bytes:
    texts = {"delta": said} if "messages" in body else {"text": said}
    return _data({**_head(body), "choices": [{"index": 0, **texts, "finish_reason": finish}]})


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def _whole(body: dict[str, Any], script: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    text = script.get("raw", "".join(tokens))
    said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    if "calls" in script:
        said["message"] = {"role": "assistant", "content": None, "tool_calls": script["calls"]}
    choice = {"index": 0, **said, "finish_reason": script.get("finish", "stop")}
    return {**_head(body), "object": "chat.completion", "choices": [choice], "usage": _usage(tokens)}


def _embedded(body: dict[str, Any]) -> dict[str, Any]:
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    rows = [
        {"object": "embedding", "index": place, "embedding": [float(len(text)), 1.0]}
        for place, text in enumerate(texts)
    ]
    return {"object": "list", "data": rows, "model": body["model"], "usage": {"prompt_tokens": 3, "total_tokens": 3}}


async def serve(port: int = 0) -> tuple[ScriptedServer, web.ServerRunner, str]:
    """Start one; returns it, what ends it, and its URL."""
    scripted = ScriptedServer()
    runner = web.ServerRunner(web.Server(scripted.handle, handler_cancellation=True, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    return scripted, runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _alone(port: int) -> None:
    _, _, url = await serve(port)
    print(url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_alone(int(sys.argv[1])))
