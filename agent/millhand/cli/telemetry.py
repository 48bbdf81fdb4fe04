"""`millhand telemetry`: what goes to the hub."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from millhand.cli.alert import moment
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, plural
from millhand.cli.state import hub_fault


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
    output.emit(answer, _lines(answer))


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


def _lines(status: dict[str, Any]) -> list[str]:
    """The publisher's state for people."""
    if not status["enabled"]:
        return ["Telemetry is off: no broker is configured.", "Try: set [telemetry] brokers"]
    acked = ", ".join(f"{stream} {number} of {status['last'][stream]}" for stream, number in status["acked"].items())
    facts = [
        ("Connected", "yes" if status["connected"] else "no"),
        ("Broker", status["broker"]),
        ("Hub", hub_fault(status)),
        ("Waiting", f"{plural(status['queued_rows'], 'row')}, the oldest since {status['oldest_unsent_s']:g} s"),
        ("Acknowledged", acked),
        (
            "Sent",
            f"{plural(status['sent'], 'row')}, {status['resent']} again; now {status['sent_rows_per_s']:g} a second",
        ),
        ("Last error", status["error"]),
        ("Try", status["hint"] if status["error"] else ""),
    ]
    lines = []
    for label, text in facts:
        lines += textwrap.wrap(text, LINE_CHARACTERS, initial_indent=f"{label:<14}", subsequent_indent=" " * 14)
    return lines
