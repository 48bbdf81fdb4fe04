"""The rig as a process behind a real socket: what it serves, what it refuses, what it logs, how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymodbus.client import ModbusTcpClient

from millhand.pipeline.windows import WindowBuilder
from millhand.serving.manifest import read_manifest
from millhand.testing import wait_until
from millhand_plugins.modbus.adapter import ModbusKind
from millhand_plugins.modbus.options import ModbusOptions
from millhand_plugins.rig import millhand_models
from millhand_plugins.rig.extractor import RigExtractor
from millhand_plugins.rig.operation import END_MS
from millhand_plugins.rig.registers import CHANNELS, PROCESS
from millhand_plugins.rig.server import RigLog, RigServer
from millhand_plugins.rig.simulator import Simulator


class Rig:
    """A running rig and its log."""

    def __init__(self, log_path: Path, *arguments: str) -> None:
        self.log_path = log_path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "millhand_plugins.rig", "--port", "0", "--log", str(log_path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.clients: list[ModbusTcpClient] = []
        self.ready = json.loads(self.process.stdout.readline())

    def client(self) -> ModbusTcpClient:
        client = ModbusTcpClient("127.0.0.1", port=self.ready["port"], timeout=5)
        assert client.connect()
        self.clients.append(client)
        return client

    def log(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def start(*arguments: str) -> Rig:
        rigs.append(Rig(tmp_path / f"rig-{len(rigs)}.jsonl", *arguments))
        return rigs[-1]

    yield start
    for rig in rigs:
        for client in rig.clients:
            client.close()
        rig.process.kill()
        rig.process.communicate()


def words(client: ModbusTcpClient, address: int, count: int, function: int = 4) -> list[int]:
    read = client.read_input_registers if function == 4 else client.read_holding_registers
    response = read(address, count=count, device_id=1)
    assert not response.isError(), response
    return response.registers


def test_values_are_those_of_the_simulator(start_rig):
    rig = start_rig("--seed", "5", "--fault", "imbalance", "--scale", "0.001")
    registers = words(rig.client(), 0, 12)
    time_ms = registers[2] << 16 | registers[3]
    expected = Simulator(5, "imbalance").process(time_ms)
    assert {field.name: registers[field.address] for field in PROCESS} == {
        field.name: expected[field.name] & 0xFFFF for field in PROCESS
    }
    assert registers[11] == expected["state"]


def test_the_life_waits_for_the_first_request(start_rig):
    rig = start_rig("--scale", "4", "--wait")
    client, begun = rig.client(), time.monotonic()  # a connection alone is none

    def time_ms():
        registers = words(client, 0, 4)
        return registers[2] << 16 | registers[3]

    wait_until(lambda: time.monotonic() - begun > 0.2, "800 ms of the rig's time, had it begun")
    assert time_ms() == 0
    wait_until(lambda: time_ms() > 0, "the life's beginning")
    assert rig.log("served")[0]["time_ms"] == 0


def test_a_snapshot_is_read_in_parts_and_is_whole(start_rig):
    rig = start_rig("--seed", "5", "--fault", "none", "--scale", "2")
    client = rig.client()
    wait_until(lambda: words(client, 100, 2)[1] >= 4, "the fourth snapshot")
    for _ in range(20):  # a snapshot may change while it is read; then it is read anew
        before = words(client, 100, 10)
        parts = {
            name: [word for at in range(0, 4096, 120) for word in words(client, start + at, min(120, 4096 - at))]
            for name, start in CHANNELS.items()
        }
        if words(client, 100, 2) == before[:2]:
            break
    else:
        pytest.fail("no snapshot stood still for long enough")
    counter = before[0] << 16 | before[1]
    snapshot = Simulator(5, "none").snapshot(counter)
    assert before[2] << 16 | before[3] == snapshot.time_ms
    rate_hz, scale = struct.unpack(">ff", struct.pack(">4H", *before[4:8]))
    assert rate_hz == 10_240
    assert scale == pytest.approx(snapshot.g_per_count, nan_ok=True)
    assert before[8:10] == [4096, 2]
    read = np.array(list(parts.values()), dtype=np.uint16).astype(np.int16)
    assert (read == snapshot.counts).all()


def test_every_read_of_register_0_is_counted_and_logged_once(start_rig):
    rig = start_rig()
    first, second = rig.client(), rig.client()
    seen = []
    for turn in range(60):
        client, function = (first, 4) if turn % 2 else (second, 3)
        registers = words(client, 0, 12, function)
        seen.append(registers[0] << 16 | registers[1])
        assert rig.log("served")[-1]["sequence"] == seen[-1]  # it was logged before it was answered
        words(client, 4, 8)  # does not cover register 0
    assert seen == list(range(1, 61))
    assert rig.stop() == 0
    served = rig.log("served")
    assert [line["sequence"] for line in served] == seen
    assert [line["time_ms"] for line in served] == sorted(line["time_ms"] for line in served)
    assert rig.log("end")[0]["sequence"] == 60


def test_a_refused_read_counts_for_nothing(start_rig):
    rig = start_rig()
    client = rig.client()
    assert client.read_input_registers(0, count=13, device_id=1).exception_code == 2
    assert words(client, 0, 2) == [0, 1]
    assert len(rig.log("served")) == 1


def test_addresses_outside_the_map_are_refused(start_rig):
    client = start_rig().client()
    for address, count in ((12, 1), (50, 2), (11, 2), (99, 1), (108, 3), (199, 2), (4290, 10), (9096, 1), (65_535, 1)):
        response = client.read_input_registers(address, count=count, device_id=1)
        assert response.exception_code == 2, address


def test_nothing_can_be_written_and_no_other_unit_answers(start_rig):
    client = start_rig().client()
    before = words(client, 4, 8)
    assert client.write_register(4, 1, device_id=1).exception_code == 1
    assert client.write_registers(4, [1, 2], device_id=1).exception_code == 1
    assert client.write_coil(0, True, device_id=1).exception_code == 1
    assert client.mask_write_register(address=4, and_mask=0, or_mask=1, device_id=1).exception_code == 1
    assert client.read_coils(0, count=1, device_id=1).exception_code == 1
    assert client.read_input_registers(0, count=1, device_id=7).exception_code == 11
    assert len(words(client, 4, 8)) == len(before)


def test_a_count_out_of_range_and_a_foreign_protocol(start_rig):
    rig = start_rig()
    for count in (0, 126):
        with socket.create_connection(("127.0.0.1", rig.ready["port"]), 5) as wire:
            wire.sendall(struct.pack(">HHHBBHH", 9, 0, 6, 1, 4, 0, count))
            assert wire.recv(64) == struct.pack(">HHHBBB", 9, 0, 3, 1, 0x84, 3)
    with socket.create_connection(("127.0.0.1", rig.ready["port"]), 5) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert wire.recv(64) == b""
    assert words(rig.client(), 0, 2) == [0, 1]  # and goes on serving


def test_the_log_begins_with_the_truth_and_no_register_tells_it(start_rig):
    rig = start_rig("--seed", "9", "--fault", "looseness")
    client = rig.client()
    words(client, 100, 10)
    words(client, 100, 10)
    assert rig.stop(signal.SIGINT) == 0
    header = rig.log("header")[0]
    assert header == {
        **header, "seed": 9, "fault": "looseness", "onset_ms": Simulator(9, "looseness").traits.onset_ms,
        "failure_ms": 35_000, "scale": 1.0,
    }  # fmt: skip
    counters = [line["counter"] for line in rig.log("snapshot")]
    assert counters == sorted(set(counters))
    assert rig.log("end")[0]["reason"] == "signal"


def test_a_healthy_life_has_no_failure(start_rig):
    rig = start_rig("--fault", "none")
    assert rig.log("header")[0]["failure_ms"] is None
    assert rig.log("header")[0]["onset_ms"] is None


def test_exit_at_end_with_a_client_still_there(start_rig):
    rig = start_rig("--scale", "100", "--exit-at-end")
    client = rig.client()
    words(client, 0, 12)
    assert rig.process.wait(60) == 0
    assert rig.log("end")[0] == {"kind": "end", "time_ms": END_MS, "sequence": 1, "reason": "end of life"}
    assert rig.process.stderr is not None
    assert rig.process.stderr.read() == ""


def test_a_taken_port_is_said_plainly(start_rig, tmp_path):
    port = start_rig().ready["port"]
    command = [sys.executable, "-m", "millhand_plugins.rig", "--port", str(port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert "Try: another --port" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_answer_that_cannot_be_logged_is_not_given():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    rig_log = RigLog(None, {})
    with full.open("wb", buffering=0) as file:
        rig_log._file = file
        server = RigServer(Simulator(1, "none"), lambda: 1000, rig_log)
        assert server.answer(1, struct.pack(">BHH", 4, 0, 12)) == bytes((0x84, 4))
        assert server.sequence == 0
        assert server.answer(1, struct.pack(">BHH", 4, 4, 8))[0] == 4


async def test_the_modbus_adapter_gives_the_extractor_what_it_needs(start_rig):
    """Rig process -> socket -> Modbus adapter -> windows -> extractor, with the shipped map and model.toml."""
    rig = start_rig("--scale", "2", "--fault", "none", "--seed", "5")
    table = tomllib.loads(files("millhand_plugins.rig").joinpath("modbus_map.toml").read_text())
    options = ModbusOptions.model_validate(table["assets"]["options"] | {"port": rig.ready["port"]})
    adapter = ModbusKind().create("skid", options)
    (folder,) = millhand_models(None)
    manifest = read_manifest(folder / "rig-fault")
    assert manifest.window is not None
    windows, extractor = WindowBuilder("skid", manifest.window), RigExtractor()
    await adapter.open(None)
    found = []
    sequences = []
    async with asyncio.timeout(30):
        async for batch in adapter.batches():
            sequences += [reading.value for reading in batch.readings if reading.name == "sequence"]
            found += [features for window in windows.add(batch) if (features := extractor.extract(window))]
            if len(found) >= 3:
                break
    await adapter.close()
    assert sequences == list(range(1, len(sequences) + 1))
    speed_hz = [features.evidence["shaft_hz"] for features in found]
    operation = Simulator(5, "none").operation
    turning = operation.speed[operation.state == 1] * Simulator(5, "none").traits.rated_speed_rpm / 60
    assert all(turning.min() - 1 < hz < turning.max() + 1 for hz in speed_hz)
