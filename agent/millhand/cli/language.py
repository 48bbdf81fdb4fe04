"""`millhand language`: the language model of this node and its servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import Output, json_option, plural, wrapped
from millhand.errors import MillhandError

if TYPE_CHECKING:
    from millhand.hardware import Hardware
    from millhand.profiles import Match

LABEL_CHARACTERS = 12
TEXT_CHARACTERS = 60


@click.group("language")
def command() -> None:
    """Show and restart the language model's servers."""


@command.command("show")
@json_option
@click.pass_context
def show(ctx: click.Context) -> None:
    """Show which server serves the language model, why, and how it stands with it."""
    output: Output = ctx.obj
    data = output.daemon().call("language.show")
    lines = [line for label, text in _facts(data) for line in _wrap(label, text)]
    output.emit(data, lines)


@command.command("restart")
@click.argument("replica", default="")
@json_option
@click.pass_context
def restart(ctx: click.Context, replica: str) -> None:
    """Start the server REPLICA anew; without a name all of them, with a new look at what suits the node."""
    output: Output = ctx.obj
    names = output.daemon().call("language.restart", replica=replica)
    output.emit({"restarted": names}, [f"started anew: {', '.join(names)} (millhand language show)"])


def served_by(output: Output, match: Match, hardware: Hardware) -> list[str]:
    """Which server would serve the configured language model on such a node, and why; nothing without a model."""
    from millhand.language.library import open_library
    from millhand.language.plan import make_plan, servers_of
    from millhand.registry import Registry

    config = output.config()
    if not config.language.model:
        return []
    registry = Registry()
    registry.load(config.plugin_tables())
    try:
        plan = make_plan(config.language, open_library(config), servers_of(registry), match, hardware)
        text = "; ".join(plan.reasons)
    except MillhandError as error:
        text = error.text
    return _wrap("Served by", f"'{config.language.model}': {text}")


def _facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if data["state"] == "off":
        yield "Model", "none: name one as [language] model"
        return
    yield "Model", ", ".join(part for part in (data["name"], data["precision"], data["path"]) if part)
    yield "State", data["state"]
    yield from _trouble(data["reason"], data["hint"])
    for index, reason in enumerate(data["why"]):
        yield "" if index else "Why", reason
    if data["server"]:
        yield "Server", f"{data['server']}: {', '.join(data['abilities'])}"
        slots = f"{data['slots']} at once for each process"
        yield "Context", f"{data['context_tokens']} tokens, {slots}"
    for replica in data["replicas"]:
        yield from _replica(replica)


def _replica(replica: dict[str, Any]) -> Iterator[tuple[str, str]]:
    place = f" at {replica['url']}" if replica["url"] else ""
    where = ", ".join(replica["accelerators"]) or "the CPU"
    restarts = f", started again {plural(replica['restarts'], 'time')}" if replica["restarts"] else ""
    yield "Process", f"{replica['name']}: {replica['state']}{place} on {where}{restarts}"
    yield from _trouble(replica["reason"], replica["hint"])
    proof, figures = replica["proof"], replica["figures"]
    if proof is not None:
        text = proof["text"].replace("\n", " ")[:TEXT_CHARACTERS]
        yield "", f"proved by {proof['tokens']} tokens in {proof['seconds']:.2f} s: {text}"
    if figures["running"] is not None:
        yield "", f"{figures['running']:.0f} running, {figures['waiting'] or 0:.0f} waiting"
    yield "", f"log: {replica['log']}"


def _trouble(reason: str, hint: str) -> Iterator[tuple[str, str]]:
    if reason:
        yield "", reason
    if reason and hint:
        yield "", f"Try: {hint}"


def _wrap(label: str, text: str) -> list[str]:
    return wrapped(text, f"{label:<{LABEL_CHARACTERS}}", " " * LABEL_CHARACTERS)
