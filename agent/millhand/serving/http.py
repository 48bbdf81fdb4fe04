"""An HTTP process: an equal client of the worker protocol (serving/front.py starts, watches and ends it).

It accepts on the listening socket that the daemon hands over, and ends when the daemon's control socket closes. Run as
`python -m millhand.serving.http '<JSON>'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from pathlib import Path

import msgspec

from millhand.logs import configure_logs
from millhand.serving.observation import ObservationOptions, open_observation

DRAIN_S = 3


class HttpArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON (no pydantic there: it would cost 6 MB)."""

    listen_fd: int
    control_path: str
    body_bytes_cap: int
    connections_cap: int
    keep_alive_s: int
    observation: ObservationOptions


async def serve(arguments: HttpArguments) -> None:
    """Serve until the daemon is gone or SIGTERM comes."""
    import uvicorn

    from millhand.serving.app import Application
    from millhand.serving.front_metrics import FRONT, MetricsReporter
    from millhand.serving.routing import Routes

    control_path = Path(arguments.control_path)
    routes = Routes(control_path)
    reporter = MetricsReporter(FRONT, control_path)
    observation = open_observation(arguments.observation)
    application = Application(routes, reporter, observation, arguments.body_bytes_cap)
    server = uvicorn.Server(
        uvicorn.Config(
            application.build(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="httptools",
            limit_concurrency=arguments.connections_cap,
            timeout_keep_alive=arguments.keep_alive_s,
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
            date_header=False,
        )
    )
    # uvicorn raises the signal again when it has ended: the work below must still be done.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    follower = asyncio.create_task(routes.follow())
    follower.add_done_callback(lambda _: setattr(server, "should_exit", True))
    reporting = asyncio.create_task(reporter.run())
    with socket.socket(fileno=arguments.listen_fd) as listener:
        await server.serve(sockets=[listener])
    for task in (follower, reporting):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    observation.close()
    routes.close()


def main() -> None:
    """Entry point of the process."""
    arguments = msgspec.json.decode(sys.argv[1], type=HttpArguments)
    configure_logs(arguments.observation.log)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    asyncio.run(serve(arguments))


if __name__ == "__main__":
    main()
