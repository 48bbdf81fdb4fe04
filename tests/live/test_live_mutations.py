"""Ten thousand mutations of valid requests at a whole node: no process dies, nothing hangs, nothing grows."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import re
import socket
import struct
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc_mutations
import http_mutations
import psutil
import pytest

from millhand.serving.grpc import wire
from millhand.testing import wait_until

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "serving" / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "conformance" / "kit"))

from conformance_kit import Node, config, ready

MUTATIONS = int(os.environ.get("MUTATIONS", "10000"))
SEED = int(os.environ.get("MUTATIONS_SEED", "4"))
AT_ONCE = 100
ANSWER_S = 20.0
GRPC_SILENT_S = 30.0
"""keepalive_s, then what a silent client has to answer a PING, and a little."""
GROWTH = 0.05
GROWTH_BYTES = 4 << 20
"""A process may grow by the larger of the two after the warm-up."""


class Swarm:
    """Many connections, each with one mutation; the same seed gives the same ones."""

    def __init__(self, node: Node, seed: int) -> None:
        self.seed = seed
        self.http = ("127.0.0.1", int(node.http.rpartition(":")[2]))
        self.grpc = ("127.0.0.1", int(node.grpc.rpartition(":")[2]))
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._requests = http_mutations.valid_requests()
        self._calls = grpc_mutations.valid_calls()

    async def run(self, numbers: Iterable[int]) -> None:
        waiting = iter(numbers)

        async def work() -> None:
            for number in waiting:
                await self._connect(number)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def _connect(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        is_http = rng.random() < 0.6
        data = http_mutations.mutated(rng, self._requests) if is_http else grpc_mutations.mutated(rng, self._calls)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._talk(rng, is_http, data)
        except TimeoutError:
            self.wrong.append(f"{number}: neither answered nor closed: {data[:600]!r}")
        except (AssertionError, ValueError, KeyError) as error:
            self.wrong.append(f"{number}: {type(error).__name__} {error}: {data[:600]!r}")

    async def _talk(self, rng: random.Random, is_http: bool, data: bytes) -> None:
        reader, writer = await asyncio.open_connection(*(self.http if is_http else self.grpc), limit=1 << 24)
        kind = "HTTP" if is_http else "gRPC"
        try:
            cut = rng.randrange(len(data) + 1) if rng.random() < 0.3 else 0
            for part in (data[:cut], data[cut:]):
                writer.write(part)
                await writer.drain()
            if rng.random() < 0.05:  # the client is gone, without a word
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.ends[f"{kind} gone"] += 1
            elif is_http:
                found = await http_mutations.answers(reader)
                self.ends.update(f"HTTP {status}" for status, _ in found)
                self.ends["HTTP closed"] += not found
                assert not [one for one in found if one[0] >= 500 and one[0] not in (503, 504)], found
            else:
                how, statuses = await grpc_mutations.answer(reader, writer)
                self.ends[f"gRPC {how}"] += 1
                self.ends.update(f"gRPC status {status}" for status in statuses)
        except (ConnectionError, BrokenPipeError):
            self.ends[f"{kind} reset"] += 1
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def hold_grpc(self, cut: int) -> None:
        """Send the first bytes of a call and wait for the server to close."""
        call = next(call for call in self._calls if call.method == "ModelInfer")
        parts = grpc_mutations.sent(b"", call.framed(), random.Random(0))
        data = (grpc_mutations.frames.PREFACE + b"".join(parts))[:cut]
        reader, writer = await asyncio.open_connection(*self.grpc)
        try:
            writer.write(data)
            async with asyncio.timeout(GRPC_SILENT_S):
                await reader.read(-1)
        except TimeoutError:
            self.wrong.append(f"a gRPC connection is open {GRPC_SILENT_S} s after {data!r}")
        finally:
            writer.close()
            await writer.wait_closed()


def good_answers(node: Node) -> dict[str, Any]:
    """What good requests give: over HTTP, and over gRPC."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    body = json.dumps({"inputs": [tensor]}).encode()
    with urllib.request.urlopen(f"{node.http}/v2/models/same-fp32/infer", body, timeout=30) as answer:
        found = {"http": json.loads(answer.read())["outputs"][0]["data"]}
    with grpc.insecure_channel(node.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary(f"/{grpc_mutations.SERVICE}/ModelInfer")
        message = grpc_mutations.infer("same-fp32", "FP32", 1, fp32_contents=[1, 2, 3, 4])
        response = wire.ModelInferResponse.FromString(infer(message, timeout=10))
    return found | {"grpc": list(struct.unpack("<4f", response.raw_output_contents[0]))}


def processes(node: Node) -> dict[int, psutil.Process]:
    """The daemon and all of its processes by id."""
    assert node.agent.process is not None
    daemon = psutil.Process(node.agent.process.pid)
    return {process.pid: process for process in (daemon, *daemon.children(recursive=True))}


def sizes(node: Node) -> dict[int, int]:
    """Bytes of memory that belong to each process alone."""
    return {number: process.memory_full_info().uss for number, process in processes(node).items()}


def sockets(node: Node) -> int:
    """How many TCP connections the node holds."""
    return sum(
        connection.status == psutil.CONN_ESTABLISHED
        for process in processes(node).values()
        for connection in process.net_connections("tcp")
    )


@pytest.fixture
def node(tmp_path, millhand_agent):
    http = "processes = 1\nkeep_alive_s = 0.3\nrequest_timeout_s = 1"
    return ready(millhand_agent(config(tmp_path, http=http, grpc="processes = 1\nkeepalive_s = 1")))


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_mutations_harm_nothing(node):
    right = {"http": [1, 2, 3, 4], "grpc": [1, 2, 3, 4]}
    assert good_answers(node) == right
    before, swarm, warm = set(processes(node)), Swarm(node, SEED), MUTATIONS * 3 // 10
    await swarm.run(range(warm))
    wait_until(lambda: sockets(node) == 0, "the end of all connections")
    warm_bytes = sizes(node)
    await asyncio.gather(swarm.run(range(warm, MUTATIONS)), *(swarm.hold_grpc(cut) for cut in (0, 3, 24, 60, 90)))
    wait_until(lambda: sockets(node) == 0, "the end of all connections")
    print(dict(sorted(swarm.ends.items())))
    assert not swarm.wrong, "\n".join(swarm.wrong[:10])
    assert set(processes(node)) == before
    assert {worker["restarts"] for worker in node.agent.call("model.stats")["workers"]} == {0}
    assert [line for line in node.agent.log().splitlines() if re.search("ERROR|Warning|Traceback", line)] == []
    grown = {number: size - warm_bytes[number] for number, size in sizes(node).items()}
    caps = {number: max(GROWTH * size, GROWTH_BYTES) for number, size in warm_bytes.items()}
    print({processes(node)[number].cmdline()[2:4][0]: (warm_bytes[number], grown[number]) for number in grown})
    assert {number: size for number, size in grown.items() if size > caps[number]} == {}
    assert good_answers(node) == right
    # The mutations reached what they should: some are still good, most are refused, few end without a word.
    assert swarm.ends["HTTP 200"] > MUTATIONS / 40 and swarm.ends["HTTP 400"] > MUTATIONS / 10
    assert swarm.ends["gRPC status 0"] > MUTATIONS / 40 and swarm.ends["gRPC status 3"] > MUTATIONS / 40
