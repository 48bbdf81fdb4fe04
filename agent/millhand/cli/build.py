"""`millhand model build` and `quantize`: make candidates of a model, prove each, keep the best that passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millhand.cli import compare
from millhand.cli.output import LINE_CHARACTERS, Output, json_option, shorten, wrapped, writes_data
from millhand.errors import ControlError, InputError, MillhandError
from millhand.workshop.listener import Silence

if TYPE_CHECKING:
    from millhand.workshop.listener import Listener
    from millhand.workshop.report import Outcome

BAR_CHARACTERS = 20
NAME_CHARACTERS = 18
LOAD_TIMEOUT_S = 3600.0
"""The daemon has its own: [models] load_timeout_s."""


def _options(function: Callable[..., None]) -> Callable[..., None]:
    """What both commands take."""
    decorators = (
        click.argument("name"),
        click.option(
            "--target", help="cpu, a profile, a part of one (a30, a100, orin) or a chip (sm80). Default: here."
        ),
        click.option("--version", type=click.IntRange(1), help="Default: the newest that the model's policy serves."),
        click.option("--budget", type=click.FloatRange(0, min_open=True), help="Minutes that all may take together."),
        click.option("--data", type=click.Path(path_type=Path), help="Rows to calibrate with and to judge by."),
        click.option("--only", multiple=True, help="Only this recipe, and what it begins from; may be repeated."),
        click.option("--fresh", is_flag=True, help="Make anew what lies on the shelf."),
        json_option,
        click.pass_context,
        writes_data,
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


@click.command("build", short_help="Make candidates of a model, prove each, keep the best.")
@_options
def command(ctx: click.Context, **chosen: Any) -> None:
    """Make what suits the hardware of model NAME: files of lower precisions and engines.

    Each is made and judged in a process of its own, beside the original, on rows that nothing was fitted to: those of
    --data, of the plugin that knows the model, or what this node has recorded. The fastest that keeps the metric serves
    from then on; what lies on the shelf already is not made again. Of a language model they are other precisions of its
    GGUF file, judged by perplexity on a text (--data, or the one that comes along).
    """
    _build(ctx.obj, engines=True, **chosen)


@click.command("quantize", short_help="The same, for files of lower precisions alone.")
@_options
def quantize(ctx: click.Context, **chosen: Any) -> None:
    """Make files of model NAME in lower precisions, prove each, keep the best that passes. No engines."""
    _build(ctx.obj, engines=False, **chosen)


def _build(
    output: Output,
    name: str,
    target: str | None,
    version: int | None,
    budget: float | None,
    data: Path | None,
    only: Sequence[str],
    fresh: bool,
    engines: bool,
) -> None:
    from millhand.cli.language_build import build as language_build
    from millhand.language.library import open_library
    from millhand.workshop.boards import target_named
    from millhand.workshop.build import Order, build
    from millhand.workshop.site import open_site

    config = output.config()
    site = open_site(config)
    if name in (library := open_library(config)).names():
        if target or version or budget:
            raise InputError(
                "--target, --version and --budget are not for language models", hint="they are built where they serve"
            )
        language_build(output, site, library.model(name), only, data, fresh, listener_of(output))
        return
    folder = site.repository.find(name)
    order = Order(
        model=name,
        target=target_named(target, site.targets, site.profiles) if target else site.own_target(folder),
        version=version,
        budget_minutes=budget,
        data=data,
        only=tuple(only),
        fresh=fresh,
        engines=engines,
        typical_batch=typical_batch(output, name),
    )
    report = build(site, order, listener_of(output))
    if not output.as_json:
        click.echo()
    compare.show(output, site.shelf, report)
    if report.executed:
        _serve(output, name)


def typical_batch(output: Output, name: str) -> int:
    """The batch that traffic brings most often, as the running daemon has counted; 1 where none runs."""
    try:
        models = output.daemon().call("model.stats")["models"]
    except ControlError:
        return 1
    rows: dict[int, int] = {}
    for counts in models:
        if counts["model"] == name:
            for size, count in counts["batch_rows"].items():
                rows[int(size)] = rows.get(int(size), 0) + count
    return max(rows, key=lambda size: rows[size], default=1)


def _serve(output: Output, name: str) -> None:
    """Have a running daemon take the choice up, where it serves the model. Raises what its load raises."""
    said = f"The daemon does not run: {name} is served so from its next start on."
    try:
        daemon = output.daemon(LOAD_TIMEOUT_S)
        serving = daemon.call("model.show", model=name)["versions"]
    except ControlError as error:
        if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise
    except MillhandError:
        said = f"The daemon does not know {name} yet: millhand model load {name} serves it."
    else:
        said = f"{name} is not loaded: millhand model load {name} serves it."
        if serving:
            daemon.call("model.load", model=name)
            details = daemon.call("model.show", model=name)["details"]
            candidates = ", ".join(candidate for detail in details for candidate in detail["candidates"])
            said = f"The daemon has loaded {name} again and serves {candidates or 'the original'}."
    if not output.as_json:
        for line in wrapped(said):
            click.echo(line)


def listener_of(output: Output) -> Listener:
    """Who shows how it goes on, as the output allows."""
    if output.as_json:
        return Silence()
    return _Bar() if sys.stdout.isatty() else _Lines()


class _Lines(Silence):
    """One line for each candidate as it begins, and one for its end."""

    def __init__(self) -> None:
        self._name = ""

    def planned(self, names: Sequence[str]) -> None:
        for line in wrapped(f"Tried in this order: {', '.join(names) or 'nothing'}", rest="  "):
            click.echo(line)

    def progress(self, name: str, share: float, step: str) -> None:
        if name != self._name:
            self._name = name
            click.echo(f"{name} ...")

    def outcome(self, outcome: Outcome) -> None:
        taken = f"{outcome.minutes * 60:.0f} s" if outcome.made or outcome.state == "failed" else "from the shelf"
        taken = "" if outcome.state == "not tried" else taken
        text = f"{outcome.name:<{NAME_CHARACTERS}} {outcome.state:<9} {taken:<14} "
        click.echo(text + shorten(outcome.why, LINE_CHARACTERS - len(text)))


class _Bar(_Lines):
    """A bar that moves, on a terminal."""

    def progress(self, name: str, share: float, step: str) -> None:
        done = round(BAR_CHARACTERS * share)
        text = f"{name:<{NAME_CHARACTERS}} [{'#' * done}{'.' * (BAR_CHARACTERS - done)}] {share:>4.0%}  {step}"
        click.echo(f"\r\x1b[K{text[: LINE_CHARACTERS - 1]}", nl=False)

    def planned(self, names: Sequence[str]) -> None:
        self._clear()
        super().planned(names)

    def outcome(self, outcome: Outcome) -> None:
        self._clear()
        super().outcome(outcome)

    def _clear(self) -> None:
        click.echo("\r\x1b[K", nl=False)
