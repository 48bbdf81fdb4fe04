"""`millhand key`: the keys that sign proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millhand.cli.output import Output, json_option, labelled
from millhand.errors import InputError, MillhandError, ModelError


@click.group("key")
def command() -> None:
    """Show, export and make keys that sign proofs."""


@command.command("show", short_help="Show this node's key and the keys it trusts.")
@json_option
@click.pass_context
def show(ctx: click.Context) -> None:
    """Show this node's key and the keys whose signatures count beside it. Ends with 1 where one cannot be read."""
    from millhand.proof.keys import FOLDER, private_path, read_public
    from millhand.proof.signature import Keyring

    output: Output = ctx.obj
    config = output.config()
    faults: list[MillhandError] = []
    node = Keyring(config.node.data_dir).node
    private = private_path(config.node.data_dir / FOLDER)
    rows = [_row("node", private, lambda: _own(node(), private), faults)]
    rows += [
        _row("trusted", path, lambda path=path: read_public(path).id, faults) for path in config.models.trusted_keys
    ]
    lines = []
    for row in rows:
        text = f"{row['key']}  {row['path']}" if row["key"] else row["error"] or "none yet: the first proof makes it"
        lines += labelled(row["role"], text)
    output.emit(rows, lines)
    if faults:
        raise faults[0]


@command.command("export", short_help="Print this node's public key.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file.")
@json_option
@click.pass_context
def export(ctx: click.Context, out: Path | None) -> None:
    """Print this node's public key (PEM), for the [models] trusted_keys of other nodes; made where there is none."""
    from millhand.proof.keys import node_key
    from millhand.proof.signature import Keyring

    output: Output = ctx.obj
    data_dir = output.config().node.data_dir
    key = Keyring(data_dir).node() or node_key(data_dir).public
    pem = key.pem().decode()
    if out is not None:
        try:
            out.write_text(pem, encoding="ascii")
        except OSError as error:
            raise InputError(f"'{out}' cannot be written: {error.strerror}", hint="name another file") from error
    output.emit({"key": key.id, "pem": pem}, pem.rstrip("\n") if out is None else f"Key {key.id} is in '{out}'.")


@command.command("new", short_help="Make a pair of keys for the plant.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="plant", show_default=True, help="What the two files are called.")
@json_option
@click.pass_context
def new(ctx: click.Context, folder: Path, name: str) -> None:
    """Make a pair of keys for the plant in FOLDER: the private one signs, nodes trust the public one.

    Never in the node's own folder: whoever has this key speaks for every node that trusts it.
    """
    from millhand.proof.keys import new_pair, public_path

    output: Output = ctx.obj
    if Path(name).name != name:
        raise InputError(f"--name '{name}' is no name for a file", hint="give a plain name, and the folder as FOLDER")
    data_dir = output.config().node.data_dir
    if folder.resolve().is_relative_to(data_dir.resolve()):
        raise ModelError(
            f"'{folder}' is this node's own place ([node] data_dir)",
            hint="make the plant's key where it is kept: another machine, or a drive that is taken away",
        )
    pair = new_pair(folder, name)
    public = public_path(folder, name)
    facts = {"key": pair.public.id, "private": str(pair.path), "public": str(public)}
    lines = [
        *labelled("key", pair.public.id),
        *labelled("private", f"{pair.path}: keep it off the nodes; millhand model sign NAME --key takes it"),
        *labelled("public", f"{public}: name it in [models] trusted_keys of the nodes"),
    ]
    output.emit(facts, lines)


def _row(role: str, path: Path, read: Any, faults: list[MillhandError]) -> dict[str, str]:
    row = {"role": role, "key": "", "path": str(path), "error": ""}
    try:
        row["key"] = read()
    except MillhandError as error:
        faults.append(error)
        row["error"] = error.message
    return row


def _own(public: Any, private: Path) -> str:
    """The id of the node's key; the private half is looked at too where we may. Raises ModelError."""
    from millhand.proof.keys import read_private

    if public is None:
        return ""
    try:
        found = read_private(private).public.id
    except ModelError as error:
        if isinstance(error.__cause__, PermissionError):
            return str(public.id)
        raise
    if found != public.id:
        raise ModelError(
            f"'{public.path}' does not belong to '{private}'", hint="take the public one away; it is written again"
        )
    return str(found)
