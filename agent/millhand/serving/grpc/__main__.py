"""A gRPC process: an equal client of the worker protocol (serving/front.py starts, watches and ends it).

It accepts on the listening socket that the daemon hands over, and ends when the daemon's control socket closes. Run as
`python -m millhand.serving.grpc '<JSON>'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from pathlib import Path

import msgspec

from millhand.logs import configure_logs
from millhand.serving import event_loop
from millhand.serving.admin import AdminToken
from millhand.serving.front_metrics import FRONT, MetricsReporter
from millhand.serving.grpc.repository import RepositoryService
from millhand.serving.grpc.server import Server
from millhand.serving.grpc.service import InferenceService
from millhand.serving.observation import ObservationOptions, open_observation
from millhand.serving.routing import Routes

DRAIN_S = 3.0


class GrpcArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON."""

    listen_fd: int
    control_path: str
    message_bytes_cap: int
    connections_cap: int
    streams_cap: int
    keepalive_s: float
    busy_poll_us: int = 0
    admin_token_file: str | None = None
    observation: ObservationOptions


async def serve(arguments: GrpcArguments) -> None:
    """Serve until the daemon is gone or SIGTERM comes; calls under way may finish within `DRAIN_S`."""
    loop = asyncio.get_running_loop()
    control_path = Path(arguments.control_path)
    token_path = None if arguments.admin_token_file is None else Path(arguments.admin_token_file)
    observation = open_observation(arguments.observation)
    routes = Routes(control_path, arguments.busy_poll_us)
    services = (
        InferenceService(routes, control_path),
        RepositoryService(routes, control_path, AdminToken(token_path, "grpc")),
    )
    server = Server(
        [method for service in services for method in service.methods()],
        message_bytes_cap=arguments.message_bytes_cap,
        connections_cap=arguments.connections_cap,
        streams_cap=arguments.streams_cap,
        keepalive_s=arguments.keepalive_s,
        observation=observation,
    )
    follower = asyncio.create_task(routes.follow(), name="routes")
    told = asyncio.create_task(routes.told(), name="told")
    watch = asyncio.create_task(server.watch(), name="watch")
    reporter = asyncio.create_task(MetricsReporter(FRONT, control_path).run(), name="metrics")
    loop.add_signal_handler(signal.SIGTERM, follower.cancel)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the daemon's to handle
    await asyncio.wait({follower, told}, return_when=asyncio.FIRST_COMPLETED)  # till then clients wait to be accepted
    listening = await loop.create_server(server.new_connection, sock=socket.socket(fileno=arguments.listen_fd))
    gc.freeze()  # what is loaded now stays
    with contextlib.suppress(asyncio.CancelledError):
        await follower
    listening.close()
    await server.drain(DRAIN_S)
    for task in (told, watch, reporter):
        task.cancel()
    await asyncio.gather(told, watch, reporter, return_exceptions=True)
    observation.close()
    routes.close()


def main() -> None:
    """Entry point of the process."""
    arguments = msgspec.json.decode(sys.argv[1], type=GrpcArguments)
    configure_logs(arguments.observation.log)
    event_loop.run(serve(arguments))


if __name__ == "__main__":
    main()
