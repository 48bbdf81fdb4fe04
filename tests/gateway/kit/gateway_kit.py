"""A gateway process of the real kind between scripted language servers and a control socket in the daemon's place."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web
from scripted_server import ScriptedServer, serve

from millhand.control import ControlServer
from millhand.errors import InputError, ModelError
from millhand.metrics import PAGES
from millhand.serving.front import FrontProcess, gateway_front
from millhand.serving.front_metrics import FrontMetrics
from millhand.serving.openai.settings import GatewaySettings
from millhand.serving.openai.tokens import hashed

ABILITIES = ("chat", "completions", "embeddings", "json_schema", "tools", "logprobs", "seed", "stop", "usage")
AGENT_TOKEN = "the-agent-s-own"
MODEL = "scripted"


def until(condition: Callable[[], Any], what: str = "the condition", timeout_s: float = 60.0) -> Any:
    """Wait for a condition with a deadline."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true in time")


class Daemon:
    """What a gateway asks of a daemon: where models are, and to take its metrics."""

    def __init__(self, path: Path) -> None:
        self.models: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._fronts = FrontMetrics()
        self.control = ControlServer(
            path,
            {
                "language.routes": self.routes,
                "knowledge.embed": self.embed,
                "metrics": self.metrics,
                "metrics.report": self.report,
            },
        )

    def tell(self, models: list[dict[str, Any]]) -> None:
        self.models = models
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            changed = self._changed
            yield {"models": self.models}
            await changed.wait()

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        if model != "minilm":
            raise ModelError(f"model '{model}' is not served")
        return [[len(text), 0.5] for text in texts]

    async def metrics(self, names: str = "", front: dict[str, Any] | None = None) -> str:
        if names not in PAGES:
            raise InputError(f"names = '{names}' is not known")
        if front is not None:
            self._fronts.take(front)
        return self._fronts.render(names)

    async def report(self, front: dict[str, Any]) -> None:
        self._fronts.take(front)


class Site:
    """A gateway with all that stands around it, in a thread with an event loop of its own."""

    def __init__(self, folder: Path, servers: int = 1, plugins: dict[str, Any] | None = None, **settings: Any) -> None:
        self.folder = folder
        self.settings = GatewaySettings(port=0, processes=1, **settings)
        self._plugins = plugins or {}
        self._count = servers
        self._run_dir = tempfile.TemporaryDirectory(prefix="mhg-", dir="/tmp")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.servers: list[ScriptedServer] = []
        self._runners: list[web.ServerRunner] = []
        self.urls: list[str] = []
        self.daemon: Daemon
        self.front: FrontProcess
        self.url = ""
        self._client = httpx.Client(timeout=60, trust_env=False)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the site's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(90)

    def start(self) -> Site:
        self._thread.start()
        self.do(self._start())
        return self

    def stop(self) -> None:
        self._client.close()
        self.do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._run_dir.cleanup()

    async def _start(self) -> None:
        for _ in range(self._count):
            server, runner, url = await serve()
            self.servers.append(server)
            self._runners.append(runner)
            self.urls.append(url)
        control = Path(self._run_dir.name) / "c.sock"
        self.daemon = Daemon(control)
        self.daemon.tell([self.model()])
        await self.daemon.control.start()
        self.front = gateway_front(
            self.settings, control, self.folder, agent_sha256=hashed(AGENT_TOKEN), plugins=self._plugins
        )
        await self.front.start()
        self.url = f"http://127.0.0.1:{self.front.port}"

    async def _stop(self) -> None:
        await self.front.stop()
        await self.daemon.control.stop()
        for runner in self._runners:
            await runner.cleanup()

    def model(self, **changes: Any) -> dict[str, Any]:
        """What the daemon tells of the model."""
        return {
            "name": MODEL, "state": "ready", "reason": "", "hint": "", "server": "scripted", "urls": self.urls,
            "abilities": ABILITIES, "context_tokens": 4096, "slots": 4, "reasoning": False, "embeddings": False,
            "parameters": 0, **changes,
        }  # fmt: skip

    @contextmanager
    def told(self, **changes: Any) -> Iterator[None]:
        """The daemon tells something else of the model for a while."""
        self._tell([self.model(**changes)])
        try:
            yield
        finally:
            self._tell([self.model()])

    def _tell(self, models: list[dict[str, Any]]) -> None:
        """Return once the gateway goes by it. It lists little of what it is told, so a model more comes and goes."""
        for told in ([*models, self.model(name="fence")], models):
            self._loop.call_soon_threadsafe(self.daemon.tell, told)
            until(partial(self._lists, [model["name"] for model in told]), "the gateway hears of it")

    def _lists(self, names: list[str]) -> bool:
        return [model["id"] for model in self.get("/v1/models").json()["data"]] == names

    @property
    def server(self) -> ScriptedServer:
        return self.servers[0]

    # ---- asking -----------------------------------------------------------------------------------------------------

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._client.get(f"{self.url}{path}", **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self._client.post(f"{self.url}{path}", **options)

    def chat(self, script: Any = "hello", **fields: Any) -> httpx.Response:
        """Ask in a chat; a script that is no text is sent as JSON."""
        headers = fields.pop("headers", {})
        return self.post("/v1/chat/completions", asked(script, **fields), headers=headers)

    def events(self, script: Any = "hello", **fields: Any) -> list[Any]:
        """Ask for a stream; returns its events, decoded."""
        answer = self.chat(script, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        return events_of(answer.text)

    def sample(self, name: str, **labels: str) -> float:
        """A value of the gateway's metrics; 0 where there is none."""
        for line in self.get("/metrics").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{label}="{text}"' in key for label, text in labels.items()):
                return float(value)
        return 0.0


def asked(script: Any, **fields: Any) -> dict[str, Any]:
    """A chat's body."""
    text = script if isinstance(script, str) else json.dumps(script)
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def events_of(text: str) -> list[Any]:
    """The events of a stream; `[DONE]` stays a text."""
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def said(events: list[Any], field: str = "content") -> str:
    """The text that a stream's deltas make."""
    choices = [choice for event in events if isinstance(event, dict) for choice in event.get("choices", [])]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """An answer's error, in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
