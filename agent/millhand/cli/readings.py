"""`millhand readings`: export stored readings as CSV."""

from __future__ import annotations

import csv
import io
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from millhand.cli.output import Output
from millhand.errors import InputError

COLUMNS = ("time", "asset", "name", "value", "unit", "quality")


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
    import json

    if database is not None:
        span = {"since_ns": time_ns(since), "until_ns": time_ns(until)}
        rows = output.daemon(timeout_s=3600).call("store.export", path=str(database.absolute()), **span)
        output.emit(rows, [f"{count:>10} {name}" for name, count in rows.items()])
        return
    if asset is None:
        raise InputError("no asset is named", hint="millhand readings ASSET, or --database FILE for all assets")
    arguments = {"asset": asset, "names": list(names), "since_ns": time_ns(since), "until_ns": time_ns(until)}
    stream = output.daemon().stream("readings.export", **arguments)
    handle = path.open("w", newline="") if path else sys.stdout
    try:
        if not output.as_json:
            handle.write(_csv_line(COLUMNS))
        for chunk in stream:
            for row in chunk:
                handle.write(
                    json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" if output.as_json else _csv_line(row)
                )
    finally:
        if path:
            handle.close()


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


def _csv_line(cells: object) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)  # type: ignore[arg-type]
    return buffer.getvalue()
