"""`millhand alert`: list and acknowledge alerts."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import Any

import click

from millhand.cli.output import Output, json_option, table


def id_text(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse an id that is empty: as a beginning it would fit every one."""
    if not value.strip():
        raise click.BadParameter("an id is not empty", ctx, parameter)
    return value.strip()


@click.group("alert")
def command() -> None:
    """List and acknowledge alerts."""


def moment(time_ns: int) -> str:
    """Unix nanoseconds as UTC text to the second."""
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@command.command("list")
@click.option("--state", type=click.Choice(["open", "acked", "cleared"]), help="Only alerts in this state.")
@click.option("--asset", help="Only alerts of this asset.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@json_option
@click.pass_context
def list_(ctx: click.Context, state: str | None, asset: str | None, limit: int) -> None:
    """List alerts, newest first."""
    output: Output = ctx.obj
    alerts = output.daemon().call("alert.list", state=state, asset=asset, limit=limit)
    rows = [(a["id"][:8], moment(a["raised_ns"]), a["asset"], a["severity"], a["kind"], a["state"]) for a in alerts]
    text = table(["id", "raised", "asset", "severity", "kind", "state"], rows) if rows else ["No alerts."]
    output.emit(alerts, text)


@command.command("ack")
@click.argument("alert_id", callback=id_text)
@click.option("--by", default=None, help="Who acknowledges. Default: your user name.")
@json_option
@click.pass_context
def ack(ctx: click.Context, alert_id: str, by: str | None) -> None:
    """Acknowledge ALERT_ID (its first 4 characters are enough)."""
    output: Output = ctx.obj
    alert: dict[str, Any] = output.daemon().call("alert.ack", alert_id=alert_id, by=by or getpass.getuser())
    done = "was acknowledged already" if alert["already_acked"] else "is acknowledged"
    output.emit(alert, f"Alert {alert['id'][:8]} on {alert['asset']} {done} by {alert['acked_by']}.")
