"""Chat as load: to a language server straight or through gateways of millhand's own before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from figures import progress

from millhand.control import ControlServer
from millhand.serving.front import gateway_front
from millhand.serving.openai.settings import GatewaySettings

STREAMS = Path(__file__).with_name("streams.py")
STREAMS_CAP = 512
"""Of each process of a gateway: the kernel spreads connections over them as it likes."""
UP_S = 60.0
LOAD_GRACE_S = 60.0
ABILITIES = ["chat", "completions", "usage", "stop", "seed", "logprobs", "json_schema"]


class Daemon:
    """What a gateway asks of a daemon: where the model is. route: as `language.routes` tells of one model."""

    def __init__(self, path: Path, route: dict[str, Any]) -> None:
        self._route = route
        handlers: dict[str, Any] = {"language.routes": self.routes, "metrics.report": self.report}
        self.control = ControlServer(path, handlers)

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        yield {"models": [self._route]}
        await asyncio.Event().wait()

    async def report(self, front: dict[str, Any]) -> None:
        """Metrics are not looked at here."""


@contextlib.asynccontextmanager
async def gateway(route: dict[str, Any], processes: int, guards: bool = True) -> AsyncIterator[str]:
    """A gateway before the servers of `route`, with the plugin `guard` as it is shipped; gives its URL."""
    with tempfile.TemporaryDirectory(prefix="mhg-") as name:
        folder = Path(name)
        daemon = Daemon(folder / "control.sock", route)
        await daemon.control.start()
        settings = GatewaySettings(port=0, processes=processes, streams_cap=STREAMS_CAP, queue=STREAMS_CAP)
        front = gateway_front(settings, folder / "control.sock", folder, plugins={"guard": {}} if guards else {})
        await front.start()
        try:
            await await_up(f"http://127.0.0.1:{front.port}")
            yield f"http://127.0.0.1:{front.port}"
        finally:
            await front.stop()
            await daemon.control.stop()


async def await_up(url: str) -> None:
    """Until it says that it is well. Raises TimeoutError."""
    async with asyncio.timeout(UP_S):
        while not await asyncio.to_thread(_is_up, url):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def _is_up(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


async def load(
    url: str,
    model: str,
    streams: int,
    seconds: float,
    seed: int,
    *,
    temperature: float = 1.0,
    clients: int = 1,
    key: str = "",
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the load from so many processes, and put together what they saw; it is ended a minute after its time.

    key: what the server wants to be shown. words: further arguments of streams.py.
    """
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, str(STREAMS), url, model, str(part), str(seconds), str(seed * 100 + number),
            "--temperature", str(temperature), *words,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "STREAMS_KEY": key},
        )
        for number, part in enumerate(_shares(streams, clients))
    ]  # fmt: skip
    try:
        async with asyncio.timeout(seconds + LOAD_GRACE_S):
            told = await asyncio.gather(*(process.communicate() for process in processes))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
    return together([json.loads(out) for out, _ in told if out])


def together(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes of a load. Raises ValueError where no answer came."""
    errors = [error for one in seen for error in one["errors"]]
    if errors:
        progress(f"{len(errors)} errors, such as {errors[0]}")
    if not any(one["answers"] for one in seen):
        raise ValueError(f"no answer came; errors: {errors[:3]}")
    token_ms = [value for one in seen for value in one["token_ms"]]
    return {
        "tokens_per_s": _rate(seen),
        "first_ms": statistics.median(value for one in seen for value in one["first_ms"]),
        "token_ms": statistics.median(token_ms) if token_ms else None,
        "answers": sum(one["answers"] for one in seen),
        "errors": len(errors),
        "error": errors[0] if errors else "",
    }


def _rate(seen: list[dict[str, Any]]) -> float:
    """Tokens a second while all processes asked: what comes before and after says nothing of so many streams.

    Raises ValueError where they never did.
    """
    begin, end = max(one["began_s"] for one in seen), min(one["until_s"] for one in seen)
    if begin >= end:
        raise ValueError(f"the last process of the load began {begin - end:.1f} s after the first had ended")
    tokens = 0.0
    for first, last, count in (span for one in seen for span in one["spans"]):
        inside = max(0.0, min(last, end) - max(first, begin))
        tokens += count * inside / (last - first) if last > first else count * (begin <= first <= end)
    return tokens / (end - begin)


def _shares(streams: int, clients: int) -> list[int]:
    """Streams of each client."""
    count = min(streams, clients)
    return [streams // count + (number < streams % count) for number in range(count)]
