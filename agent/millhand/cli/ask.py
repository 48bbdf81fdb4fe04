"""`millhand ask`: a question to the node's language model, answered from the plant's own manuals."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from millhand.cli.output import Output, json_option, plural, wrapped

ANSWER_TIMEOUT_S = 600.0
NEW = "new"


@click.command("ask")
@click.argument("question", required=False)
@click.option("--asset", default="", help="The machine that it is about: its manuals come first.")
@click.option("--order", "order_id", default="", help="The work order that it is about (the beginning of its id).")
@click.option(
    "--conversation",
    "-c",
    "conversation",
    default=NEW,
    show_default=True,
    help="Go on with this one (the beginning of its id, or 'last').",
)
@click.option("--language", default="en", show_default=True, help="Language of prompts and terms: en, zh.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, question: str | None, asset: str, order_id: str, conversation: str, language: str
) -> None:
    """Ask QUESTION ('-' or nothing reads standard input); the answer comes as it is written, with its sources.

    What was said is kept on this node: see 'millhand conversation'.
    """
    output: Output = ctx.obj
    daemon = output.daemon(timeout_s=ANSWER_TIMEOUT_S)
    text = sys.stdin.read() if question in (None, "-") else str(question)
    known = "" if conversation == NEW else conversation
    events = daemon.stream(
        "ask", question=text, asset=asset, order_id=order_id, conversation_id=known, language=language
    )
    if output.as_json:
        gathered: dict[str, Any] = {"answer": "", "sources": [], "notices": []}
        for event in events:
            gathered["answer"] += event.get("text", "")
            gathered["sources"] += event.get("sources", [])
            gathered["notices"] += [event["notice"]] if "notice" in event else []
            gathered.update(event.get("end", {}))
        click.echo(json.dumps(gathered, ensure_ascii=False))
        return
    sources: dict[str, str] = {}
    for event in events:
        sources |= {source["label"]: source["place"] for source in event.get("sources", [])}
        _show(event, sources)


def _show(event: dict[str, Any], sources: dict[str, str]) -> None:
    """Print one event as it comes; what is no answer goes to stderr."""
    if "sources" in event:
        count = len(event["sources"])
        click.echo(f"The model reads {plural(count, 'passage') if count else 'the question'} ...", err=True)
    elif "waited_s" in event:
        if sys.stderr.isatty():
            click.echo(f"\r{event['waited_s']:.0f} s\r", nl=False, err=True)
    elif "text" in event:
        click.echo(event["text"], nl=False)
        sys.stdout.flush()
    elif "notice" in event:
        click.echo("\n".join(wrapped(event["notice"], "Note: ")), err=True)
    elif "end" in event:
        click.echo()
        end = event["end"]
        # A small model is not asked to name its sources: all that it was given are shown.
        for label, place in (end["citations"] if end["cites"] else sources).items():
            click.echo(f"  [{label}] {place}")
        if end["unknown_citations"]:
            text = f"the answer names sources that were not given: {', '.join(end['unknown_citations'])}"
            click.echo("\n".join(wrapped(text, "Note: ")), err=True)
        elif end["cites"] and not end["citations"]:
            click.echo("Note: the answer names no source; check it before you rely on it.", err=True)
        click.echo(f"Conversation {end['conversation']['id'][:8]}", err=True)
