"""The command line and HTTP against a running agent, as a technician and a scraper use them."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live_kit import (
    HTTP_ANY,
    check,
    cli,
    cli_json,
    drained,
    ended,
    file_asset,
    http_url,
    rig_asset,
    running_site,
    write_engine,
    write_rows,
)

from millhand.testing import Agent, millhand_agents

ROWS, PRESS_ROWS = 200, 10
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def agent(folder: Path) -> Iterator[Agent]:
    """An agent that has seen an engine wear out and a rig fail, and told the hub all of it; all tests share it."""
    engine = write_engine(folder / "engine.csv", ROWS)
    press = write_rows(folder / "press.csv", PRESS_ROWS)
    with running_site(folder / "site") as site, millhand_agents(folder) as start:
        running = start(
            HTTP_ANY
            + site.telemetry
            + "[plugins.turbofan]\n"
            + file_asset(engine, "engine", models=["turbofan-rul"])
            + rig_asset("skid", speed="full")
            + file_asset(press, "press", more="follow = true\npoll_ms = 20")
        )
        running.wait(ended(running, "engine", "skid"), "the ends of the recordings", 60)
        running.wait(lambda: drained(running), "the hub's acknowledgement")
        yield running
        assert running.stop() == 0


def fetch(agent: Agent, path: str) -> str:
    with urllib.request.urlopen(http_url(agent) + path, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_state(agent: Agent) -> None:
    bare = cli(agent)
    assert bare.returncode == 0
    assert "Node       test/test-node, profile generic-cpu" in bare.stdout
    assert re.search(r"Assets     3: 2 ended, 1 running", bare.stdout)
    assert "rig-fault v1 ready" in bare.stdout
    assert "connected to mqtt://127.0.0.1" in bare.stdout
    assert "Next step  millhand alert list" in bare.stdout
    assert len(bare.stdout.splitlines()) == 6


def test_alerts_and_orders(agent: Agent) -> None:
    _, alerts = cli_json(agent, "alert", "list", "--state", "open")
    assert {alert["asset"] for alert in alerts} == {"engine", "skid"}
    skid = next(alert for alert in alerts if alert["asset"] == "skid")
    assert skid["id"][:8] in cli(agent, "alert", "list", "--asset", "skid").stdout
    acked = cli(agent, "alert", "ack", skid["id"][:8], "--by", "rosa")
    assert (acked.returncode, "is acknowledged by rosa" in acked.stdout) == (0, True)
    _, listed = cli_json(agent, "alert", "list", "--state", "acked")
    assert [(alert["id"], alert["acked_by"]) for alert in listed] == [(skid["id"], "rosa")]
    unknown = cli(agent, "alert", "ack", "zzzz")
    assert (unknown.returncode, unknown.stderr.startswith("Error: no alerts have an id")) == (1, True)
    assert "Try: millhand alert list" in unknown.stderr
    _, orders = cli_json(agent, "order", "list", "--asset", "skid")
    (order,) = [order for order in orders if order["alert_id"] == skid["id"]]
    shown = cli(agent, "order", "show", order["id"][:8])
    assert order["symptom"][:20] in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert cli_json(agent, "order", "show", order["id"][:8]) == (0, order)


def test_a_technicians_edit(tmp_path: Path, agent: Agent) -> None:
    _, (order, *_) = cli_json(agent, "order", "list")
    edit = ("order", "edit", order["id"][:8], "--by", "rosa", "--minutes", "95")
    code, edited = cli_json(agent, *edit, "--step", "Stop the skid.", "--step", "Look at the seal.")
    assert code == 0
    assert edited["action"] == ["Stop the skid.", "Look at the seal."]
    assert (edited["minutes"], edited["writer"], edited["revision"]) == (95, "technician rosa", order["revision"] + 1)
    assert cli_json(agent, "order", "show", order["id"][:8]) == (0, edited)
    assert cli_json(agent, "order", "show", "--versions", order["id"][:8]) == (0, [order, edited])
    shown = cli(agent, "order", "show", "--versions", order["id"][:8]).stdout
    assert "Time       95 minutes" in shown and f"Version    {edited['revision']}, of 2" in shown
    assert max(map(len, shown.splitlines())) <= 80
    pairs = tmp_path / "pairs.jsonl"
    assert cli_json(agent, "order", "export-pairs", str(pairs))[1]["pairs"] == 1
    assert [json.loads(line) for line in pairs.read_text().splitlines()] == [
        {"place": 1, "before": order, "after": edited}
    ]
    for words, problem in (
        (("export-pairs", str(pairs)), "exists already"),
        (("edit", order["id"][:8], "--cause", "x" * 601), "the edit does not fit"),
        (("edit", order["id"][:8], "--step", " "), "blank"),
        (("edit", "zzzz", "--minutes", "1"), "no work orders have an id"),
    ):
        wrong = cli(agent, "order", *words)
        assert (wrong.returncode, problem in wrong.stderr, "Try: " in wrong.stderr) == (1, True, True), wrong.stderr
    wrong = cli(agent, "order", "edit", order["id"][:8], "--minutes", "-1")
    assert (wrong.returncode, "-1 is not in the range" in wrong.stderr) == (2, True), wrong.stderr
    assert cli_json(agent, "order", "show", order["id"][:8]) == (0, edited)


def test_readings(tmp_path: Path, agent: Agent) -> None:
    rows = list(csv.DictReader(io.StringIO(cli(agent, "readings", "engine", "--name", "sequence").stdout)))
    assert [float(row["value"]) for row in rows] == list(range(ROWS))
    assert {row["quality"] for row in rows} == {"good"}
    lines = cli(agent, "--json", "readings", "press").stdout.splitlines()
    assert len([json.loads(line) for line in lines]) >= 2 * PRESS_ROWS
    database = tmp_path / "export.db"
    _, tables = cli_json(agent, "readings", "--database", str(database))
    with closing(sqlite3.connect(database)) as connection:
        stored = connection.execute("SELECT count(*) FROM readings WHERE asset = 'engine' AND name = 'sequence'")
        assert stored.fetchone() == (ROWS,)
        for name, count in tables.items():
            assert connection.execute(f'SELECT count(*) FROM "{name}"').fetchone() == (count,)
    again = cli(agent, "readings", "--database", str(database))
    assert (again.returncode, again.stderr[:6]) == (1, "Error:")


def test_models(tmp_path: Path, agent: Agent) -> None:
    _, models = cli_json(agent, "model", "list")
    states = {model["name"]: model["state"] for model in models}
    assert states == {"rig-fault": "ready", "rig-wave": "unloaded", "turbofan-rul": "ready"}
    _, model = cli_json(agent, "model", "show", "rig-fault")
    assert model["inputs"][0]["shape"] == [-1, 44]
    features = tmp_path / "features.csv"
    features.write_text(",".join(["0.5"] * 44) + "\n" + ",".join(["0.1"] * 44) + "\n")
    code, answer = cli_json(agent, "predict", "rig-fault", "--input", str(features))
    assert (code, answer["outputs"][0]["shape"]) == (0, [2, 6])
    request = {"inputs": [{"name": "features", "shape": [1, 44], "datatype": "FP32", "data": [0.5] * 44}]}
    done = cli(agent, "--json", "predict", "rig-fault", "--input", "-", stdin=json.dumps(request))
    assert json.loads(done.stdout)["outputs"][0]["data"] == pytest.approx(answer["outputs"][0]["data"][:6], rel=1e-4)
    features.write_text("1,2,3\n")
    wrong = cli(agent, "predict", "rig-fault", "--input", str(features))
    assert (wrong.returncode, "44" in wrong.stderr) == (1, True)


def test_telemetry_status(agent: Agent) -> None:
    _, status = cli_json(agent, "telemetry", "status")
    assert (status["enabled"], status["connected"]) == (True, True)
    assert "Acknowledged" in cli(agent, "telemetry", "status").stdout


def test_telemetry_tail_follows(folder: Path, agent: Agent) -> None:
    stream = agent.client.stream("telemetry.tail", count=2)
    recording = folder / "press.csv"
    found: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    row = PRESS_ROWS
    while reader.is_alive() and row < 2000:
        write_rows(recording, 1, first=row)
        row += 1
        reader.join(0.1)
    assert [line["asset"] for line in found] == ["press", "press"]
    assert found[1]["seq"] == found[0]["seq"] + 1


def test_check_has_exit_codes(tmp_path: Path, agent: Agent, millhand_agent: Callable[..., Agent]) -> None:
    code, findings = check(agent)
    levels = {name: found["level"] for name, found in findings.items()}
    assert levels["daemon"] == levels["broker"] == levels["model rig-fault"] == levels["asset engine"] == "ok"
    assert code == (3 if "warning" in levels.values() else 0)
    assert "error" not in levels.values()
    # No broker and no daemon: warnings. A wrong file: errors.
    alone = millhand_agent("", started=False)
    code, findings = check(alone)
    assert (code, findings["daemon"]["level"], findings["broker"]["level"]) == (3, "warning", "warning")
    assert all(found["hint"] for found in findings.values() if found["level"] != "ok")
    alone.write_config("[telemetry]\nbroker = 'x'\n")
    code, findings = check(alone)
    assert (code, "did you mean 'brokers'?" in findings["config"]["message"]) == (4, True)
    bare = cli(alone)
    assert (bare.returncode, "Try: " in bare.stderr) == (1, True)


def test_http(agent: Agent) -> None:
    assert json.loads(fetch(agent, "/v2/health/ready")) == {"ready": True}
    assert json.loads(fetch(agent, "/v2/models/turbofan-rul"))["inputs"][0]["shape"] == [-1, 86]
    fetch(agent, "/metrics")  # the load of the CPUs is taken between two
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    text = fetch(agent, "/metrics?names=triton")
    exposed = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", METRICS_PAGE.read_text(), re.MULTILINE))
    # What this node does not have: a sink, a GPU, sensors of a Jetson, rows that it dropped, sessions that count, gRPC,
    # candidates, a language model with what stands around it.
    absent = re.compile(
        "sink|gpu|accelerator|temperature|power|throttle|memory|dropped|energy|session_counts|grpc|traces|"
        "candidate|rebuild|language|gateway|guard|order_revisions|order_struck"
    )
    elsewhere = {name for name in documented if absent.search(name)}
    assert documented - elsewhere <= exposed
    assert exposed <= documented
    assert re.search(rf'^millhand_readings_total{{asset="engine"}} {ROWS * 18}(\.0)?$', text, re.MULTILINE), text
    assert re.search(rf'^millhand_predictions_total{{asset="engine"}} {ROWS}(\.0)?$', text, re.MULTILINE)
    assert re.search(r"^millhand_telemetry_queued_rows 0(\.0)?$", text, re.MULTILINE)
