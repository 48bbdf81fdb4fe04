"""How another process than the daemon reaches the workers."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millhand.control import FRAME
from millhand.errors import WorkerError
from millhand.serving.routing import Routes
from millhand.testing import wait_until


def told(sockets: dict[str, list[str]]) -> bytes:
    """A frame of the daemon's stream `model.routes`."""
    model: dict[str, Any] = {"state": "ready" if sockets else "restarting", "reason": "", "sockets": sockets}
    body = json.dumps({"item": {"generation": 1, "models": {"first": model}, "deadline_ms": 2000}}).encode()
    return FRAME.pack(len(body)) + body


async def test_a_request_that_waits_for_a_worker_which_dies_is_told_to_come_again(tmp_path: Path) -> None:
    worker = socket.socket(socket.AF_UNIX)  # it accepts, and never says hello
    worker.bind(str(tmp_path / "worker.sock"))
    worker.listen()
    worker.setblocking(False)
    died, gone = asyncio.Event(), asyncio.Event()

    async def daemon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(told({"1": [str(tmp_path / "worker.sock")]}))
        await died.wait()
        writer.write(told({}))
        await writer.drain()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set()

    server = await asyncio.start_unix_server(daemon, tmp_path / "control.sock")
    routes = Routes(tmp_path / "control.sock")
    follower = asyncio.create_task(routes.follow())
    async with asyncio.timeout(30):
        await asyncio.to_thread(wait_until, lambda: routes.known, "the daemon's word")
        x = {"x": np.zeros((1, 1), np.float32)}
        request = asyncio.create_task(routes.infer("first", "", x, deadline_ms=None, priority=0, wanted=()))
        connected, _ = await asyncio.get_running_loop().sock_accept(worker)
        died.set()
        with pytest.raises(WorkerError) as raised:
            await request
        assert raised.value.retriable
        follower.cancel()
        await gone.wait()
    routes.close()
    server.close()
    connected.close()
    worker.close()
