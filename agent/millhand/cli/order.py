"""`millhand order`: list, show and edit work orders."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from millhand.cli.alert import id_text, moment
from millhand.cli.output import Output, json_option, plural, shorten, table, wrapped
from millhand.errors import InputError

FIELDS = ("symptom", "likely_cause", "action", "priority", "parts", "tools", "skill", "minutes")


@click.group("order")
def command() -> None:
    """List, show and edit work orders."""


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
@click.option("--versions", is_flag=True, help="Every version, oldest first.")
@json_option
@click.pass_context
def show(ctx: click.Context, order_id: str, versions: bool) -> None:
    """Show ORDER_ID whole (its first 4 characters are enough)."""
    output: Output = ctx.obj
    if versions:
        found = output.daemon().call("order.versions", order_id=order_id)
        output.emit(found, [line for order in found for line in (*order_lines(order), "")][:-1])
        return
    order = output.daemon().call("order.show", order_id=order_id)
    output.emit(order, order_lines(order))


@command.command("edit")
@click.argument("order_id", callback=id_text)
@click.option("--symptom", help="What is seen.")
@click.option("--cause", "likely_cause", help="The likely cause.")
@click.option("--step", "action", multiple=True, help="A step; all of them, in order, take the place of the old ones.")
@click.option("--part", "parts", multiple=True, help="A part that is needed; all of them, as steps.")
@click.option("--tool", "tools", multiple=True, help="A tool that is needed; all of them, as steps.")
@click.option("--skill", help="The trade that it needs.")
@click.option("--minutes", type=click.IntRange(0), help="How long the work takes; 0: not known.")
@click.option("--priority", type=click.IntRange(1, 4), help="1 (now) to 4 (next planned stop).")
@click.option("--by", default=None, help="Who edits. Default: your user name.")
@json_option
@click.pass_context
def edit(ctx: click.Context, /, order_id: str, by: str | None, **changes: Any) -> None:
    """Change ORDER_ID: what you write becomes its newest version.

    Without a field to change, your editor opens with the order as JSON. The old versions stay.
    """
    output: Output = ctx.obj
    daemon = output.daemon()
    order = daemon.call("order.show", order_id=order_id)
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    wanted = {name: value for name, value in given.items() if value not in (None, [])} or _from_editor(order)
    edited = daemon.call(
        "order.edit", order_id=order["id"], changes=wanted, by=by or getpass.getuser(), revision=order["revision"]
    )
    output.emit(edited, order_lines(edited))


def _from_editor(order: dict[str, Any]) -> dict[str, Any]:
    """What a person changed in the editor. Raises InputError for what is no JSON, or nothing."""
    before = {name: order[name] for name in FIELDS}
    text = click.edit(json.dumps(before, indent=2, ensure_ascii=False) + "\n", extension=".json")
    try:
        after = before if text is None else json.loads(text)
    except ValueError as error:
        raise InputError(f"what you wrote is no JSON: {error}", hint="edit again and keep quotes and commas") from error
    if not isinstance(after, dict):
        raise InputError("what you wrote is no JSON object", hint="edit again and keep the outer braces")
    return {name: value for name, value in after.items() if before.get(name) != value}


@command.command("export-pairs")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@click.pass_context
def export_pairs(ctx: click.Context, path: Path) -> None:
    """Write what technicians made of orders to PATH as JSON lines: `before`, `after`.

    Each line is a training pair: the version that a machine wrote, and the edited one.
    """
    output: Output = ctx.obj
    daemon, place, pairs = output.daemon(), 0, 0
    try:
        with path.open("x", encoding="utf-8") as file:
            while found := daemon.call("order.pairs", after=place):
                file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found)
                place, pairs = found[-1]["place"], pairs + len(found)
    except FileExistsError as error:
        raise InputError(f"'{path}' exists already", hint="name a new file") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}", hint="check folder and disk") from error
    output.emit({"pairs": pairs, "path": str(path)}, f"{plural(pairs, 'pair')} in {path}.")


def order_lines(order: dict[str, Any]) -> list[str]:
    """Lay one work order out within 80 columns."""
    lines = [f"Work order {order['id']}", f"Asset      {order['asset']}", f"Priority   {order['priority']} of 4"]
    lines += [*_field("Symptom", order["symptom"]), *_field("Cause", order["likely_cause"]), "Action"]
    for number, step in enumerate(order["action"], 1):
        lines += wrapped(step, f"  {number}. ", " " * 5)
    minutes = plural(order["minutes"], "minute") if order["minutes"] else ""
    for label, text in (
        ("Parts", "; ".join(order["parts"])),
        ("Tools", "; ".join(order["tools"])),
        ("Skill", order["skill"]),
        ("Time", minutes),
    ):
        lines += _field(label, text)
    lines += _grounds(order)
    lines.append(f"Alert      {order['alert_id']}, written by {order['writer']}")
    return lines


def _grounds(order: dict[str, Any]) -> Iterator[str]:
    """What the order rests on, what was taken out of it, and which version it is."""
    for citation in order["citations"]:
        yield from _field("Source", citation["place"])
    for struck in order["struck"]:
        yield from _field("Struck", f"{struck['field']}: '{struck['text']}', {struck['why']}")
    if order["revision"] > 1:
        yield f"Version    {order['revision']}, of {moment(order['revised_ns'])}"


def _field(label: str, text: str) -> list[str]:
    return wrapped(text, f"{label:<11}", " " * 11) if text else []
