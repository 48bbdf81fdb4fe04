"""Structured, rate-limited logs: a log loop must not fill a disk."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Protocol, TextIO

PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.NOTSET: 7}
"""Level -> syslog's priority (RFC 5424, 6.2.1)."""


class LogChoice(Protocol):
    """The table `[log]`, or as much of it as a process without pydantic gets."""

    @property
    def level(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def repeats_per_minute(self) -> int: ...


class RepeatLimit(logging.Filter):
    """Lets `repeats` records a minute through for each (logger, line, level), then says how many it held back."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self._repeats = repeats
        self._windows: dict[tuple[str, int, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.lineno, record.levelno)
        now = time.monotonic()
        start, count = self._windows.get(key, (now, 0))
        if now - start >= 60:
            held = count - self._repeats
            if held > 0:
                record.msg = f"{record.getMessage()} (and {held} like it were not written)"
                record.args = ()
            start, count = now, 0
        self._windows[key] = (start, count + 1)
        return count < self._repeats


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, fields, and the exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class JournalFormatter(logging.Formatter):
    """Puts a line's priority before it, which journald takes off again (sd-daemon(3)): `journalctl -p warning`."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{next(priority for level, priority in PRIORITIES.items() if record.levelno >= level)}>"
        return "\n".join(mark + line for line in self._lines.format(record).split("\n"))


def is_journal(stream: TextIO) -> bool:
    """Whether journald reads what is written there (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def log_handler(choice: LogChoice, repeats_per_minute: int) -> logging.Handler:
    """A handler that writes to stderr in the chosen format, so many lines a minute from one place in the code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RepeatLimit(repeats_per_minute))
    journal = is_journal(sys.stderr)
    text = "%(name)s: %(message)s" if journal else "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    lines = JsonFormatter() if choice.format == "json" else logging.Formatter(text)
    handler.setFormatter(JournalFormatter(lines) if journal else lines)
    return handler


def configure_logs(choice: LogChoice) -> None:
    """Send all logs to stderr as chosen; called once by each process."""
    root = logging.getLogger()
    root.handlers[:] = [log_handler(choice, choice.repeats_per_minute)]
    root.setLevel(choice.level.upper())
    logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # its errors reach us as exceptions
