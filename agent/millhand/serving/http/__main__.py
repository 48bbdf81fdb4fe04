"""An HTTP process: an equal client of the worker protocol (serving/front.py starts, watches and ends it).

It accepts on the listening socket that the daemon hands over, and ends when the daemon's control socket closes. Run as
`python -m millhand.serving.http '<JSON>'`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
import socket
import sys
from pathlib import Path

import msgspec

from millhand.logs import configure_logs
from millhand.serving import event_loop
from millhand.serving.front_metrics import FRONT, MetricsReporter
from millhand.serving.http.endpoints import Endpoints
from millhand.serving.http.server import HttpLimits, HttpServer
from millhand.serving.http.trace import observe
from millhand.serving.observation import ObservationOptions, open_observation
from millhand.serving.routing import Routes

DRAIN_S = 3.0


class HttpArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON (no pydantic there: it would cost 6 MB); keys as in `[http]`."""

    listen_fd: int
    control_path: str
    body_bytes_cap: int
    connections_cap: int
    keep_alive_s: float
    request_timeout_s: float
    busy_poll_us: int = 0
    admin_token_file: str | None = None
    observation: ObservationOptions = ObservationOptions()


async def serve(arguments: HttpArguments) -> None:
    """Serve until the daemon is gone or SIGTERM comes; requests under way may finish within `DRAIN_S`."""
    control_path = Path(arguments.control_path)
    token_path = Path(arguments.admin_token_file) if arguments.admin_token_file else None
    routes = Routes(control_path, arguments.busy_poll_us)
    reporter = MetricsReporter(FRONT, control_path)
    endpoints = Endpoints(routes, reporter, control_path, token_path)
    follower = asyncio.create_task(routes.follow(), name="routes")
    told = asyncio.create_task(routes.told(), name="told")
    reporting = asyncio.create_task(reporter.run(), name="metrics")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, follower.cancel)
    observation = open_observation(arguments.observation)
    limits = HttpLimits(
        body_bytes_cap=arguments.body_bytes_cap,
        connections_cap=arguments.connections_cap,
        keep_alive_s=arguments.keep_alive_s,
        request_timeout_s=arguments.request_timeout_s,
    )
    await asyncio.wait({follower, told}, return_when=asyncio.FIRST_COMPLETED)  # till then clients wait to be accepted
    with socket.socket(fileno=arguments.listen_fd) as listener:
        server = HttpServer(listener, endpoints.handle, limits)
        if observation.wanted:
            server.observe = functools.partial(observe, observation)
        server.start()
        gc.freeze()  # what is loaded now stays
        await asyncio.wait({follower})
        await server.stop(DRAIN_S)
    for task in (told, reporting):
        task.cancel()
    await asyncio.gather(told, reporting, return_exceptions=True)
    observation.close()
    routes.close()


def main() -> None:
    """Entry point of the process."""
    arguments = msgspec.json.decode(sys.argv[1], type=HttpArguments)
    configure_logs(arguments.observation.log)
    event_loop.run(serve(arguments))


if __name__ == "__main__":
    main()
