"""`millhand health`: for whatever restarts an agent that does not answer."""

from __future__ import annotations

import time

import click

from millhand.cli.output import Output, json_option
from millhand.errors import ControlError

DEADLINE_S = 10.0
"""A daemon whose store does not answer for so long is not healthy; its own watchdog asks as often."""


@click.command("health")
@json_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Exit with 0 while the agent answers, its store too; else with 1. For health checks of containers and probes."""
    output: Output = ctx.obj
    begun_s = time.monotonic()
    state = output.daemon(DEADLINE_S).call("state")
    if not state["ready"]:
        raise ControlError("the agent is not ready yet", hint="see its log, or 'millhand check'")
    took_ms = (time.monotonic() - begun_s) * 1000
    output.emit(
        {"ready": True, "answer_ms": round(took_ms, 1), "uptime_s": state["uptime_s"]}, f"ready, {took_ms:.0f} ms"
    )
