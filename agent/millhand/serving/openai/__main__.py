"""A gateway process (serving/front.py starts, watches and ends it).

It accepts on the listening socket that the daemon hands over, and ends when the daemon's control socket closes. Run as
`python -m millhand.serving.openai '<JSON>'`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from millhand.hookspecs import Guard
from millhand.logs import configure_logs
from millhand.registry import Registry
from millhand.serving import event_loop
from millhand.serving.front_metrics import FRONT, MetricsReporter
from millhand.serving.observation import ObservationOptions, open_observation
from millhand.serving.openai import metrics
from millhand.serving.openai.admission import Admission, Rate, Rates
from millhand.serving.openai.audit import FILE, Audit, Extent
from millhand.serving.openai.exchange import Limits
from millhand.serving.openai.gateway import Doors, Gateway
from millhand.serving.openai.guarding import Guards
from millhand.serving.openai.routes import LanguageRoutes
from millhand.serving.openai.server import GatewayServer
from millhand.serving.openai.tokens import TokenKeeper
from millhand.serving.openai.upstream import Upstream

log = logging.getLogger("millhand.gateway")

DRAIN_S = 3.0


class GatewayArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON; keys as in `[gateway]`."""

    listen_fd: int
    control_path: str
    data_dir: str
    processes: int
    tokens_file: str | None
    rates: dict[str, Rate]
    streams_cap: int
    queue: int
    queue_wait_s: float
    connections_cap: int
    body_bytes_cap: int
    request_timeout_s: float
    first_token_s: float
    idle_s: float
    deadline_s: float
    cors_origins: tuple[str, ...]
    audit: Extent
    audit_bytes_cap: int
    agent_sha256: str = ""
    """Hash of the token that the agent itself shows."""
    plugins: dict[str, dict[str, Any]] = {}
    """Tables of the plugins that bring guards."""
    observation: ObservationOptions = ObservationOptions()


async def serve(arguments: GatewayArguments) -> None:
    """Serve until the daemon is gone or SIGTERM comes; answers under way may finish within `DRAIN_S`."""
    control_path = Path(arguments.control_path)
    routes = LanguageRoutes(control_path)
    upstream = Upstream(routes)
    admission = Admission(arguments.streams_cap, arguments.queue, arguments.queue_wait_s)
    observation = open_observation(arguments.observation)
    reporter = MetricsReporter(FRONT, control_path)
    gateway = Gateway(
        doors=msgspec.convert(arguments, Doors, from_attributes=True),
        limits=msgspec.convert(arguments, Limits, from_attributes=True),
        keeper=_keeper(arguments),
        rates=Rates(arguments.rates, 1 / arguments.processes),
        admission=admission,
        routes=routes,
        upstream=upstream,
        guards=_guards(arguments),
        reporter=reporter,
        observation=observation,
        control_path=control_path,
    )
    FRONT.refresh_with(lambda: _gauge(admission, routes))
    follower = asyncio.create_task(routes.follow(), name="routes")
    told = asyncio.create_task(routes.told(), name="told")
    reporting = asyncio.create_task(reporter.run(), name="metrics")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, follower.cancel)
    await asyncio.wait({follower, told}, return_when=asyncio.FIRST_COMPLETED)  # till then clients wait to be accepted
    server = GatewayServer(gateway.handle, arguments.connections_cap, arguments.request_timeout_s)
    runner = web.ServerRunner(server, shutdown_timeout=DRAIN_S)
    await runner.setup()
    with socket.socket(fileno=arguments.listen_fd) as listener:
        listener.setblocking(False)
        await web.SockSite(runner, listener).start()
        gc.freeze()  # what is loaded now stays
        await asyncio.wait({follower})
        await runner.cleanup()
    for task in (told, reporting):
        task.cancel()
    await asyncio.gather(told, reporting, return_exceptions=True)
    await upstream.close()
    observation.close()


def _keeper(arguments: GatewayArguments) -> TokenKeeper:
    path = Path(arguments.tokens_file) if arguments.tokens_file else None
    return TokenKeeper(path, arguments.agent_sha256)


def _guards(arguments: GatewayArguments) -> Guards:
    """The guards that plugins bring. Raises PluginError where one that is required cannot be loaded."""
    registry = Registry()
    registry.load(arguments.plugins)
    found: list[Guard] = [guard for _, guard in registry.collect("millhand_guards")]
    log.info("guards: %s", ", ".join(guard.name for guard in found) or "none")
    audit = Audit(Path(arguments.data_dir) / FILE, arguments.audit_bytes_cap, arguments.audit)
    return Guards(found, audit)


def _gauge(admission: Admission, routes: LanguageRoutes) -> None:
    for route in routes.all:
        metrics.WAITING.set(admission.waiting[route.name], model_name=route.name)
        metrics.RUNNING.set(routes.running(route), model_name=route.name)


def main() -> None:
    """Entry point of the process."""
    arguments = msgspec.json.decode(sys.argv[1], type=GatewayArguments)
    configure_logs(arguments.observation.log)
    event_loop.run(serve(arguments))


if __name__ == "__main__":
    main()
