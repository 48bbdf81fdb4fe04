"""CPU time of one request's way through the front and through the worker, each alone in this process, without a model.

`python benchmarks/hot_path.py`. No client, no second process and no waiting: what is left is the code between the
sockets, which says more on a busy machine than requests a second do. The load is an 8 KB tensor, as binary data and as
19 KB of JSON. `never seen` sends a head that differs each time, so nothing that is kept from earlier requests helps.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, parser, report

from millhand.serving import inference, protocol
from millhand.serving.blackbox import Blackbox
from millhand.serving.client import WorkerClient
from millhand.serving.exchange import Exchange
from millhand.serving.front_metrics import FRONT, MetricsReporter
from millhand.serving.http.connection import HttpConnection
from millhand.serving.http.endpoints import Endpoints
from millhand.serving.http.server import HttpLimits, HttpServer
from millhand.serving.routing import Routes
from millhand.serving.worker import Worker, WorkerSettings

ROUNDS, REPEATS = 2000, 7
VALUES = 2048
BACKEND = """
import numpy as np
ANSWER = {"logits": np.zeros((1, 5), np.float32)}
class Session:
    inputs = {"input": ("float32", (-1, 1, 2048))}
    outputs = {"logits": ("float32", (-1, 5))}
    def run(self, inputs): return ANSWER
    def close(self): pass
class Backend:
    name, suffixes = "nothing", ()
    def load(self, artifact, accelerator, options): return Session()
