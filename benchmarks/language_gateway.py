"""What the gateway costs: the same streams straight to a server and through the gateway, in alternating pairs.

Two servers: one without a model that decodes in steps (step_server.py; a step takes as long as one of a 1.5B model on
an H100), and the real SmolLM2-135M in llama.cpp's server (needs xllamacpp and `--gguf FILE`). Client, gateway and
server are processes of their own on one machine and share its CPUs. The gateway runs the plugins that `--guards` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from figures import Figure, parser, progress, report

from millhand.control import ControlServer
from millhand.serving.front import FrontProcess, gateway_front
from millhand.serving.openai.settings import GatewaySettings

HERE = Path(__file__).parent
MODEL = "measured"
STEPS_MS = {1: 2.3, 8: 2.6, 128: 8.4}
"""Streams -> time of a step: vLLM 0.23, 1.5B in fp16 on one H100, over HTTP (128 streams: 15,205 tokens/s)."""
ABORTS = 1000
ABORTS_AT_ONCE = 50
PROMPT = "Say in one sentence why the bearing on the drive side of pump 7 runs warm."
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
LLAMA = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_parallel, p.n_ctx, p.warmup = sys.argv[1], 4, 4 * 2048, True
p.endpoint_metrics = p.endpoint_slots = True
p.hostnames, p.port = ["127.0.0.1"], int(sys.argv[2])
for name in ("cpuparams", "cpuparams_batch"):
    getattr(p, name).n_threads = int(sys.argv[3])
s = x.Server(p)
print(f"http://127.0.0.1:{p.port}", flush=True)
time.sleep(1e6)
"""


@dataclass
class Stream:
    """One streamed answer, as a client saw it."""

    first_s: float
    token_s: float
    """Mean time from token to token."""
    tokens: int


