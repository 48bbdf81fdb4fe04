"""Recordings as bad as the field makes them: clocks of 1970 that jump, absurd numbers, broken rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_kit import FIRST_S, HTTP_OFF, Site, drained, ended, file_asset, state_of, write_engine

from millhand.testing import Agent

ROWS = 120
SICK = {30: "nan", 31: "inf", 32: "-inf", 33: "1e300", 34: "", 35: "broken", 36: "-1e30", 37: "1e29"}

READING = "SELECT value, quality FROM readings WHERE asset = 'engine' AND name = 's2' AND time_ms = {time_ms}"


def rewrite(path: Path, change: Callable[[int, list[str]], list[str]]) -> None:
    """Change the cells of each row of a recording."""
    head, *rows = path.read_text().splitlines()
    changed = [",".join(change(row, line.split(","))) for row, line in enumerate(rows)]
    path.write_text("\n".join([head, *changed]) + "\n")


def predictions(agent: Agent) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.call("prediction.list", asset="engine", limit=10_000)
    return found


def times_1970(row: int) -> float:
    """A clock that was never set."""
    return row / 100


def times_jumping(row: int) -> float:
    """Set a day back at row 40, a year on at row 80."""
    return FIRST_S + row / 100 - (86_400 if row >= 40 else 0) + (31_536_000 if row >= 80 else 0)


def times_standing(row: int) -> float:
    """A clock that ticks once in ten rows."""
    return float(FIRST_S + row // 10)


@pytest.mark.parametrize("times", [times_1970, times_jumping, times_standing])
def test_rows_of_any_clock_are_taken(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent], times: Callable[[int], float]
) -> None:
    recording = write_engine(tmp_path / "engine.csv", ROWS)
    rewrite(recording, lambda row, cells: [f"{times(row):.4f}", *cells[1:]])
    agent = millhand_agent(
        HTTP_OFF
        + site.telemetry
        + "[plugins.turbofan]\n"
        + file_asset(recording, "engine", models=["turbofan-rul"], more="batch_rows = 7")
    )
    agent.wait(ended(agent, "engine"), "the end of the recording")
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    assert Counter(site.readings("engine")) == Counter(range(ROWS))
    status = state_of(agent, "engine")
    assert (status["error"], status["restarts"]) == ("", 0)
    assert len(predictions(agent)) >= (ROWS // 10 if times is times_standing else ROWS - 1)
    assert agent.call("state")["store"]["streams"]["bulk"]["dropped"] == {}


def test_absurd_values_reach_no_model_and_break_nothing(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_engine(tmp_path / "engine.csv", ROWS, wear_sigma=1.0)
    clean = tmp_path / "clean.csv"
    clean.write_text(recording.read_text())
    # From the first sensor on; every cell of some rows, and each kind of absurdity in single cells.
    rewrite(
        recording,
        lambda row, cells: [*cells[:5], *([SICK[row]] * (len(cells) - 5) if row in SICK else cells[5:])],
    )
    agent = millhand_agent(
        HTTP_OFF
        + site.telemetry
        + "[plugins.turbofan]\n"
        + file_asset(recording, "engine", models=["turbofan-rul"])
        + file_asset(clean, "twin", models=["turbofan-rul"])
    )
    agent.wait(ended(agent, "engine", "twin"), "the ends of both recordings")
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    status = state_of(agent, "engine")
    assert (status["error"], status["restarts"], status["counters"]["predictions_failed"]) == ("", 0, 0)
    assert Counter(site.readings("engine")) == Counter(range(ROWS))
    found = predictions(agent)
    assert found
    assert all(math.isfinite(one["values"]["rul"]) and 0 <= one["values"]["rul"] <= 125 for one in found)
    assert all(math.isfinite(value) for one in found for value in one["evidence"].values())
    # Eight sick cycles of 120 do not turn the answer over.
    twin = agent.call("prediction.list", asset="twin", limit=10_000)
    assert abs(found[-1]["values"]["rul"] - twin[-1]["values"]["rul"]) < 25
    # A bad value travels as what it is: no value, and BAD.
    at = {row: site.query(READING.format(time_ms=FIRST_S * 1000 + row * 10)) for row in SICK}
    assert {row: [one["value"] for one in rows] for row, rows in at.items() if row not in (36, 37)} == {
        30: [None], 31: [None], 32: [None], 33: [None], 34: [], 35: [None]
    }  # fmt: skip
    assert {one["quality"] for row in (30, 31, 32, 33, 35) for one in at[row]} == {0}


def test_broken_rows_are_counted_and_the_rest_arrives(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_engine(tmp_path / "engine.csv", ROWS)
    lines = recording.read_text().splitlines()
    lines[11] = lines[11].replace(",", ";")
    lines[21] = "not even a time," + lines[21].partition(",")[2]
    lines[31] = lines[31].rsplit(",", 3)[0]
    lines[41] = lines[41] + ",1,2,3"
    lines[51] = '"' + lines[51]
    recording.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\x00\x01\n")
    agent = millhand_agent(HTTP_OFF + site.telemetry + file_asset(recording, "engine"))
    agent.wait(ended(agent, "engine"), "the end of the recording")
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    assert set(site.readings("engine")) == set(range(ROWS)) - {10, 20, 30, 40, 50}
    assert state_of(agent, "engine")["adapter_counts"]["bad_rows"] == 6
    assert "line 12" in agent.log()
