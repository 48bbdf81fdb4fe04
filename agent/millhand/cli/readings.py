"""`millhand readings`: export stored readings as CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from millhand.cli.files import written_text
from millhand.cli.output import Output
from millhand.errors import InputError

COLUMNS = ("time", "asset", "name", "value", "unit", "quality")
SIGNIFICANT_DIGITS = 12


@click.command("readings")
@click.argument("asset", required=False)
@click.option("--name", "names", multiple=True, help="Only this reading; may be given several times.")
@click.option("--since", help="From this time on: ISO 8601, or `-15m`, `-2h`, `-3d` before now.")
@click.option("--until", help="Up to this time, in the same forms.")
@click.option("--output", "-o", "path", type=click.Path(path_type=Path), help="Write to this file. Default: stdout.")
@click.option("--database", type=click.Path(path_type=Path), help="Write all assets into this new SQLite file instead.")
@click.pass_obj
def command(
    output: Output,
    asset: str | None,
    names: tuple[str, ...],
    since: str | None,
    until: str | None,
    path: Path | None,
    database: Path | None,
) -> None:
    """Export the stored readings of ASSET as CSV (JSON lines under --json).

    With --database: readings, predictions, alerts, orders and minute rollups of all assets as a plain SQLite file.
    """
    if database is not None:
        if asset is not None or names or path is not None:
            raise click.UsageError("--database writes all assets; it takes no ASSET, no --name and no --output")
        span = {"since_ns": time_ns(since), "until_ns": time_ns(until)}
        rows = output.daemon(timeout_s=3600).call("store.export", path=str(database.absolute()), **span)
        output.emit(rows, [f"{count:>10} {name}" for name, count in rows.items()])
        return
    if asset is None:
        raise InputError("no asset is named", hint="millhand readings ASSET, or --database FILE for all assets")
    arguments = {"asset": asset, "names": list(names), "since_ns": time_ns(since), "until_ns": time_ns(until)}
    chunks = output.daemon().stream("readings.export", **arguments)
    first: list[Any] = next(chunks, [])  # before any output: the daemon may not run, or refuse
    with written_text(path) as handle:
        if not output.as_json:
            handle.write(_csv_line(COLUMNS))
        for row in itertools.chain(first, itertools.chain.from_iterable(chunks)):
            line = json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" if output.as_json else _csv_row(row)
            handle.write(line)


def time_ns(text: str | None) -> int | None:
    """Read an ISO 8601 time or a span before now. Raises InputError."""
    if text is None:
        return None
    spans = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if text.startswith("-"):
            seconds = float(text[1:-1]) * spans[text[-1]]
            return int((datetime.now(UTC).timestamp() - seconds) * 1e9)
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e9)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"time '{text}' is not valid", hint="write 2026-05-01T12:00:00Z, or a span before now such as -15m"
        ) from error


def _csv_row(row: Sequence[Any]) -> str:
    """A reading for people: its time as ISO 8601, its value without the noise of binary fractions."""
    source_ns, asset, name, value, unit, quality = row
    seconds, rest_ns = divmod(source_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=rest_ns // 1000)
    shown = f"{value:.{SIGNIFICANT_DIGITS}g}" if isinstance(value, float) else value
    time_text = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return _csv_line((time_text, asset, name, shown, unit, quality))


def _csv_line(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
