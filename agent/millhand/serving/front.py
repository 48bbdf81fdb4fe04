"""Front processes: each kind speaks one protocol to clients and the worker protocol to the workers.

The daemon starts them, watches them and ends them. A process takes one argument, JSON, and is run as
`python -m <module> '<JSON>'`; it ends itself when the daemon's control socket closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, Protocol

import msgspec

from millhand.errors import ConfigError
from millhand.log_settings import LogSettings
from millhand.serving.openai.settings import GatewaySettings
from millhand.serving.openai.tokens import read_tokens
from millhand.serving.settings import GrpcSettings, HttpSettings, TracingSettings
from millhand.serving.tracing import require_exporter
from millhand.validation import StrictTable

log = logging.getLogger("millhand.front")

RESTART_DELAY_S = 0.2
RESTART_DELAY_CAP_S = 10.0
STOP_GRACE_S = 5.0
BACKLOG = 1024
PROCESSES_CAP = 4
# Small helpers of NumPy and of the allocator, which would take threads and arenas for every core.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


class Address(Protocol):
    """What a table of the configuration must say about a front."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def processes(self) -> int: ...


class FrontProcess:
    """Keeps the processes of one kind running behind one port.

    The daemon binds the port and listens; every process inherits the socket and accepts on it. So a restart keeps the
    port, and connections that wait outlive a process.
    """

    def __init__(
        self,
        name: str,
        module: str,
        address: Address,
        arguments: dict[str, Any],
        *,
        refuses: bool = False,
    ) -> None:
        """`name` is the table of the configuration; `listen_fd` is added to the `arguments`. `refuses`: new clients are
        refused from the beginning of a stop; the processes must bear that their listening socket is shut down.
        """
        self._name = name
        self._module = module
        self._address = address
        self._arguments = arguments
        self._refuses = refuses
        self._socket: socket.socket | None = None
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._watches: list[asyncio.Task[None]] = []
        self.restarts = 0

    @property
    def port(self) -> int:
        """The port that is really bound; 0 before `start`."""
        return 0 if self._socket is None else int(self._socket.getsockname()[1])

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._processes.values() if process.returncode is None]

    async def start(self) -> None:
        """Bind and start. Raises ConfigError where the address is taken or is not this node's."""
        self._socket = _bind(self._name, self._address)
        for index in range(processes(self._address.processes)):
            await self._spawn(index)
            self._watches.append(asyncio.create_task(self._keep_alive(index), name=f"{self._name} process {index}"))

    async def stop(self) -> None:
        """End the processes; requests under way get a short grace."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        running = list(self._processes.values())
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if self._refuses and self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await asyncio.gather(*(process.wait() for process in running))
        except TimeoutError:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(*(process.wait() for process in running))
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._processes.clear()
        self._watches.clear()

    async def _spawn(self, index: int) -> None:
        assert self._socket is not None
        self._processes[index] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            msgspec.json.encode({**self._arguments, "listen_fd": self._socket.fileno()}).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(self._socket.fileno(),),
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )

    async def _keep_alive(self, index: int) -> None:
        loop = asyncio.get_running_loop()
        delay_s = RESTART_DELAY_S
        while True:
            started = loop.time()
            status = await self._processes[index].wait()
            self.restarts += 1
            log.error("a process of [%s] ended with status %s; it is started again", self._name, status)
            if loop.time() - started > RESTART_DELAY_CAP_S:
                delay_s = RESTART_DELAY_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_DELAY_CAP_S)
            await self._spawn(index)


def processes(wanted: int) -> int:
    """How many processes to start; for 0 one for every two CPUs that this process may use, 1 to 4.

    A front and the workers share the CPUs about evenly when models are small, which is when a front is the limit.
    """
    return wanted or min(max(len(os.sched_getaffinity(0)) // 2, 1), PROCESSES_CAP)


def http_front(
    settings: HttpSettings,
    control_path: Path,
    tracing: TracingSettings | None = None,
    log_settings: LogSettings | None = None,
) -> FrontProcess:
    """The HTTP processes. Raises ConfigError where `[tracing]` needs a package that is not installed."""
    observation = observation_options(
        tracing or TracingSettings(), log_settings or LogSettings(), settings.access_log, settings.access_log_per_minute
    )
    return FrontProcess(
        "http", "millhand.serving.http", settings, _told(settings, control_path, observation), refuses=True
    )


def grpc_front(
    settings: GrpcSettings,
    control_path: Path,
    tracing: TracingSettings | None = None,
    log_settings: LogSettings | None = None,
) -> FrontProcess:
    """The gRPC processes. Raises ConfigError where `[tracing]` needs a package that is not installed."""
    observation = observation_options(
        tracing or TracingSettings(), log_settings or LogSettings(), settings.access_log, settings.access_log_per_minute
    )
    return FrontProcess("grpc", "millhand.serving.grpc", settings, _told(settings, control_path, observation))


def gateway_front(
    settings: GatewaySettings,
    control_path: Path,
    data_dir: Path,
    *,
    agent_sha256: str = "",
    plugins: dict[str, dict[str, Any]] | None = None,
    tracing: TracingSettings | None = None,
    log_settings: LogSettings | None = None,
) -> FrontProcess:
    """The processes of the gateway. `agent_sha256`: hash of the agent's own token; `plugins`: tables of those that
    bring guards. Raises ConfigError where a package is missing, or the tokens_file is broken.
    """
    require_gateway()
    if settings.tokens_file is not None:
        read_tokens(settings.tokens_file)
    observation = observation_options(
        tracing or TracingSettings(), log_settings or LogSettings(), settings.access_log, settings.access_log_per_minute
    )
    told = {
        **_told(settings, control_path, observation),
        "processes": processes(settings.processes),
        "data_dir": os.fspath(data_dir),
        "agent_sha256": agent_sha256,
        "plugins": plugins or {},
    }
    return FrontProcess("gateway", "millhand.serving.openai", settings, told)


def require_gateway() -> None:
    """Raises ConfigError where the package is missing that gateway processes serve with."""
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(
            "[gateway] needs the package aiohttp, which is not installed",
            hint="pip install 'millhand[gateway]', or set [gateway] enabled = false",
        )


def _told(settings: StrictTable, control_path: Path, observation: dict[str, Any]) -> dict[str, Any]:
    """What a process is told: every key of its table, where the daemon answers, and what to do beside answering."""
    told = settings.model_dump(mode="json")
    return {**told, "control_path": os.fspath(control_path), "observation": observation}


def observation_options(
    tracing: TracingSettings, log_settings: LogSettings, access_log: bool = False, access_log_per_minute: int = 600
) -> dict[str, Any]:
    """The argument `observation` of any front process (see ObservationOptions there).

    Raises ConfigError where `[tracing]` needs a package that is not installed.
    """
    if tracing.enabled:
        require_exporter()
    return {
        "access_log": access_log,
        "access_log_per_minute": access_log_per_minute,
        "tracing": tracing.model_dump(mode="json"),
        "log": log_settings.model_dump(mode="json"),
    }


def _bind(name: str, address: Address) -> socket.socket:
    bound = None
    try:
        bound = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address.host, address.port))
        bound.listen(BACKLOG)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"[{name}] host = '{address.host}', port = {address.port} cannot be bound: {error.strerror or error}",
            hint=bind_hint(name, error),
        ) from error
    return bound


def bind_hint(name: str, error: OSError) -> str:
    """What to do where the address of the table `name` cannot be bound."""
    if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
        return f"name an address that this node has as [{name}] host (ip address shows them), such as 127.0.0.1"
    return f"stop what listens there (ss -ltnp shows it), or choose another [{name}] port"
