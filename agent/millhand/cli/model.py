"""`millhand model`: the models of this node."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import LINE_CHARACTERS, Output, json_option, table
from millhand.errors import ControlError

if TYPE_CHECKING:
    from millhand.serving.pool import ModelPool


@click.group("model")
def command() -> None:
    """List and show models."""


@command.command("list")
@json_option
@click.pass_context
def list_models(ctx: click.Context) -> None:
    """List the models of the repository and what serves now."""
    output: Output = ctx.obj
    models, running = _ask(output, "model.list")
    rows = [
        (model["name"], model["state"], _numbers(model["versions"]), _proofs(model), model["reason"])
        for model in models
    ]
    lines = table(("model", "state", "serves", "proof", "reason"), rows) if rows else ["The repository has no model."]
    if not running:
        lines.append("The daemon does not run: this is what is on disk.")
    output.emit(models, lines)


@command.command("show")
@click.argument("name")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show model NAME: what it takes and gives, its versions, and why it does not serve."""
    output: Output = ctx.obj
    model, running = _ask(output, "model.show", model=name)
    output.emit(model, _describe(model, running))


def _ask(output: Output, call: str, **arguments: Any) -> tuple[Any, bool]:
    """Ask the daemon; where none runs, read the repository. Returns (answer, whether a daemon answered)."""
    try:
        return output.daemon().call(call, **arguments), True
    except ControlError as error:
        if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise
        pool = _offline_pool(output)
        answer = pool.index() if call == "model.list" else pool.metadata(arguments["model"])
        return answer, False


def _offline_pool(output: Output) -> ModelPool:
    """A pool that starts no worker: it says what is on disk."""
    from millhand.registry import Registry
    from millhand.serving.pool import ModelPool
    from millhand.serving.repository import Repository
    from millhand.serving.settings import WorkerDefaults

    config = output.config()
    registry = Registry()
    registry.load(config.plugin_tables())
    shipped = [Path(folder) for _, folder in registry.collect("millhand_models")]
    repository = Repository.from_settings(config.models, shipped)
    return ModelPool(repository, config.models, [WorkerDefaults()], registry, config.node.run_dir)


def _describe(model: dict[str, Any], running: bool) -> list[str]:
    facts = [
        ("model", f"{model['name']}: {model['description']}"),
        ("state", model["state"] if running else "the daemon does not run"),
        ("reason", model["reason"]),
        ("serves", f"{_numbers(model['versions'])} of {_numbers(model['available'])}, policy {model['policy']}"),
        ("proof", _proofs(model)),
        ("backend", f"{model['backend']}, at most {model['max_batch']} rows a batch"),
        ("worker", model["worker"]),
        ("gpu", "; ".join(_evidence(*item) for item in model.get("accelerator", {}).items())),
        ("needs", ", ".join(model["needs"])),
        ("rules", ", ".join(model["rules"])),
        ("licence", model["licence"]),
        ("folder", model["path"]),
    ]
    lines = []
    for label, text in facts:
        lines += textwrap.wrap(str(text), LINE_CHARACTERS, initial_indent=f"{label:<9}", subsequent_indent=" " * 9)
    rows = [
        (role, tensor["name"], tensor["datatype"], str(tensor["shape"]), tensor["unit"])
        for role in ("inputs", "outputs")
        for tensor in model[role]
    ]
    lines += ["", *table(("tensors", "name", "datatype", "shape", "unit"), rows)]
    if model["steps"]:
        steps = [(step["step"], step["version"] or "-", _microseconds(step["compute_us"])) for step in model["steps"]]
        lines += ["", *table(("steps", "version", "time of a batch"), steps)]
    return lines


def _microseconds(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us:.0f} µs"


def _numbers(versions: list[int]) -> str:
    return ", ".join(map(str, versions)) or "-"


def _proofs(model: dict[str, Any]) -> str:
    return ", ".join(f"{version} {state}" for version, state in model.get("proof", {}).items())


def _evidence(version: str, proof: dict[str, Any]) -> str:
    """What a session proved of the accelerator at its load, in words."""
    where = f"{version}: {proof['gpu_nodes']} of {proof['nodes']} nodes on {proof['provider']}"
    if proof["max_difference"] is None:
        return f"{where}, the CPU cannot run it"
    return f"{where}, answers within {proof['max_difference']:.1g} of the CPU's"
