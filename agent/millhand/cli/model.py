"""`millhand model`: the models of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from millhand.cli import bench, build, compare, language_model, proof, prove, recorded
from millhand.cli.output import Output, json_option, table, table_with_reasons, wrapped
from millhand.errors import ControlError

if TYPE_CHECKING:
    from millhand.serving.pool import ModelPool

KIB = 1024
UNREAD = {"state": "unloaded", "memory_bytes": 0, "reason": "new on disk: millhand model load reads it"}
GONE = {"bytes": None, "proof": "gone from disk", "proof_reason": ""}
NO_VERSION = {"memory_bytes": 0, "bytes": None, "proof": "", "proof_reason": ""}
BY = "the command line"
LOAD_TIMEOUT_S = 3600.0
"""The daemon has its own: [models] load_timeout_s, for each version."""


@click.group("model")
def command() -> None:
    """List, load, measure, build and verify models."""


command.add_command(language_model.add)
command.add_command(language_model.catalog)
command.add_command(language_model.remove)
command.add_command(bench.command)
command.add_command(recorded.command)
command.add_command(proof.proof)
command.add_command(proof.verify)
command.add_command(proof.sign)
command.add_command(build.command)
command.add_command(build.quantize)
command.add_command(prove.command)
command.add_command(compare.command)


@command.command("list", short_help="List the models and what serves.")
@json_option
@click.pass_context
def list_models(ctx: click.Context) -> None:
    """List the models of the repository and what serves now, then the language models."""
    from millhand.language.library import open_library

    output: Output = ctx.obj
    models, running = _ask(output, "model.list")
    rows = [(model["name"], model["state"], _serving(model), _proofs(model), _reason(model)) for model in models]
    headers = ("model", "state", "serves", "proof", "reason")
    lines = table_with_reasons(headers, rows) if rows else ["The repository has no model."]
    if not running:
        lines.append("The daemon does not run: this is what is on disk.")
    language, more = language_model.listed(open_library(output.config()))
    output.emit([*models, *language], [*lines, *more])


@command.command("show", short_help="Show one model.")
@click.argument("name")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show model NAME: what it takes and gives, its versions, and why it does not serve."""
    from millhand.language.library import open_library

    output: Output = ctx.obj
    library = open_library(output.config())
    if name in library.names():
        output.emit(*language_model.described(library.model(name)))
        return
    model, running = _ask(output, "model.show", model=name)
    output.emit(model, _describe(model, running))


@command.command("versions", short_help="Show a model's versions, and why one does not serve.")
@click.argument("name")
@json_option
@click.pass_context
def versions(ctx: click.Context, name: str) -> None:
    """Show the versions of model NAME: what is on disk, what serves, what is proved, and why one does not serve."""
    output: Output = ctx.obj
    model, running = _ask(output, "model.show", model=name)
    details = {detail["version"]: detail for detail in model["details"]}
    found = [
        {**details.get(number, {"version": number, **UNREAD}), **model["artifacts"].get(str(number), GONE)}
        for number in sorted({*details, *map(int, model["artifacts"])})
    ]
    found += [
        {"version": stray["folder"], "state": "passed over", "reason": stray["reason"], **NO_VERSION}
        for stray in model["strays"]
    ]
    reasons = [_why_not(version, running) for version in found]
    rows = [
        (v["version"], v["state"], v["proof"], _size(v["bytes"]), _size(v["memory_bytes"] or None), reason)
        for v, reason in zip(found, reasons, strict=True)
    ]
    output.emit(found, table_with_reasons(("version", "state", "proof", "on disk", "memory", "why not"), rows))


@command.command("load", short_help="Serve a model, or load it anew.")
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Serve this version. Default: those of the model's policy.")
@json_option
@click.pass_context
def load(ctx: click.Context, name: str, version: int | None) -> None:
    """Read model NAME from disk anew and serve it; what served before goes once the new is ready."""
    output: Output = ctx.obj
    entry = output.daemon(LOAD_TIMEOUT_S).call("model.load", model=name, version=version, by=BY)
    lines = [f"{name} serves version {_numbers(entry['versions'])}."]
    for warning in [_with_hint(missed["reason"], missed["hint"]) for missed in entry["missed"]] + _strays(entry):
        lines += wrapped(f"Warning: {warning}", rest="  ")
    output.emit(entry, lines)


@command.command("unload", short_help="Stop serving a model.")
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Only this version.")
@json_option
@click.pass_context
def unload(ctx: click.Context, name: str, version: int | None) -> None:
    """Stop serving model NAME; it comes back at the daemon's next start, or with `load`."""
    output: Output = ctx.obj
    only = {} if version is None else {"version": version}
    entry = output.daemon(LOAD_TIMEOUT_S).call("model.unload", model=name, by=BY, **only)
    left = f"{name} serves version {_numbers(entry['versions'])}." if entry["versions"] else f"{name} is unloaded."
    output.emit(entry, left)


def _ask(output: Output, call: str, **arguments: Any) -> tuple[Any, bool]:
    """Ask the daemon; where none runs, read the repository. Returns (answer, whether a daemon answered)."""
    try:
        return output.daemon().call(call, **arguments), True
    except ControlError as error:
        if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise
        pool = offline_pool(output)
        answer = pool.index() if call == "model.list" else pool.metadata(arguments["model"])
        return answer, False


