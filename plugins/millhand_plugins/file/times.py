"""Text of a time cell -> Unix nanoseconds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal

from millhand_plugins.file.options import FileOptions

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LATEST_NS = 2**63 - 1


def time_parser(options: FileOptions) -> Callable[[str], int]:
    """Return a function from text to Unix nanoseconds that raises ValueError for anything else.

    Seconds and milliseconds keep every digit down to the nanosecond; iso and patterns go down to the microsecond.
    """
    parse = _unchecked(options)

    def checked(text: str) -> int:
        try:
            nanoseconds = parse(text)
            inside = 0 <= nanoseconds <= _LATEST_NS
        except ArithmeticError as error:  # InvalidOperation for text and NaN, Overflow for 1e999999999 or the year 1
            raise ValueError("it is no time") from error
        if not inside:
            raise ValueError("it lies outside the years 1970 to 2262")
        return int(nanoseconds)

    return checked


def _unchecked(options: FileOptions) -> Callable[[str], int | Decimal]:
    zone = options.zone
    if options.time_format == "iso":
        return lambda text: _nanoseconds(datetime.fromisoformat(text), zone)
    if options.time_format == "epoch_s":
        return lambda text: Decimal(text) * 10**9
    if options.time_format == "epoch_ms":
        return lambda text: Decimal(text) * 10**6
    if options.time_format == "index":
        start_ns = _nanoseconds(options.start, zone)
        unit_ns = Decimal(repr(options.time_unit_s)) * 10**9
        return lambda text: start_ns + Decimal(text) * unit_ns
    return lambda text: _nanoseconds(datetime.strptime(text, options.time_format), zone)


def _nanoseconds(moment: datetime, zone: tzinfo) -> int:
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=zone)
    return (aware - _EPOCH) // _MICROSECOND * 1000
