"""The agent on the real rig over Modbus TCP: what crosses the wire, what arrives, and a machine that goes away."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from live_kit import HTTP_OFF, Site, check, cli, drained, state_of

from millhand.demo.tally import count, read_rig_log
from millhand.testing import Agent, wait_until

READ_FUNCTIONS = {1, 2, 3, 4}


class Rig:
    """The rig as a process; it writes a log of every answer that it gave."""

    def __init__(self, log_path: Path, port: int = 0) -> None:
        self.log_path = log_path
        command = [sys.executable, "-m", "millhand_plugins.rig", "--port", str(port)]
        self._process = subprocess.Popen([*command, "--log", str(log_path)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["port"])

    def end(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(60)
            assert self._process.stdout is not None
            self._process.stdout.close()


class RecordingProxy:
    """Forwards one TCP port to another and keeps every byte that a client sent, by connection."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self.sent.append(bytearray())
            self._sockets += [client, server]
            for source, sink, kept in ((client, server, self.sent[-1]), (server, client, None)):
                thread = threading.Thread(target=_pump, args=(source, sink, kept), daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(30)  # from here on nothing is added
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):  # the other side was quicker
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(30)

    def functions(self) -> list[int]:
        """The function code of every request. Fails on a byte that belongs to no Modbus frame."""
        found = []
        for stream in self.sent:
            place = 0
            while place < len(stream):
                _, protocol, length, _, function = struct.unpack_from(">HHHBB", stream, place)
                assert protocol == 0
                found.append(function)
                place += 6 + length
            assert place == len(stream)
        return found


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
    try:
        while data := source.recv(65536):
            if kept is not None:
                kept += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return  # one of both is gone


@pytest.fixture
def ends() -> Iterator[list[Callable[[], None]]]:
    """What is called at the end, the last first."""
    calls: list[Callable[[], None]] = []
    yield calls
    for call in reversed(calls):
        call()


def modbus_asset(port: int, models: bool = True) -> str:
    """The skid behind this port, with the register map that the rig's plugin ships."""
    lines = (files("millhand_plugins.rig") / "modbus_map.toml").read_text(encoding="utf-8").splitlines()
    rest = "\n".join(line for line in lines if not line.startswith(("[assets.options]", "host", "port")))
    return f"""
[plugins.rig]
[[assets]]
name = "skid"
adapter = "modbus"
models = {["rig-fault"] if models else []}
silence_s = 5.0
[assets.options]
host = "127.0.0.1"
port = {port}
{rest}
"""


def test_only_reads_cross_the_wire_and_every_answer_arrives(
    tmp_path: Path, site: Site, ends: list[Callable[[], None]], millhand_agent: Callable[..., Agent]
) -> None:
    rig = Rig(tmp_path / "rig.jsonl")
    ends.append(lambda: rig.end(signal.SIGTERM))
    proxy = RecordingProxy(rig.port)
    ends.append(proxy.close)
    agent = millhand_agent(HTTP_OFF + site.telemetry + modbus_asset(proxy.port))
    agent.wait(lambda: state_of(agent, "skid")["counters"]["predictions"] >= 5, "judged snapshots", 60)
    agent.wait(lambda: state_of(agent, "skid")["counters"]["batches"] >= 200, "polls and snapshots", 60)
    # First the rig, so that no answer is on its way; then what the agent still holds.
    rig.end(signal.SIGTERM)
    agent.wait(lambda: state_of(agent, "skid")["state"] == "failing", "the agent noticing")
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    agent.stop()

    functions = proxy.functions()
    assert len(functions) > 100
    assert set(functions) <= READ_FUNCTIONS
    arrived = [int(value) for value in site.readings("skid") if value is not None]
    tally = count(read_rig_log(rig.log_path).served, arrived)
    assert (tally.lost, tally.duplicates, tally.strange) == (0, 0, 0)
    assert tally.produced >= 100
    (row,) = site.query("SELECT count(*) AS predictions FROM predictions WHERE asset = 'skid'")
    assert row["predictions"] >= 5


def test_a_machine_that_goes_away_is_shown_and_comes_back(
    tmp_path: Path, site: Site, ends: list[Callable[[], None]], millhand_agent: Callable[..., Agent]
) -> None:
    first = Rig(tmp_path / "first.jsonl")
    ends.append(lambda: first.end(signal.SIGKILL))
    agent = millhand_agent(HTTP_OFF + site.telemetry + modbus_asset(first.port, models=False))
    agent.wait(lambda: state_of(agent, "skid")["counters"]["batches"] >= 10, "batches")
    first.end(signal.SIGKILL)
    status = agent.wait(
        lambda: state_of(agent, "skid")["state"] == "failing" and state_of(agent, "skid"), "the asset failing"
    )
    assert f"127.0.0.1:{first.port}" in status["error"]
    assert status["hint"]
    code, findings = check(agent)
    assert code == 4
    assert findings["asset skid"]["level"] == "error"
    assert "1 failing" in cli(agent).stdout
    assert "Next step  millhand check" in cli(agent).stdout

    before = state_of(agent, "skid")["counters"]["batches"]
    second = Rig(tmp_path / "second.jsonl", port=first.port)
    ends.append(lambda: second.end(signal.SIGTERM))
    agent.wait(lambda: state_of(agent, "skid")["state"] == "running", "the asset's return", 45)
    agent.wait(lambda: state_of(agent, "skid")["counters"]["batches"] >= before + 10, "batches")
    assert state_of(agent, "skid")["error"] == ""
    second.end(signal.SIGTERM)
    served = read_rig_log(second.log_path).served
    wait_until(lambda: set(served) <= set(site.readings("skid")), "every answer at the hub", 30)


def test_a_machine_that_is_not_there_at_the_start(
    tmp_path: Path, ends: list[Callable[[], None]], millhand_agent: Callable[..., Agent]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = int(placeholder.getsockname()[1])
    agent = millhand_agent(HTTP_OFF + modbus_asset(port, models=False))
    status = agent.wait(lambda: state_of(agent, "skid")["error"] and state_of(agent, "skid"), "the error")
    assert (status["state"], f"127.0.0.1:{port}" in status["error"]) == ("failing", True)
    rig = Rig(tmp_path / "rig.jsonl", port=port)
    ends.append(lambda: rig.end(signal.SIGTERM))
    agent.wait(lambda: state_of(agent, "skid")["state"] == "running", "the asset", 45)