class Client:
    """Asks for streams, through one or the other."""

    def __init__(self, session: aiohttp.ClientSession, tokens: int) -> None:
        self._session = session
        self._tokens = tokens

    async def stream(self, url: str, number: int = 0, cut: bool = False) -> Stream:
        """One answer; with `cut` left after its first piece."""
        asked = {
            "model": MODEL, "stream": True, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True,
            "messages": [{"role": "user", "content": f"{PROMPT} ({number})"}],
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        begun_s = time.perf_counter()
        first_s = last_s = 0.0
        tail = b""
        async with self._session.post(f"{url}/v1/chat/completions", json=asked) as answer:
            assert answer.status == 200, await answer.text()
            async for data in answer.content.iter_any():
                if data.count(b'"content":"') > data.count(b'"content":""'):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    if cut:
                        answer.close()
                        break
                tail = tail[-1000:] + data
        # The server's count: a guard may let several tokens through in one piece.
        counted = COMPLETION_TOKENS.search(tail)
        tokens = int(counted[1]) if counted else 0
        assert cut or tokens, tail
        spent_s = (last_s - first_s) / max(tokens - 1, 1)
        return Stream(first_s - begun_s, spent_s, tokens)

    async def throughput(self, url: str, streams: int, rounds: int) -> float:
        """Tokens a second of so many streams at once, each asking anew as soon as it was answered."""

        async def one(number: int) -> int:
            return sum([(await self.stream(url, 1000 * number + turn)).tokens for turn in range(rounds)])

        begun_s = time.perf_counter()
        counts = await asyncio.gather(*map(one, range(streams)))
        wanted = streams * rounds * self._tokens
        assert sum(counts) >= 0.9 * wanted, f"{sum(counts)} of {wanted} tokens came"
        return sum(counts) / (time.perf_counter() - begun_s)


class Daemon:
    """The part of the daemon that a gateway needs."""

    def __init__(self, path: Path, url: str) -> None:
        self._url = url
        self.report: dict[str, Any] = {}
        self.control = ControlServer(path, {"language.routes": self._routes, "metrics.report": self._report})

    async def _routes(self) -> AsyncIterator[dict[str, Any]]:
        abilities = ["chat", "completions", "json_schema", "seed", "stop", "usage"]
        yield {"models": [{"name": MODEL, "urls": [self._url], "abilities": abilities, "context_tokens": 2048}]}
        await asyncio.Event().wait()

    async def _report(self, front: dict[str, Any]) -> None:
        self.report = {family["name"]: family["values"] for family in front["families"]}


@contextlib.asynccontextmanager
async def gateway(url: str, guards: list[str]) -> AsyncIterator[tuple[FrontProcess, Daemon, str]]:
    """A gateway before the server at `url`."""
    with tempfile.TemporaryDirectory(prefix="mhb-", dir="/tmp") as folder:
        daemon = Daemon(Path(folder) / "c.sock", url)
        await daemon.control.start()
        settings = GatewaySettings(port=0)
        front = gateway_front(settings, Path(folder) / "c.sock", Path(folder), plugins={name: {} for name in guards})
        await front.start()
        try:
            yield front, daemon, f"http://127.0.0.1:{front.port}"
        finally:
            await front.stop()
            await daemon.control.stop()


@contextlib.contextmanager
def server(*command: str) -> Any:
    """A language server in a process of its own; gives its URL."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def pairs(
    client: Client, alone: str, through: str, streams: int, rounds: int, repeats: int
) -> list[tuple[float, float]]:
    """Throughput of both, alternating; which one begins alternates too."""
    found = []
    for repeat in range(repeats):
        order = (alone, through) if repeat % 2 == 0 else (through, alone)
        values = {url: await client.throughput(url, streams, rounds) for url in order}
        found.append((values[alone], values[through]))
    return found


async def single(client: Client, alone: str, through: str, repeats: int) -> tuple[list[float], list[float]]:
    """Differences of the time to the first token and of the time a token, ms, of neighbouring pairs of one stream."""
    first, token = [], []
    for repeat in range(repeats):
        order = (alone, through) if repeat % 2 == 0 else (through, alone)
        seen = {url: await client.stream(url, repeat) for url in order}
        first.append(1000 * (seen[through].first_s - seen[alone].first_s))
        token.append(1000 * (seen[through].token_s - seen[alone].token_s))
    return first, token


async def abort(client: Client, url: str) -> None:
    """Streams that are left after their first piece."""
    for batch in range(0, ABORTS, ABORTS_AT_ONCE):
        await asyncio.gather(*(client.stream(url, batch + number, cut=True) for number in range(ABORTS_AT_ONCE)))


async def settled(count: Any, start: Any) -> Any:
    """What `count` says once it is as at the start, or after 20 s."""
    end = time.monotonic() + 20
    while (now := await count()) != start and time.monotonic() < end:  # noqa: ASYNC110 - another process counts
        await asyncio.sleep(0.1)
    return now


def connections(front: FrontProcess) -> int:
    """Connections that the gateway holds with clients and servers."""
    found = [one for pid in front.pids for one in psutil.Process(pid).net_connections("tcp")]
    return sum(one.status == "ESTABLISHED" for one in found)


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        return json.loads(await answer.text())


def _share(what: str, streams: int, found: list[tuple[float, float]]) -> Figure:
    """Throughput through the gateway over throughput without: the median over the pairs."""
    share = statistics.median(through / alone for alone, through in found)
    alone = statistics.median(pair[0] for pair in found)
    return Figure(f"{what}, {streams} streams: throughput, share", share, "", ">= 0.95", f"{alone:.1f} tokens/s alone")


async def steps(guards: list[str], repeats: int) -> list[Figure]:
    """Figures before the server without a model."""
    figures = []
    for streams, step_ms in STEPS_MS.items():
        progress(f"{streams} streams, a step every {step_ms} ms")
        with server(str(HERE / "step_server.py"), str(step_ms)) as alone:
            async with gateway(alone, guards) as (_, _, through), aiohttp.ClientSession(connector=_many()) as session:
                client = Client(session, 128)
                await ready(client, through)
                await client.throughput(through, streams, 1)
                found = await pairs(client, alone, through, streams, 4 if streams < 128 else 2, repeats)
                figures.append(_share("steps", streams, found))
                if streams == 1:
                    first, token = await single(client, alone, through, 10 * repeats)
                    figures += _single("steps", first, token)
                if streams == 128:
                    figures += await aborted_steps(guards, alone, session)
    return figures


async def aborted_steps(guards: list[str], alone: str, session: aiohttp.ClientSession) -> list[Figure]:
    """What is left after many streams whose clients left."""
    async with gateway(alone, guards) as (front, daemon, through):
        client = Client(session, 2000)
        await ready(client, through)

        async def left() -> tuple[int, int]:
            return (await get(session, f"{alone}/state"))["open"], _running(daemon)

        before = connections(front)
        await abort(client, through)
        assert daemon.report, "the gateway has not reported"
        streams, running = await settled(left, (0, 0))
        await asyncio.sleep(1)
        grown = connections(front) - before
    return [
        Figure("steps, 1000 aborted streams: open at the server after", streams, "", "== 0"),
        Figure("steps, 1000 aborted streams: counted as running after", running, "", "== 0"),
        Figure("steps, 1000 aborted streams: connections more than before", max(grown, 0), "", "<= 0"),
    ]


async def llama(gguf: str, guards: list[str], repeats: int, threads: int) -> list[Figure]:
    """Figures before the real model in llama.cpp's server."""
    figures = []
    with tempfile.NamedTemporaryFile("w", suffix="_llama.py") as script:
        script.write(LLAMA)
        script.flush()
        with server(script.name, gguf, str(free_port()), str(threads)) as alone:
            async with (
                gateway(alone, guards) as (_, _, through),
                aiohttp.ClientSession(connector=_many()) as session,
            ):
                client = Client(session, 64)
                await ready(client, through)
                for streams in (1, 4):
                    progress(f"llama.cpp, {streams} streams")
                    found = await pairs(client, alone, through, streams, 2, repeats)
                    figures.append(_share("SmolLM2", streams, found))
                first, token = await single(client, alone, through, 2 * repeats)
                figures += _single("SmolLM2", first, token)
                progress(f"llama.cpp, {ABORTS} aborted streams")
                before = await _llama_state(session, alone)
                await abort(client, through)

                async def left() -> tuple[int, float]:
                    return await _llama_state(session, alone)

                after = await settled(left, before)
                figures += [
                    Figure("SmolLM2, 1000 aborted streams: slots busy after", after[0], "", "== 0"),
                    Figure("SmolLM2, 1000 aborted streams: requests deferred after", after[1], "", "== 0"),
                ]
    return figures


async def _llama_state(session: aiohttp.ClientSession, url: str) -> tuple[int, float]:
    """Slots that are busy, and requests that wait in llama.cpp's server."""
    busy = sum(slot["is_processing"] for slot in await get(session, f"{url}/slots"))
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return busy, sum(float(line.split()[-1]) for line in lines if line.startswith("llamacpp:requests_deferred"))


def _running(daemon: Daemon) -> int:
    """What the gateway last reported as running, waiting."""
    names = ("millhand_language_requests_running", "millhand_language_requests_waiting")
    return int(sum(value for name in names for _, value in daemon.report.get(name, [])))


def _single(what: str, first: list[float], token: list[float]) -> list[Figure]:
    return [
        Figure(f"{what}, 1 stream: time to first token, more", statistics.median(first), "ms", "<= 5"),
        Figure(f"{what}, 1 stream: time a token, more", statistics.median(token), "ms", "<= 0.3"),
    ]


def _many() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp's server closes after a stream anyway


async def ready(client: Client, url: str) -> None:
    """Wait until the gateway answers."""
    end = time.monotonic() + 60
    while True:
        try:
            await client.stream(url, cut=True)
            return
        except (aiohttp.ClientError, AssertionError):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


async def measure(arguments: Any) -> list[Figure]:
    figures = await steps(arguments.guards, arguments.repeats) if not arguments.llama_only else []
    if arguments.gguf:
        figures += await llama(arguments.gguf, arguments.guards, arguments.repeats, arguments.threads)
    return figures


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--gguf", default="", help="SmolLM2 as a GGUF file")
    options.add_argument("--guards", nargs="*", default=["guard"], help="plugins that bring guards")
    options.add_argument("--repeats", type=int, default=5, help="alternating pairs")
    options.add_argument("--threads", type=int, default=2, help="threads of llama.cpp")
    options.add_argument("--llama-only", action="store_true")
    arguments = options.parse_args()
    figures = uvloop.run(measure(arguments))
    cpus = len(os.sched_getaffinity(0))
    return report("language_gateway", figures, guards=arguments.guards, cpus=cpus, llama_threads=arguments.threads)


if __name__ == "__main__":
    sys.exit(main())
