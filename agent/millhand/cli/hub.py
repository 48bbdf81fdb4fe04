"""`millhand hub`: run and query the central hub."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millhand.cli.alert import moment
from millhand.cli.output import Output, json_option, shorten, table

if TYPE_CHECKING:
    from millhand_hub.settings import HubSettings

hub_config = click.option(
    "--hub-config", type=click.Path(path_type=Path), envvar="MILLHAND_HUB_CONFIG", help="The hub's TOML file."
)


@click.group("hub")
def command() -> None:
    """Run and query the central hub."""


def _settings(path: Path | None) -> HubSettings:
    from millhand_hub.settings import load_settings

    return load_settings(path)


@command.command("run")
@hub_config
def run(hub_config: Path | None) -> None:
    """Receive, store and acknowledge what nodes report, until SIGTERM or Ctrl-C."""
    from millhand.logs import configure_logs
    from millhand_hub import receiver

    settings = _settings(hub_config)
    configure_logs(settings.log)
    receiver.run(settings)


@command.command("health")
@hub_config
@json_option
@click.pass_context
def health(ctx: click.Context, hub_config: Path | None) -> None:
    """Exit with 0 while the broker knows the hub as online; else with 1. For health checks of containers and probes."""
    import asyncio

    from millhand_hub.presence import online_since_ms

    output: Output = ctx.obj
    since_ms = asyncio.run(online_since_ms(_settings(hub_config)))
    output.emit({"online": True, "since_ms": since_ms}, f"online since {_time(since_ms)}")


@command.command("nodes")
@hub_config
@json_option
@click.pass_context
def nodes(ctx: click.Context, hub_config: Path | None) -> None:
    """List the nodes and what the hub holds of them."""
    from millhand_hub import queries

    output: Output = ctx.obj
    with queries.opened(_settings(hub_config).database_path) as database:
        found = queries.nodes(database)
    rows = [
        (
            n["group"],
            n["node"],
            "yes" if n["online"] else "no",
            _time(n["seen_ms"]),
            n["assets"],
            n["rows"],
            n["open_alerts"],
        )
        for n in found
    ]
    heads = ["group", "node", "online", "last seen", "assets", "rows", "open alerts"]
    output.emit(found, table(heads, rows) if rows else ["No node has reported yet."])


@command.command("alerts")
@click.option("--state", type=click.Choice(["open", "acked", "cleared"]), help="Only alerts in this state.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@hub_config
@json_option
@click.pass_context
def alerts(ctx: click.Context, state: str | None, limit: int, hub_config: Path | None) -> None:
    """List alerts of all nodes, newest first."""
    from millhand_hub import queries

    output: Output = ctx.obj
    with queries.opened(_settings(hub_config).database_path) as database:
        found = queries.alerts(database, state, limit)
    rows = [(moment(a["raised_ns"]), a["node"], a["asset"], a["severity"], a["kind"], a["state"]) for a in found]
    output.emit(
        found, table(["raised", "node", "asset", "severity", "kind", "state"], rows) if rows else ["No alerts."]
    )


@command.command("orders")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@hub_config
@json_option
@click.pass_context
def orders(ctx: click.Context, limit: int, hub_config: Path | None) -> None:
    """List work orders of all nodes, newest first."""
    from millhand_hub import queries

    output: Output = ctx.obj
    with queries.opened(_settings(hub_config).database_path) as database:
        found = queries.orders(database, limit)
    rows = [(moment(o["created_ns"]), o["node"], o["asset"], o["priority"], shorten(o["symptom"], 28)) for o in found]
    output.emit(
        found, table(["created", "node", "asset", "priority", "symptom"], rows) if rows else ["No work orders."]
    )


def _time(time_ms: int | None) -> str:
    return "" if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
