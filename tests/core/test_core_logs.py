"""A log loop must not fill a disk."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from millhand.logs import JsonFormatter, RepeatLimit, log_handler


def logger(stream: io.StringIO, limit: RepeatLimit) -> logging.Logger:
    handler = logging.StreamHandler(stream)
    handler.addFilter(limit)
    handler.setFormatter(JsonFormatter())
    log = logging.Logger("millhand.test")
    log.addHandler(handler)
    return log


def test_repeats_are_held_back_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    log = logger(stream, RepeatLimit(repeats=10))
    for number in range(10_000):
        log.error("sensor %d is silent", number)
        if number == 9_998:
            now[0] += 61
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 11
    assert "9989 like it were not written" in lines[-1]["message"]


def test_other_places_in_the_code_are_not_held_back() -> None:
    stream = io.StringIO()
    log = logger(stream, RepeatLimit(repeats=1))
    log.error("one")
    log.error("two")
    assert len(stream.getvalue().splitlines()) == 2


def test_json_lines_hold_exception_and_level() -> None:
    stream = io.StringIO()
    log = logger(stream, RepeatLimit(repeats=5))
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    entry = json.loads(stream.getvalue())
    assert entry["level"] == "error"
    assert "ValueError: broken" in entry["exception"]
    assert entry["time"].endswith("Z")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", ["<4>millhand.test: hot\u2028and \x85 wet", "<3>millhand.test: failed"]),
        ("json", ['<4>{"time"', '<3>{"time"']),
    ],
)
def test_the_journal_gets_each_line_with_its_priority_and_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, expected: list[str]
) -> None:
    with (tmp_path / "stderr").open("w+") as stream:
        status = (tmp_path / "stderr").stat()
        monkeypatch.setattr(sys, "stderr", stream)
        for journal in (f"{status.st_dev}:{status.st_ino}", f"{status.st_dev}:1"):
            monkeypatch.setenv("JOURNAL_STREAM", journal)
            log = logging.Logger("millhand.test")
            log.addHandler(log_handler(SimpleNamespace(level="info", format=form, repeats_per_minute=10), 10))
            log.warning("hot\u2028and \x85 wet")
            try:
                raise ValueError("broken")
            except ValueError:
                log.exception("failed")
            stream.flush()
            lines = (tmp_path / "stderr").read_text().removesuffix("\n").split("\n")
            if journal.endswith(":1"):
                assert not any(line.startswith("<") for line in lines), "a file is not the journal"
            else:
                assert all(any(line.startswith(each) for line in lines) for each in expected), lines
                assert all(line.startswith(("<3>", "<4>")) for line in lines), "each line of a traceback too"
            stream.seek(0)
            stream.truncate()
