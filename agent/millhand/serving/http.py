"""The HTTP process: an equal client of the worker protocol, started, watched and ended by the daemon.

The daemon binds the listening socket and hands it over, so a restart keeps the port and the waiting connections. The
process ends when the daemon's control socket closes. Run as `python -m millhand.serving.http '<JSON>'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millhand.errors import ConfigError

if TYPE_CHECKING:
    from millhand.serving.settings import HttpSettings

log = logging.getLogger("millhand.http")

RESTART_DELAY_S = 0.2
RESTART_DELAY_CAP_S = 10.0
STOP_GRACE_S = 3.0
BACKLOG = 256


class HttpArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON (no pydantic there: it would cost 6 MB)."""

    listen_fd: int
    control_path: str
    body_bytes_cap: int
    connections_cap: int
    keep_alive_s: int


class HttpProcess:
    """Keeps the HTTP process running for the daemon."""

    def __init__(self, settings: HttpSettings, control_path: Path) -> None:
        self._settings = settings
        self._control_path = control_path
        self._listener: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def port(self) -> int:
        """The port that is really bound; 0 before `start`."""
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Bind and start. Raises ConfigError where the address is taken or is not this node's."""
        self._listener = _bind(self._settings.host, self._settings.port)
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End the process; requests under way get a short grace."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._listener is not None:
            self._listener.close()
        self._listener = self._process = self._watch = None

    async def _spawn(self) -> None:
        assert self._listener is not None
        arguments = HttpArguments(
            listen_fd=self._listener.fileno(),
            control_path=os.fspath(self._control_path),
            body_bytes_cap=self._settings.body_bytes_cap,
            connections_cap=self._settings.connections_cap,
            keep_alive_s=self._settings.keep_alive_s,
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "millhand.serving.http",
            msgspec.json.encode(arguments).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(self._listener.fileno(),),
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = RESTART_DELAY_S
        while True:
            assert self._process is not None
            started = loop.time()
            status = await self._process.wait()
            self.restarts += 1
            log.error("the HTTP process ended with status %s; it is started again", status)
            if loop.time() - started > RESTART_DELAY_CAP_S:
                delay_s = RESTART_DELAY_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_DELAY_CAP_S)
            await self._spawn()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"[http] host = '{host}', port = {port} cannot be bound: {error.strerror or error}",
            hint="choose another [http] port, or stop what listens there",
        ) from error
    return listener


async def serve(arguments: HttpArguments) -> None:
    """Serve until the daemon is gone or SIGTERM comes."""
    import uvicorn

    from millhand.serving.app import Application
    from millhand.serving.routing import Routes

    control_path = Path(arguments.control_path)
    routes = Routes(control_path)
    application = Application(routes, control_path, arguments.body_bytes_cap)
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
            timeout_graceful_shutdown=int(STOP_GRACE_S),
            server_header=False,
            date_header=False,
        )
    )
    follower = asyncio.create_task(routes.follow())
    follower.add_done_callback(lambda _: setattr(server, "should_exit", True))
    with socket.socket(fileno=arguments.listen_fd) as listener:
        await server.serve(sockets=[listener])
    follower.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await follower
    routes.close()


def main() -> None:
    """Entry point of the process."""
    arguments = msgspec.json.decode(sys.argv[1], type=HttpArguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    asyncio.run(serve(arguments))


if __name__ == "__main__":
    main()
