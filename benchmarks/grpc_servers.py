"""What one gRPC call costs in a server that does nothing else: millhand's own server beside grpcio's two.

    python benchmarks/grpc_servers.py

Each server answers 8 KB with 8 bytes; h2load sends from 8 connections, one call at a time on each. Paired rounds: in
every round each server runs once. Needs h2load (nghttp2-client).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from drive import drive
from figures import Figure, parser, progress, report
from processes import Family
from wire import GRPC_PATH, Request

ROUNDS, SECONDS, CONNECTIONS, THREADS = 5, 2.0, 8, 8
MESSAGE = bytes(8 << 10)
ANSWER = bytes(8)
READY_S = 20.0
NAMES = ("millhand", "grpc.aio", "grpcio threads")


async def serve_millhand(port: int) -> None:
    from millhand.serving.grpc.rpc import Call, Method
    from millhand.serving.grpc.server import Server

    async def answer(call: Call, message: bytes) -> bytes:
        return ANSWER

    service, name = GRPC_PATH[1:].split("/")
    server = Server(
        [Method(service, name, unary=answer)],
        message_bytes_cap=1 << 20,
        connections_cap=64,
        streams_cap=256,
        keepalive_s=60,
    )
    await asyncio.get_running_loop().create_server(server.new_connection, "127.0.0.1", port)
    await server.watch()


async def serve_aio(port: int) -> None:
    import grpc.aio  # type: ignore[import-untyped]

    async def answer(message: bytes, context: object) -> bytes:
        return ANSWER

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handlers(grpc, answer),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve_threads(port: int) -> None:
    import grpc

    server = grpc.server(ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers((_handlers(grpc, lambda message, context: ANSWER),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def _handlers(grpc: object, answer: object) -> object:
    service, name = GRPC_PATH[1:].split("/")
    handler = grpc.unary_unary_rpc_method_handler(answer)  # type: ignore[attr-defined]
    return grpc.method_handlers_generic_handler(service, {name: handler})  # type: ignore[attr-defined]


class Running:
    """One of the servers as a process."""

    def __init__(self, name: str) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.address = free.getsockname()[:2]
        self.family = Family()
        command = [sys.executable, str(Path(__file__)), "--serve", name, "--port", str(self.address[1])]
        environment = {**os.environ, **self.family.environment}
        self.process = subprocess.Popen(command, env=environment)
        end_s = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection(self.address, 1).close()
                return
            except OSError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.05)

    def run(self, seconds: float) -> tuple[float, float]:
        """Requests a second, and CPU microseconds a request."""
        request = Request("grpc", GRPC_PATH, b"\0" + len(MESSAGE).to_bytes(4, "big") + MESSAGE)
        before = sum(self.family.cpu_s().values())
        done = drive(self.address, request, CONNECTIONS, seconds, len(ANSWER) + 5)
        return done.requests / done.seconds, (sum(self.family.cpu_s().values()) - before) / done.requests * 1e6


def measure() -> int:
    if shutil.which("h2load") is None:
        progress("h2load is missing: apt install nghttp2-client")
        return 1
    servers = {name: Running(name) for name in NAMES}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    try:
        for server in servers.values():
            server.run(0.5)
        for number in range(ROUNDS):
            progress(f"round {number + 1} of {ROUNDS}")
            for name, server in servers.items():
                runs[name].append(server.run(SECONDS))
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
    figures = []
    for name in NAMES:
        figures.append(Figure(f"{name}: requests/s", round(statistics.median(r for r, _ in runs[name])), "1/s"))
        figures.append(Figure(f"{name}: CPU a call", round(statistics.median(c for _, c in runs[name])), "us"))
    for name in NAMES[1:]:
        ratios = [theirs / ours for (_, ours), (_, theirs) in zip(runs["millhand"], runs[name], strict=True)]
        figures.append(
            Figure(f"CPU a call, {name} to millhand", round(statistics.median(ratios), 2), "x", ">= 2", name)
        )
    return report("grpc_servers", figures)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--serve", choices=NAMES)
    arguments.add_argument("--port", type=int)
    wanted = arguments.parse_args()
    if wanted.serve == "millhand":
        asyncio.run(serve_millhand(wanted.port))
    elif wanted.serve == "grpc.aio":
        asyncio.run(serve_aio(wanted.port))
    elif wanted.serve:
        serve_threads(wanted.port)
    else:
        return measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
