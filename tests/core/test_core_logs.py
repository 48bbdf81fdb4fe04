"""A log loop must not fill a disk."""

from __future__ import annotations

import io
import json
import logging

import pytest

from millhand.logs import JsonFormatter, RepeatLimit


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
