"""The command line against a running agent: exports, ids, states, errors for programs."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millhand.cli import EXIT_CODES
from millhand.control import ControlClient
from millhand.errors import ControlError
from millhand.records import Alert, Batch, Severity
from millhand.store import Step, Store

DEADLINE_S = 60.0
ALERT = Alert(
    "abcd1234-0000", "press", "wear", "high", "wear", Severity.WARNING, "The press wears.", 1_700_000_000_000_000_000
)


class Agent:
    """A configuration whose daemon runs."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "millhand.toml"
        self.client = ControlClient(folder / "control.sock")

    def millhand(self, *words: str) -> subprocess.CompletedProcess[str]:
        return millhand(self.config, *words)

    def wait(self, ready: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not ready():
            assert time.monotonic() < end_s, "the agent did not get there in time"
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return any(asset["state"] == "running" for asset in self.client.call("asset.list"))
        except ControlError:
            return False


def millhand(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millhand", "--config", str(config), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def write_config(folder: Path) -> Path:
    path = folder / "millhand.toml"
    path.write_text(
        f"[node]\nid = 'n1'\ndata_dir = '{folder}/data'\nrun_dir = '{folder}'\n[http]\nport = 0\n"
        '[[assets]]\nname = "node"\nadapter = "host"\noptions = { every_ms = 100, include = ["cpu", "load"] }\n'
        '[[assets]]\nname = "lost"\nadapter = "file"\noptions = { path = "/nowhere/lost.csv", time_format = "index" }\n'
    )
    return path


async def _leave_alert(folder: Path) -> None:
    (folder / "data").mkdir()
    store = await Store.open(folder / "data" / "millhand.db")
    await store.commit(Step("press", Batch(), b"", alerts=(ALERT,)))
    await store.close()


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as name:
        folder = Path(name)
        asyncio.run(_leave_alert(folder))
        agent = Agent(folder)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "millhand", "-c", str(write_config(folder)), "run"], stdout=log, stderr=log
            )
        try:
            agent.wait(agent.answers)
            yield agent
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A configuration without a daemon."""
    return write_config(tmp_path)


# ---- readings -------------------------------------------------------------------------------------------------------


def test_an_export_without_a_daemon_leaves_the_file_alone(silent: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.csv"
    kept.write_text("precious\n")
    run = millhand(silent, "readings", "node", "-o", str(kept))
    assert run.returncode == EXIT_CODES["error"]
    assert kept.read_text() == "precious\n"
    assert millhand(silent, "readings", "node").stdout == "", "no header before the daemon answers"


def test_an_export_holds_iso_times_and_plain_values(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    run = agent.millhand("readings", "node", "-o", str(path))
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows
    assert all(len(row["time"]) == len("2026-05-01T12:00:00.000000Z") and row["time"][-1] == "Z" for row in rows)
    assert all(
        len(row["value"].lstrip("-").replace(".", "").lstrip("0")) <= 12 for row in rows if "e" not in row["value"]
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"], "no partial file stays"


def test_an_export_to_nowhere_is_an_error_with_a_remedy(agent: Agent) -> None:
    run = agent.millhand("readings", "node", "-o", "/nowhere/out.csv")
    assert run.returncode == EXIT_CODES["error"]
    assert run.stderr.startswith("Error: '/nowhere/out.csv' cannot be written")
    assert "\nTry: " in run.stderr


def test_unknown_assets_and_names(agent: Agent) -> None:
    run = agent.millhand("readings", "nod")
    assert run.returncode == EXIT_CODES["error"]
    assert "asset 'nod' is not known; did you mean 'node'" in run.stderr
    run = agent.millhand("readings", "node", "--name", "no.such")
    assert "has no reading 'no.such'" in run.stderr
    assert run.stdout == ""


def test_a_database_holds_all_assets(silent: Path) -> None:
    run = millhand(silent, "readings", "node", "--database", "x.db")
    assert run.returncode == EXIT_CODES["usage"]


def test_a_reader_that_has_seen_enough(agent: Agent) -> None:
    command = [sys.executable, "-m", "millhand", "--config", str(agent.config), "telemetry", "tail", "--json"]
    reading, writing = os.pipe()
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    _, noise = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, noise) == (0, "")


# ---- alerts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("alert", "ack"), ("order", "show")])
def test_an_empty_id_is_a_usage_error(silent: Path, words: tuple[str, ...]) -> None:
    run = millhand(silent, *words, "")
    assert run.returncode == EXIT_CODES["usage"]
    assert "an id is not empty" in run.stderr


def test_acknowledging(agent: Agent) -> None:
    assert "at least 4 characters" in agent.millhand("alert", "ack", "abc").stderr
    assert "is acknowledged by ann" in agent.millhand("alert", "ack", "abcd", "--by", "ann").stdout
    again = agent.millhand("alert", "ack", ALERT.id, "--by", "bob")
    assert "was acknowledged already by ann" in again.stdout


# ---- errors for programs --------------------------------------------------------------------------------------------


def test_errors_as_json(agent: Agent, silent: Path) -> None:
    error = json.loads(agent.millhand("--json", "readings", "nod").stderr)["error"]
    assert error["code"] == "input"
    assert error["hint"]
    assert json.loads(millhand(silent, "alert", "list", "--json").stderr)["error"]["code"] == "control"
    assert json.loads(millhand(silent, "alert", "ack", "", "--json").stderr)["error"]["code"] == "usage"


# ---- state ----------------------------------------------------------------------------------------------------------


def test_the_state_names_the_asset_that_fails(agent: Agent) -> None:
    run = agent.millhand()
    assert "  lost: " in run.stdout
    assert all(len(line) <= 80 for line in run.stdout.splitlines())


def test_check_says_one_thing_of_an_asset(agent: Agent) -> None:
    run = agent.millhand("check", "--json")
    found = [finding for finding in json.loads(run.stdout)["findings"] if finding["name"].startswith("asset ")]
    assert [finding["name"] for finding in found] == ["asset node", "asset lost"]
    assert [finding["level"] for finding in found] == ["ok", "error"]
    profile = next(line for line in agent.millhand("check").stdout.splitlines() if "profile" in line)
    assert profile.count("generic-cpu") == 1
    assert agent.client.call("hardware")[-1] == ["Profile", "generic-cpu: it fits any node"]


def test_telemetry_that_is_off(agent: Agent) -> None:
    assert agent.millhand("telemetry", "status").stdout.startswith("Telemetry is off")


def test_a_fault_of_a_whole_table_names_the_table(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace(', time_format = "index"', ""))
    error = millhand(config, "config", "validate").stderr
    assert "key ''" not in error
    assert "'lost' options: time_column is missing" in error.replace("\n       ", " ")
