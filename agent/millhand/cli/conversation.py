"""`millhand conversation`: what was asked and answered on this node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from millhand.cli.alert import id_text, moment
from millhand.cli.output import Output, json_option, plural, shorten, table, wrapped


@click.group("conversation")
def command() -> None:
    """List, show, export and delete conversations with the language model."""


@command.command("list")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@json_option
@click.pass_context
def list_(ctx: click.Context, limit: int) -> None:
    """List conversations, newest first."""
    output: Output = ctx.obj
    found = output.daemon().call("conversation.list", limit=limit)
    rows = [
        (known["id"][:8], moment(known["changed_ns"]), known["asset"] or "-", shorten(known["title"], 38))
        for known in found
    ]
    output.emit(found, table(["id", "changed", "asset", "title"], rows) if rows else ["No conversations."])


@command.command("show")
@click.argument("conversation_id", callback=id_text)
@json_option
@click.pass_context
def show(ctx: click.Context, conversation_id: str) -> None:
    """Show CONVERSATION_ID whole (its first 4 characters are enough)."""
    output: Output = ctx.obj
    found = output.daemon().call("conversation.show", conversation_id=conversation_id)
    output.emit(found, list(_lines(found)))


@command.command("export")
@json_option
@click.pass_context
def export(ctx: click.Context) -> None:
    """Print every conversation as JSON, one a line."""
    output: Output = ctx.obj
    daemon = output.daemon()
    for known in daemon.call("conversation.list", limit=1000):
        click.echo(json.dumps(daemon.call("conversation.show", conversation_id=known["id"]), ensure_ascii=False))


@command.command("delete")
@click.argument("conversation_id", required=False, default="")
@click.option("--all", "everything", is_flag=True, help="Delete all of them.")
@json_option
@click.pass_context
def delete(ctx: click.Context, conversation_id: str, everything: bool) -> None:
    """Forget CONVERSATION_ID, or all; what lay in the store's file is overwritten."""
    output: Output = ctx.obj
    done = output.daemon().call("conversation.delete", conversation_id=conversation_id, all=everything)
    output.emit(done, f"{plural(done['deleted'], 'conversation')} deleted.")


def _lines(known: dict[str, Any]) -> Iterator[str]:
    about = [f"{name} {known[key]}" for name, key in (("asset", "asset"), ("order", "order_id")) if known[key]]
    yield f"Conversation {known['id']}, {', '.join([moment(known['changed_ns']), *about])}"
    for turn in known["turns"]:
        yield ""
        yield from wrapped(turn["text"], "> " if turn["role"] == "user" else "", "> " if turn["role"] == "user" else "")
        for citation in turn["citations"]:
            yield f"  ({citation['place']})"
