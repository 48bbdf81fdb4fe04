"""`millhand model recorded`: the real inputs of a model that this node keeps."""

from __future__ import annotations

from typing import Any

import click

from millhand.cli.alert import moment
from millhand.cli.output import Output, json_option, labelled, wrapped
from millhand.errors import ControlError

KIB = 1024


@click.command("recorded", short_help="Show the real inputs of a model that this node keeps.")
@click.argument("name")
@click.option("--forget", is_flag=True, help="Delete them.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, forget: bool) -> None:
    """Show how many real inputs of model NAME this node keeps, and from when.

    They are a uniform sample of what assets made the model judge; lower precisions are fitted to them. They never leave
    the node. `[recording]` says how many are kept.
    """
    output: Output = ctx.obj
    try:
        facts = output.daemon().call("model.forget" if forget else "model.recorded", model=name)
    except ControlError as error:
        if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise
        facts = _offline(output, name, forget)
    output.emit(facts, f"What was recorded of {name} is deleted." if forget else _describe(name, facts))


def _offline(output: Output, name: str, forget: bool) -> dict[str, Any]:
    """Look at the file where no daemon runs. Raises ModelError for a model that is not known."""
    import asyncio

    from millhand.cli.model import offline_pool
    from millhand.pipeline.recorder import Recorder

    config = output.config()
    recorder = Recorder(config.node.data_dir, config.recording)
    if forget:
        asyncio.run(recorder.forget(name))
    facts: dict[str, Any] = asyncio.run(recorder.facts(name))
    if not facts["rows"]:
        offline_pool(output).manifest(name)
    return facts


def _describe(name: str, facts: dict[str, Any]) -> list[str]:
    if not facts["rows"]:
        return wrapped(f"Nothing is recorded of {name}: no asset has made it judge a window since.")
    assets = ", ".join(f"{asset} {count:,}" for asset, count in facts["assets"].items())
    inputs = ", ".join(f"{tensor} {shape}" for tensor, shape in facts["inputs"].items())
    shown = [
        ("rows", f"{facts['rows']:,}, a sample of {facts['seen']:,}"),
        ("from", f"{moment(facts['since_ns'])} to {moment(facts['until_ns'])}"),
        ("assets", assets),
        ("inputs", f"{inputs}, {facts['bytes'] / KIB:.1f} KiB"),
        ("file", facts["path"]),
        ("error", facts["error"]),
    ]
    return [line for label, text in shown if text for line in labelled(label, text)]
