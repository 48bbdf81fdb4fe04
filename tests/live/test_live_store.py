"""A store that is damaged, replaced, deleted, or has no room: the agent goes on and says so."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from live_kit import HTTP_OFF, Site, check, drained, ended, file_asset, state_of, write_rows

from millhand.testing import Agent, wait_until

FOLLOW = "follow = true\npoll_ms = 20"
SMALL_DISK_MIB = 20
STORE_ON_SMALL_DISK = "[store]\nfree_disk_floor_bytes = 0\nwaveform_bytes_cap = 0\n"


def store_path(agent: Agent) -> Path:
    return agent.folder / "data" / "millhand.db"


def set_aside_alerts(agent: Agent) -> list[dict[str, Any]]:
    return [alert for alert in agent.call("alert.list") if alert["kind"] == "store_set_aside"]


def garbage_in_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xa5" * 4096)


def garbage_in_middle(path: Path) -> None:
    size = path.stat().st_size
    assert size > 64 * 1024
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\xa5" * (size // 2))


@pytest.mark.parametrize("damage", [garbage_in_head, garbage_in_middle])
def test_what_comes_after_a_damaged_store_arrives(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent], damage: Callable[[Path], None]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 1500)
    agent = millhand_agent(HTTP_OFF + site.telemetry + file_asset(recording, more=FOLLOW))
    agent.wait(lambda: drained(agent) and len(site.readings("press")) == 1500, "the first rows at the hub")
    epoch = agent.call("state")["store"]["epoch"]
    agent.stop()

    damage(store_path(agent))
    write_rows(recording, 50, first=1500)
    agent.start()
    agent.wait(lambda: {*range(1550)} <= set(site.readings("press")), "all rows, read anew, at the hub")
    assert agent.call("state")["store"]["epoch"] != epoch
    (alert,) = set_aside_alerts(agent)
    assert Path(alert["evidence"]["file"]).exists()
    wait_until(lambda: alert["id"] in {told["id"] for told in site.alerts()}, "the alert at the hub")


def deleted(path: Path) -> None:
    path.unlink()


def replaced_by_an_older_copy(path: Path) -> None:
    copy = path.with_name("copy.db")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def replaced_by_garbage(path: Path) -> None:
    other = path.with_name("other.db")
    other.write_bytes(b"no database" * 10_000)
    other.replace(path)


@pytest.mark.parametrize("harm", [deleted, replaced_by_an_older_copy, replaced_by_garbage])
def test_a_store_that_is_taken_away_while_the_agent_runs(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent], harm: Callable[[Path], None]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    agent = millhand_agent(HTTP_OFF + site.telemetry + file_asset(recording, more=FOLLOW))
    agent.wait(lambda: len(site.readings("press")) == 100, "the first rows at the hub")
    epoch = agent.call("state")["store"]["epoch"]

    harm(store_path(agent))
    write_rows(recording, 100, first=100)
    agent.wait(lambda: {*range(200)} <= set(site.readings("press")), "the rows that came after, at the hub")
    state = agent.call("state")
    assert state["store"]["epoch"] != epoch
    assert state["store"]["files_begun_anew"] == 1
    (alert,) = agent.wait(lambda: set_aside_alerts(agent), "the alert")
    wait_until(lambda: alert["id"] in {told["id"] for told in site.alerts()}, "the alert at the hub")
    # The running source was not read anew: its place was in memory.
    assert [number for number, times in Counter(site.readings("press")).items() if times > 1] == []
    assert agent.stop() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    options = f"size={SMALL_DISK_MIB}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.decode().strip()} (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no free byte."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * block)
            except OSError:
                continue
    assert os.statvfs(folder).f_bavail == 0
    return filler


@pytest.mark.slow
def test_a_full_disk_costs_no_row(
    tmp_path: Path, site: Site, small_disk: Path, millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    agent = millhand_agent(
        HTTP_OFF + STORE_ON_SMALL_DISK + site.telemetry + file_asset(recording, more=FOLLOW),
        environment={"MILLHAND_NODE__DATA_DIR": str(small_disk)},
    )
    agent.wait(lambda: len(site.readings("press")) == 100, "the first rows at the hub")

    filler = fill(small_disk)
    rows = 100
    # The store has some room left in its write-ahead log: rows come until it is used up.
    while "full" not in state_of(agent, "press")["error"]:
        assert rows < 100_000, "the disk never filled"
        write_rows(recording, 500, first=rows)
        rows += 500
        agent.wait(partial(taken_or_full, agent, rows), "the rows taken, or an error")
    status = state_of(agent, "press")
    assert str(small_disk) in status["error"]
    assert "free some space" in status["hint"]
    taken = status["counters"]["batches"]
    assert agent.call("state")["next_step"] == "millhand check"
    code, findings = check(agent)
    assert code == 4
    assert findings["asset press"]["level"] == "error"
    assert "full" in findings["asset press"]["message"]
    assert state_of(agent, "press")["counters"]["batches"] == taken

    filler.unlink()
    write_rows(recording, 100, first=rows)
    rows += 100
    agent.wait(lambda: set(site.readings("press")) == set(range(rows)), "every row at the hub")
    assert [number for number, times in Counter(site.readings("press")).items() if times > 1] == []
    assert state_of(agent, "press")["error"] == ""
    assert check(agent)[0] != 4
    # What is stored holds together: the same rows, once each, also on the node.
    own = [
        row[3] for chunk in agent.client.stream("readings.export", asset="press", names=["sequence"]) for row in chunk
    ]
    assert own == list(range(rows))


def taken_or_full(agent: Agent, rows: int) -> bool:
    """Whether all rows (two readings each) are stored, or the asset says that the disk is full."""
    status = state_of(agent, "press")
    return status["counters"]["readings"] >= 2 * rows or "full" in status["error"]


def test_a_full_disk_at_start_is_said(tmp_path: Path, small_disk: Path, millhand_agent: Callable[..., Agent]) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    filler = fill(small_disk)
    agent = millhand_agent(
        HTTP_OFF + STORE_ON_SMALL_DISK + file_asset(recording),
        environment={"MILLHAND_NODE__DATA_DIR": str(small_disk)},
        started=False,
    )
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    assert "Error: the disk under" in agent.log()
    assert "Try: free some space" in agent.log()
    filler.unlink()
    agent.start()
    agent.wait(ended(agent, "press"), "the end of the recording")
