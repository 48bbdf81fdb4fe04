"""`millhand order`: list and show work orders."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from millhand.cli.alert import id_text, moment
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, shorten, table


@click.group("order")
def command() -> None:
    """List and show work orders."""


@command.command("list")
@click.option("--asset", help="Only orders for this asset.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@json_option
@click.pass_context
def list_(ctx: click.Context, asset: str | None, limit: int) -> None:
    """List work orders, newest first."""
    output: Output = ctx.obj
    orders = output.daemon().call("order.list", asset=asset, limit=limit)
    rows = [
        (o["id"][:8], moment(o["created_ns"]), o["asset"], o["priority"], shorten(o["symptom"], 32)) for o in orders
    ]
    text = table(["id", "created", "asset", "priority", "symptom"], rows) if rows else ["No work orders."]
    output.emit(orders, text)


@command.command("show")
@click.argument("order_id", callback=id_text)
@json_option
@click.pass_context
def show(ctx: click.Context, order_id: str) -> None:
    """Show ORDER_ID whole (its first 4 characters are enough)."""
    output: Output = ctx.obj
    order = output.daemon().call("order.show", order_id=order_id)
    output.emit(order, order_lines(order))


def order_lines(order: dict[str, Any]) -> list[str]:
    """Lay one work order out within 80 columns."""
    lines = [f"Work order {order['id']}", f"Asset      {order['asset']}", f"Priority   {order['priority']} of 4"]
    for label, text in (("Symptom", order["symptom"]), ("Cause", order["likely_cause"])):
        lines += textwrap.wrap(text, LINE_CHARACTERS, initial_indent=f"{label:<11}", subsequent_indent=" " * 11)
    lines.append("Action")
    for number, step in enumerate(order["action"], 1):
        lines += textwrap.wrap(step, LINE_CHARACTERS, initial_indent=f"  {number}. ", subsequent_indent=" " * 5)
    lines.append(f"Alert      {order['alert_id']}, written by {order['writer']}")
    return lines
