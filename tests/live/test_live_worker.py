"""A model's worker that dies or hangs under a running agent, and a model that cannot be loaded."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from live_kit import HTTP_OFF, check, ended, file_asset, state_of, write_engine

import millhand_plugins.turbofan as turbofan
from millhand.testing import Agent

ROWS = 600
SHIPPED = Path(turbofan.__file__).parent / "models" / "turbofan-rul"


def worker_pid(agent: Agent) -> int:
    """The worker's process; 0 while there is none."""
    assert agent.process is not None
    for child in psutil.Process(agent.process.pid).children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "millhand.serving.worker" in child.cmdline():
                return child.pid
    return 0


def predicted(agent: Agent) -> int:
    count: int = state_of(agent, "engine")["counters"]["predictions"]
    return count


def test_a_worker_that_dies_and_one_that_hangs_cost_no_prediction(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_engine(tmp_path / "engine.csv", ROWS)
    agent = millhand_agent(
        HTTP_OFF
        + "[models]\nhang_ms = 500\nheartbeat_ms = 200\ndeadline_ms = 1000\n[plugins.turbofan]\n"
        + file_asset(recording, "engine", models=["turbofan-rul"], speed=1.5)
    )
    for number, due in ((signal.SIGKILL, 40), (signal.SIGSTOP, 150), (signal.SIGKILL, 300)):
        agent.wait(lambda due=due: predicted(agent) >= due, f"{due} predictions")
        pid = agent.wait(lambda: worker_pid(agent), "a worker")
        os.kill(pid, number)
        agent.wait(lambda pid=pid: worker_pid(agent) not in (0, pid), f"another worker after {number.name}")
        assert not psutil.pid_exists(pid)
    agent.wait(ended(agent, "engine"), "the end of the replay")
    found = agent.call("prediction.list", asset="engine", limit=10_000)
    assert len({one["window_end_ns"] for one in found}) == len(found) == ROWS
    status = state_of(agent, "engine")
    assert (status["counters"]["predictions_failed"], status["error"]) == (0, "")
    assert "it is started again" in agent.log()
    assert "hangs: no answer to a heartbeat within 500 ms" in agent.log()
    assert agent.stop() == 0


def test_a_garbage_model_costs_no_reading_and_says_what_to_do(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    folder = tmp_path / "models" / "turbofan-rul"
    shutil.copytree(SHIPPED, folder)
    artifact = folder / "1" / "model.onnx"
    good = artifact.read_bytes()
    artifact.write_bytes(b"\x00garbage" * 500)
    recording = write_engine(tmp_path / "engine.csv", 50)
    agent = millhand_agent(
        HTTP_OFF
        + f'[models]\npaths = ["{tmp_path / "models"}"]\n[plugins.turbofan]\n'
        + file_asset(recording, "engine", models=["turbofan-rul"])
    )
    agent.wait(ended(agent, "engine"), "the end of the replay")
    status = state_of(agent, "engine")
    assert status["counters"]["readings"] == 50 * 18
    assert (status["counters"]["predictions"], status["counters"]["predictions_failed"]) == (0, 50)
    assert "turbofan-rul" in status["error"]
    assert str(artifact) in status["error"]
    assert status["hint"]
    (model,) = [model for model in agent.call("model.list") if model["name"] == "turbofan-rul"]
    assert (model["state"], str(artifact) in model["reason"]) == ("failed", True)
    code, findings = check(agent)
    assert code == 4
    assert str(artifact) in findings["model turbofan-rul"]["message"]
    assert findings["model turbofan-rul"]["hint"]
    # Mended, it serves after a restart.
    artifact.write_bytes(good)
    agent.stop()
    agent.start()
    (model,) = [model for model in agent.call("model.list") if model["name"] == "turbofan-rul"]
    assert model["state"] == "ready"
    assert worker_pid(agent)
