"""The demo itself: real broker, hub, rig and agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from millhand.demo.pace import machine_load
from millhand.testing import wait_until

# Twice as fast as `make demo` where the machine is idle: the whole life in 18 s. Else as slow as that.
IDLE_SCALE = "2"


def start(folder: Path, fault: str, *more: str) -> subprocess.Popen[str]:
    pace = [] if machine_load().busy else ["--scale", IDLE_SCALE]
    command = [sys.executable, "-m", "millhand", "demo", "--fault", fault, *pace, *more, "-o", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


@pytest.mark.timeout(950)  # on a busy machine
@pytest.mark.parametrize("fault", ["bearing_outer", pytest.param("none", marks=pytest.mark.long)])
def test_the_main_job_is_done(tmp_path: Path, fault: str) -> None:
    demo = start(tmp_path, fault)
    output, errors = demo.communicate(timeout=900)
    assert demo.returncode == 0, output + errors
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts["telemetry"]["lost"] == facts["telemetry"]["duplicates"] == facts["false_alerts"] == 0
    assert facts["telemetry"]["produced"] == facts["telemetry"]["stored"] > 100
    assert facts["windows"] > 10
    if fault == "none":
        assert facts["alerts"] == facts["work_orders"] == []
    else:
        assert facts["alerts"][0]["kind"] == fault
        assert facts["alerts"][0]["lead_time_s"] > 0
        assert len(facts["work_orders"]) == len(facts["alerts"])
    assert (tmp_path / "demo.html").exists()
    assert f"Report: {tmp_path / 'demo.html'}" in output.replace("\n", "")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_language_model_writes_too(tmp_path: Path) -> None:
    demo = start(tmp_path, "bearing_outer", "--language")
    output, errors = demo.communicate(timeout=800)
    assert demo.returncode == 0, output + errors
    spoken = json.loads((tmp_path / "demo.json").read_text())["language"]
    assert [version["writer"] for version in spoken["versions"]][:1] == ["deterministic"]
    assert spoken["revision"]["outcomes"]["revised"] + spoken["revision"]["outcomes"]["unchanged"] >= 1
    assert spoken["answer"] and spoken["sources"] and spoken["tokens_per_s"] > 0
    page = (tmp_path / "demo.html").read_text()
    assert "One order, two writers" in page and spoken["sources"][0] in page


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    demo = start(tmp_path, "imbalance")
    process = psutil.Process(demo.pid)
    rig_log = tmp_path / ".demo" / "rig.jsonl"
    wait_until(lambda: rig_log.exists() and '"served"' in rig_log.read_text(), "the first answer of the rig", 60)
    family = process.children(recursive=True)
    assert len(family) >= 5, "broker, hub, rig, agent, worker"
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=150)
    assert demo.returncode == 130
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