def millhand_backends(): return [Backend()]
"""
TENSORS = (protocol.Tensor("input", "float32", (1, 1, VALUES), 0, 4 * VALUES),)
ANSWER = protocol.Result(True, (protocol.Tensor("logits", "float32", (1, 5), 0, 20),), 1, 1000, 300_000, 1)
ANSWER_BYTES = bytes(64)


def cpu_us(work: Callable[[], Any]) -> float:
    """The median over repeats of the CPU microseconds of one call."""
    work()
    found = []
    for _ in range(REPEATS):
        started = time.process_time_ns()
        for _ in range(ROUNDS):
            work()
        found.append((time.process_time_ns() - started) / ROUNDS / 1000)
    return statistics.median(found)


def requests() -> dict[str, Callable[[], bytes]]:
    """Name -> what makes the bytes of the next request."""
    values = np.random.default_rng(1).standard_normal(VALUES).astype(np.float32)
    tensor: dict[str, Any] = {"name": "input", "shape": [1, 1, VALUES], "datatype": "FP32"}
    wish = {"name": "logits", "parameters": {"binary_data": True}}
    told = {"inputs": [{**tensor, "parameters": {"binary_data_size": values.nbytes}}], "outputs": [wish]}
    header = json.dumps(told).encode()
    numbers = json.dumps({"inputs": [{**tensor, "data": [round(float(value), 6) for value in values]}]}).encode()
    count = itertools.count()

    def post(body: bytes, extra: str = "") -> bytes:
        head = f"POST /v2/models/cnn/infer HTTP/1.1\r\nHost: node:8080\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        return head.encode() + body

    size = f"Inference-Header-Content-Length: {len(header)}\r\n"
    binary, as_json = post(header + values.tobytes(), size), post(numbers)
    return {
        "binary": lambda: binary,
        "binary, never seen": lambda: post(header + values.tobytes(), f"{size}X-Request: {next(count)}\r\n"),
        "JSON": lambda: as_json,
    }


def receive(connection: socket.socket) -> bytes:
    """What has been sent already; empty for nothing."""
    try:
        return connection.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


class Transport:
    """Takes what the connection writes."""

    written = b""

    def write(self, data: bytes) -> None:
        self.written = data


async def front_us(make: Callable[[], bytes]) -> float:
    """The front: from the bytes of a request to those of the answer, around a worker that answers at once."""
    near, far = socket.socketpair()
    client = WorkerClient(near, "none")
    client._exchange.hello(near)
    far.recv(4096)
    connected = asyncio.get_running_loop().create_future()
    connected.set_result(client)
    control_path = Path("/nowhere")
    routes = Routes(control_path)
    routes._models = {
        "cnn": {"sockets": {"1": ["path"]}, "backend": "", "inputs": [], "outputs": [], "state": "ready", "labels": []}
    }
    routes._clients["path"] = connected
    routes.deadline_ms, routes.known = 2000, True
    limits = HttpLimits(body_bytes_cap=1 << 20, connections_cap=1, keep_alive_s=30, request_timeout_s=10)
    endpoints = Endpoints(routes, MetricsReporter(FRONT, control_path), control_path, None)
    with socket.socket() as listener:
        connection = HttpConnection(HttpServer(listener, endpoints.handle, limits))
        transport: Any = Transport()
        connection.connection_made(transport)

        def request() -> None:
            data = make()
            connection.get_buffer(-1)[: len(data)] = data
            connection.buffer_updated(len(data))
            if not (sent := receive(far)):
                raise SystemExit(f"the front answered at once: {transport.written[:300]!r}")
            number = protocol.HEAD.unpack_from(sent)[4]
            far.send(b"".join(protocol.frame(protocol.RESULT, number, ANSWER, [ANSWER_BYTES], len(ANSWER_BYTES))))
            client._on_readable()

        request()
        if not transport.written.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the front answered {transport.written[:200]!r}")
        found = cpu_us(request)
    far.close()
    client.close()
    return found


def worker_us() -> float:
    """The worker: from the bytes of a request to those of the answer, around a session that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench_nothing.py").write_text(BACKEND)
        sys.path.insert(0, folder)
        _box, box_fd = Blackbox.create()
        control, _daemon = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/worker")
        listener.listen()
        fds = {"control_fd": control.detach(), "blackbox_fd": box_fd, "listen_fd": listener.detach()}
        worker = Worker(WorkerSettings(name="bench", **fds))
        specs = {"inputs": {"input": ["float32", [-1, 1, VALUES]]}, "outputs": {"logits": ["float32", [-1, 5]]}}
        target = {"model": "cnn", "version": 1, "artifact": "", "backend": "nothing", "module": "bench_nothing"}
        worker._load(**target, **specs, max_batch=64, warmup=0)
        near, far = socket.socketpair()
        worker._watch(near)
        exchange = Exchange(2, 1 << 20)
        exchange.hello(far)
        numbers = itertools.count(1)

        def turn() -> bytes:
            worker._read_clients(worker._batcher.wait_s())
            while (batch := worker._batcher.take()) is not None:
                worker._run(batch)
            return far.recv(1 << 16)

        def request() -> bytes:
            infer = protocol.Infer("cnn", 1, 0, False, TENSORS, ("logits",))
            far.sendmsg(protocol.infer_frame(next(numbers), infer, time.monotonic_ns() + 10**10, 0))
            return turn()

        turn()
        if request()[2] != protocol.RESULT:
            raise SystemExit("the worker did not answer")
        return cpu_us(request)


def reader_us() -> tuple[float, float]:
    """Reading the JSON request into an array: (with simdjson, by the plain reader)."""
    body = requests()["JSON"]().partition(b"\r\n\r\n")[2]
    quick = cpu_us(lambda: inference.read_body(body))
    read_quickly = inference.read_quickly
    inference.read_quickly = lambda body: None
    try:
        return quick, cpu_us(lambda: inference.read_body(body))
    finally:
        inference.read_quickly = read_quickly


def main() -> int:
    parser(__doc__).parse_args()
    figures = [
        Figure(f"front, {name}: CPU a request", round(asyncio.run(front_us(make)), 1), "us")
        for name, make in requests().items()
    ]
    quick, plain = reader_us()
    figures += [
        Figure("worker: CPU a request", round(worker_us(), 1), "us"),
        Figure("reading 19 KB of JSON", round(quick, 1), "us"),
        Figure("reading 19 KB of JSON without simdjson", round(plain, 1), "us"),
    ]
    return report("hot_path", figures)


if __name__ == "__main__":
    sys.exit(main())
