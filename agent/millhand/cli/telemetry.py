"""`millhand telemetry`: what goes to the hub."""

from __future__ import annotations

import json
from typing import Any

import click

from millhand.cli.alert import moment
from millhand.cli.output import Output, json_option


@click.group("telemetry")
def command() -> None:
    """Show and follow what goes to the hub."""


@command.command("status")
@json_option
@click.pass_context
def status(ctx: click.Context) -> None:
    """Show the connection, the queue and the acknowledgements."""
    output: Output = ctx.obj
    answer = output.daemon().call("telemetry.status")
    output.emit(answer, _lines("", answer))


@command.command("tail")
@click.option("--count", "-n", type=click.IntRange(1), help="Stop after so many rows. Default: go on.")
@json_option
@click.pass_context
def tail(ctx: click.Context, count: int | None) -> None:
    """Follow the rows as they enter the outbox."""
    output: Output = ctx.obj
    for row in output.daemon(timeout_s=3600).stream("telemetry.tail", count=count):
        if output.as_json:
            click.echo(json.dumps(row))
        else:
            line = f"{moment(row['created_ns'])}  {row['stream']:<5} {row['seq']:>8}  {row['asset']:<16} {row['text']}"
            click.echo(line)


def _lines(prefix: str, value: dict[str, Any]) -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += _lines(f"{prefix}{key}.", item)
        else:
            lines.append(f"{prefix + key:<32} {item}")
    return lines