def offline_pool(output: Output) -> ModelPool:
    """A pool that starts no worker: it says what is on disk, and how it would be served."""
    from millhand.profiles import match_node
    from millhand.registry import Registry
    from millhand.serving.pool import ModelPool

    config = output.config()
    return ModelPool(output.repository(), config.models, match_node(config)[1].workers, Registry(), config.node.run_dir)


def _describe(model: dict[str, Any], running: bool) -> list[str]:
    facts = [
        ("model", f"{model['name']}: {model['description']}"),
        ("state", model["state"] if running else "the daemon does not run"),
        ("reason", model["reason"]),
        ("try", model["hint"]),
        ("serves", f"{_serving(model)} of {_numbers(model['available'])}, policy {model['policy']}"),
        *(("choice", _choice(choice)) for choice in model.get("choices", ())),
        ("proof", "; ".join([_proofs(model), *_refusals(model)])),
        ("backend", f"{model['backend']}, at most {model['max_batch']} rows a batch, by {model['max_batch_key']}"),
        ("worker", model["worker"]),
        ("gpu", "; ".join(_evidence(*item) for item in model.get("accelerator", {}).items())),
        ("threads", "; ".join(_threads(*item) for item in model.get("threads", {}).items())),
        *((label, text) for facts in model["depends"].values() for label, text in facts),
        ("needs", ", ".join(model["needs"])),
        ("rules", ", ".join(model["rules"])),
        ("licence", model["licence"]),
        ("folder", model["path"]),
    ]
    lines = []
    for label, text in facts:
        lines += wrapped(str(text), f"{label:<9}", " " * 9)
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


def _threads(version: str, choice: dict[str, Any]) -> str:
    """How many threads one inference of a version gets, and what each number took."""
    trials = ", ".join(f"{trial['threads']}: {trial['run_ms']:.3g} ms" for trial in choice["trials"])
    return f"version {version}: {choice['threads']}" + (f" (measured {trials})" if trials else "")


def _microseconds(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us:.0f} µs"


def _reason(model: dict[str, Any]) -> str:
    """Why a model does not serve as it should, or which folders of it are passed over."""
    if model["reason"]:
        return _with_hint(model["reason"], model["hint"])
    return "; ".join(_strays(model))


def _strays(model: dict[str, Any]) -> list[str]:
    """The folders of a model that are passed over, and why."""
    return [stray["reason"] for stray in model.get("strays", ())]


def _with_hint(reason: str, hint: str) -> str:
    return f"{reason} ({hint})" if hint else reason


def _why_not(version: dict[str, Any], running: bool) -> str:
    """Why a version does not serve."""
    if version["state"] == "unloaded" and not running:
        return "the daemon does not run"
    return _with_hint(version["reason"], version.get("hint", ""))


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    return f"{size_bytes / KIB:.1f} KiB" if size_bytes < KIB**2 else f"{size_bytes / KIB**2:.1f} MiB"


def _numbers(versions: list[int]) -> str:
    return ", ".join(map(str, versions)) or "-"


def _serving(model: dict[str, Any]) -> str:
    """The versions that serve, each with the candidate that takes its own artifact's place: `1, 2 (int8-static)`."""
    candidates = {detail["version"]: detail["candidates"] for detail in model.get("details", ())}
    named = (
        f"{number} ({', '.join(candidates[number])})" if candidates.get(number) else str(number)
        for number in model["versions"]
    )
    return ", ".join(named) or "-"


def _choice(choice: dict[str, Any]) -> str:
    """What was chosen among what was made of a version, and what became of it."""
    where = f"{choice['model']} {choice['version']} for {choice['target']}"
    if not choice["candidate"]:
        return f"{where}: the original, {choice['reason']}"
    if not choice["reason"]:
        return f"{where}: {choice['candidate']}"
    rebuild = f"; {choice['rebuild']}" if choice["rebuild"] else ""
    return f"{where}: not {choice['candidate']}: {choice['reason']}{rebuild}"


def _proofs(model: dict[str, Any]) -> str:
    return ", ".join(f"{version} {state}" for version, state in model.get("proof", {}).items())


def _refusals(model: dict[str, Any]) -> list[str]:
    """Why versions on disk are refused."""
    return [
        f"{version}: {found['proof_reason']}"
        for version, found in model.get("artifacts", {}).items()
        if found["proof"] == "refused"
    ]


def _evidence(version: str, proof: dict[str, Any]) -> str:
    """What a session proved of the accelerator at its load, in words."""
    where = f"{version}: {proof['gpu_nodes']} of {proof['nodes']} nodes on {proof['provider']}"
    if proof["max_difference"] is None:
        return f"{where}, the CPU cannot run it{_ways(proof)}"
    return f"{where}, answers within {proof['max_difference']:.1g} of the CPU's{_ways(proof)}"


def _ways(proof: dict[str, Any]) -> str:
    """How batches run that do not run plainly: `, batches of up to 1, 8 graph`."""
    sizes: dict[str, list[str]] = {}
    for size, entry in proof.get("ways", {}).items():
        sizes.setdefault(entry["way"], []).append(size)
    return "".join(f", batches of up to {', '.join(sizes[way])} {way}" for way in sizes if way != "plain")
