"""What every command shares: where the daemon is, and one way to print for people or for programs."""

from __future__ import annotations

import functools
import json
import logging
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.control import ControlClient
    from millhand.serving.repository import Repository

P = ParamSpec("P")
R = TypeVar("R")
LINE_CHARACTERS = 80
LABEL_CHARACTERS = 10


@dataclass(frozen=True)
class Output:
    """Options of the root command, handed to every subcommand as `ctx.obj`."""

    config_path: Path | None
    as_json: bool
    verbose: bool

    def config(self) -> Config:
        """Read the configuration. Raises ConfigError."""
        from millhand.config import load_config

        return load_config(self.config_path)

    def repository(self) -> Repository:
        """The models on disk, as a daemon would read them. Raises ConfigError."""
        from millhand.registry import Registry
        from millhand.serving.repository import Repository

        config = self.config()
        registry = Registry()
        registry.load(config.plugin_tables())
        return Repository.from_config(config, [Path(folder) for _, folder in registry.collect("millhand_models")])

    def daemon(self, timeout_s: float = 30.0) -> ControlClient:
        """A client of the running daemon's control socket."""
        from millhand.control import ControlClient

        return ControlClient(self.config().node.control_path, timeout_s)

    def emit(self, data: Any, text: str | Iterable[str]) -> None:
        """Print `data` as one JSON document under --json, else the text."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, default=str, ensure_ascii=False))
            return
        for line in [text] if isinstance(text, str) else text:
            click.echo(line)


def json_option(function: Any) -> Any:
    """Let `--json` stand behind a subcommand too: `millhand hw show --json`."""

    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            output: Output = ctx.obj
            ctx.obj = Output(output.config_path, True, output.verbose)

    return click.option(
        "--json", is_flag=True, expose_value=False, is_eager=False, callback=callback, help="Print JSON for programs."
    )(function)


def writes_data(function: Callable[P, R]) -> Callable[P, R]:
    """Of a command that writes the node's own folders: run by root, it leaves nothing that the agent cannot write."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        from millhand.owner import handed_over

        output: Output = click.get_current_context().obj
        config = output.config()
        with handed_over(config.node.data_dir, *filter(None, [config.models.built_dir])):
            return function(*args, **options)

    return run


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], characters: int | None = None) -> list[str]:
    """Lay out rows in aligned columns, numbers to the right.

    characters: cut the last column, so that lines are no longer.
    """
    body = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max([len(header), *(len(row[i]) for row in body)]) for i, header in enumerate(headers)]
    numeric = [bool(body) and all(_is_number(row[i]) for row in body if row[i]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        text = "  ".join(parts).rstrip()
        return text if characters is None or len(text) <= characters else f"{text[: characters - 1].rstrip()}…"

    return [line([header.upper() for header in headers]), *(line(row) for row in body)]


def table_with_reasons(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table whose last column holds reasons; one that is too long for its line follows in full."""
    lines = table(headers, rows, LINE_CHARACTERS)
    cut = [row for row, line in zip(rows, lines[1:], strict=True) if line.endswith("…")]
    return lines + [line for row in cut for line in ("", *wrapped(f"{headers[0].capitalize()} {row[0]}: {row[-1]}"))]


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """`text` as lines of at most LINE_CHARACTERS that begin with `first` and `rest`; commands and paths stay whole."""
    return textwrap.wrap(
        text,
        LINE_CHARACTERS,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def labelled(label: str, text: str) -> list[str]:
    """A label and what it is, `Hooks     a, b`; no line where there is no text."""
    return wrapped(text, f"{label:<{LABEL_CHARACTERS}}", " " * LABEL_CHARACTERS)


def silence_registry() -> None:
    """Keep failures of plugins and workers off stderr, in a command that shows them itself."""
    for name in ("millhand.registry", "millhand.serving"):
        logging.getLogger(name).addHandler(logging.NullHandler())


def shorten(text: str, characters: int) -> str:
    """Cut `text` at a word so that it fits, with an ellipsis."""
    return textwrap.shorten(text, characters, placeholder="…")


def plural(count: int, noun: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def print_error(message: str, hint: str, code: str, as_json: bool) -> None:
    """Print to stderr: within 80 columns, or as one JSON document."""
    if as_json:
        error = {"code": code, "message": message, "hint": hint}
        click.echo(json.dumps({"error": error}, ensure_ascii=False), err=True)
        return
    for prefix, text in (("Error: ", message), ("Try: ", hint)):
        for index, part in enumerate(text.splitlines() if text else []):
            first = prefix if index == 0 else " " * len(prefix)
            wrapped = textwrap.fill(
                part,
                LINE_CHARACTERS,
                initial_indent=first,
                subsequent_indent=" " * len(prefix),
                break_long_words=False,
                break_on_hyphens=False,
            )
            click.echo(wrapped, err=True)
