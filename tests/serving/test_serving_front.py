"""Front processes of the real kind: restarts, the shared port, and how they end."""

from __future__ import annotations

import os
import signal
import socket

import httpx
import psutil
import pytest
from serving_kit import identity, until, write_model

from millhand.control import ControlServer
from millhand.errors import ConfigError
from millhand.serving import front
from millhand.serving.front import FrontProcess, http_front
from millhand.serving.settings import HttpSettings

REQUEST = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}


@pytest.fixture
async def control(root, make_pool, tmp_path):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    server = ControlServer(tmp_path / "c.sock", pool.control_handlers())
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def http(control, tmp_path):
    """(front, url) of two processes."""
    process = http_front(HttpSettings(port=0, processes=2), tmp_path / "c.sock")
    await process.start()
    yield process, f"http://127.0.0.1:{process.port}"
    await process.stop()


async def answers(url):
    """Whether one request on a connection of its own is answered."""
    async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
        try:
            return (await client.post(f"{url}/v2/models/same/infer", json=REQUEST)).status_code == 200
        except httpx.TransportError:
            return False


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_a_killed_process_comes_back_on_the_same_port(http):
    process, url = http
    await until(lambda: answers(url))
    killed, other = process.pids
    os.kill(killed, signal.SIGKILL)

    async def back():
        return process.restarts == 1 and len(process.pids) == 2 and await answers(url)

    await until(back)
    assert other in process.pids and killed not in process.pids


async def test_every_process_serves_the_port(http):
    process, url = http
    await until(lambda: answers(url))
    first, second = process.pids
    for stopped in (first, second):
        os.kill(stopped, signal.SIGSTOP)
        try:
            await until(lambda: answers(url))
        finally:
            os.kill(stopped, signal.SIGCONT)


async def test_stop_leaves_no_process(http):
    process, url = http
    await until(lambda: answers(url))
    pids = process.pids
    await process.stop()
    assert all(gone(pid) for pid in pids)
    assert process.pids == [] and process.restarts == 0


async def test_a_process_that_hears_no_sigterm_is_killed(http, monkeypatch):
    process, url = http
    await until(lambda: answers(url))
    monkeypatch.setattr(front, "STOP_GRACE_S", 0.2)
    pids = process.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await process.stop()
    assert all(gone(pid) for pid in pids)


async def test_processes_end_when_the_daemon_is_gone(http, control):
    process, url = http
    await until(lambda: answers(url))
    pids = process.pids
    for watch in process._watches:  # nobody starts them again, as after a kill -9 of the daemon
        watch.cancel()
    await control.stop()

    async def ended():
        return all(gone(pid) for pid in pids)

    await until(ended)


async def test_a_process_that_cannot_start_is_tried_again_more_slowly(tmp_path, monkeypatch):
    monkeypatch.setattr(front, "RESTART_DELAY_S", 0.01)
    process = FrontProcess("http", "millhand.no_such_module", HttpSettings(port=0, processes=1), {})
    await process.start()

    async def restarted():
        return process.restarts >= 2

    await until(restarted)
    await process.stop()


async def test_a_taken_port_is_an_error_with_a_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = http_front(HttpSettings(port=port), tmp_path / "c.sock")
        with pytest.raises(ConfigError, match=f"port = {port} cannot be bound: Address already in use") as caught:
            await process.start()
        assert "[http] port" in caught.value.hint
        await process.stop()


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)])
def test_processes_follow_the_cpus(monkeypatch, cpus, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert front.processes(0) == count
    assert front.processes(3) == 3
