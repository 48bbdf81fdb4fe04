"""`millhand gateway`: who may ask the node's language model, and what guards decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millhand.cli.alert import moment
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, table, wrapped
from millhand.errors import ConfigError, InputError, suggestion


@click.group("gateway")
def command() -> None:
    """Tokens of the gateway's clients, and what guards decided."""


@command.command("token", short_help="Make a token for a client.")
@click.argument("name")
@click.option("--role", default="operator", show_default=True, help="What limits and guards know the client by.")
@json_option
@click.pass_context
def token(ctx: click.Context, name: str, role: str) -> None:
    """Make a token for the client NAME and print it, this once: [gateway] tokens_file keeps its hash only.

    A running gateway takes it within a second.
    """
    from millhand.serving.openai.tokens import add_token

    output: Output = ctx.obj
    made = add_token(_tokens_file(output), name, role)
    output.emit({"name": name, "role": role, "token": made}, made)


@command.command("tokens", short_help="List whose tokens hold.")
@json_option
@click.pass_context
def tokens(ctx: click.Context) -> None:
    """List the clients that have a token."""
    from millhand.serving.openai.tokens import read_tokens

    output: Output = ctx.obj
    path = _tokens_file(output)
    found = read_tokens(path) if path.exists() else []
    rows = [(one.name, one.role, one.sha256[:12]) for one in found]
    text = table(["name", "role", "sha256"], rows) if rows else ["No tokens: nobody may ask."]
    output.emit([one._asdict() for one in found], text)


@command.command("revoke", short_help="Take a client's token back.")
@click.argument("name")
@json_option
@click.pass_context
def revoke(ctx: click.Context, name: str) -> None:
    """Take the token of the client NAME back; a running gateway knows it within a second."""
    from millhand.serving.openai.tokens import read_tokens, write_tokens

    output: Output = ctx.obj
    path = _tokens_file(output)
    found = read_tokens(path)
    left = [one for one in found if one.name != name]
    if len(left) == len(found):
        names = [one.name for one in found]
        raise InputError(f"'{name}' has no token{suggestion(name, names)}", hint="millhand gateway tokens")
    write_tokens(path, left)
    output.emit({"name": name, "revoked": True}, f"The token of '{name}' holds no more.")


@command.command("audit", short_help="Show what guards decided.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="The newest so many.")
@click.option("--rule", default="", help="Only of rules whose name begins so.")
@click.option("--verbose", is_flag=True, help="Whole reasons, and who asked which model.")
@json_option
@click.pass_context
def audit(ctx: click.Context, limit: int, rule: str, verbose: bool) -> None:
    """Show what guards decided, newest last. Of the texts only hashes are kept."""
    from millhand.serving.openai.audit import FILE, decisions

    output: Output = ctx.obj
    path = output.config().node.data_dir / FILE
    found = [one for one in decisions(path) if one["rule"].startswith(rule)][-limit:]
    rows = [
        (moment(int(one["time"] * 1e9)), one["stage"], one["action"], one["rule"], one["role"], one["reason"])
        for one in found
    ]
    headers = ["when", "stage", "action", "rule", "role", "reason"]
    lines = [line for one in found for line in _whole(one)] if verbose else table(headers, rows, LINE_CHARACTERS)
    output.emit(found, lines if found else ["Guards have found nothing."])


def _whole(one: dict[str, Any]) -> list[str]:
    """One decision with everything that is kept of it."""
    who = one["caller"] or "a client without a token"
    return [
        f"{moment(int(one['time'] * 1e9))}  {one['stage']}: {one['action']} by {one['guard']}, rule {one['rule']}",
        *wrapped(one["reason"] or "no reason was given", "  ", "  "),
        *wrapped(f"asked by {who}{f' ({role})' if (role := one['role']) else ''} of {one['model']};", "  ", "  "),
        *wrapped(
            f"a text of {one['characters']} characters from: {one['source']}; SHA-256 {one['sha256']}", "  ", "  "
        ),
    ]


def _tokens_file(output: Output) -> Path:
    path = output.config().gateway.tokens_file
    if path is None:
        raise ConfigError(
            "[gateway] names no tokens_file, so no token is asked for",
            hint='set tokens_file = "/etc/millhand/tokens" in [gateway]',
        )
    return path
