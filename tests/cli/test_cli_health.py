"""`millhand health` and `millhand hub health`: the exit code is what programs read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from millhand.telemetry.broker import EmbeddedBroker
from millhand.testing import wait_until


def cli(*words):
    command = [sys.executable, "-m", "millhand", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_agent_that_answers_is_healthy_and_one_that_is_gone_or_stopped_is_not(millhand_agent):
    agent = millhand_agent("[http]\nenabled = false\n")
    health = ("--config", agent.config_path, "health")
    done = cli(*health, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ready"] is True
    agent.process.send_signal(signal.SIGSTOP)
    try:
        done = cli(*health)
        assert done.returncode == 1 and "Error:" in done.stderr
    finally:
        agent.process.send_signal(signal.SIGCONT)
    agent.stop()
    done = cli(*health)
    assert done.returncode == 1 and "no daemon answers" in done.stderr


@pytest.fixture
def hub(tmp_path):
    """A broker that runs, and a hub's configuration for it."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        path = tmp_path / "hub.toml"
        path.write_text(f'broker = "{broker.url}"\ndata_dir = "{tmp_path}/hub"\nkeepalive_s = 5\n')
        yield path


def test_a_hub_is_healthy_while_the_broker_holds_it_for_online(hub):
    health = ("hub", "health", "--hub-config", hub)
    done = cli(*health)
    assert done.returncode == 1 and "was never there" in done.stderr
    process = subprocess.Popen([sys.executable, "-m", "millhand", "hub", "run", "--hub-config", str(hub)])
    try:
        wait_until(lambda: cli(*health).returncode == 0, "a healthy hub")
        process.kill()
        process.wait(30)
        assert wait_until(lambda: (found := cli(*health)).returncode and found, "its death").stderr.count("is offline")
    finally:
        process.kill()
        process.wait(30)
