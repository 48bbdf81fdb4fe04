"""Fixtures for plugin authors and for us (a pytest plugin): a real agent process, conditions with a deadline.

def test_my_adapter(millhand_agent):
    agent = millhand_agent('''
        [[assets]]
        name = "press"
        adapter = "mine"
    ''')
    agent.wait(lambda: agent.call("alert.list"), "an alert")
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from millhand.control import ControlClient
from millhand.errors import ControlError

BASE_CONFIG = """
[node]
id = "test-node"
group = "test"
data_dir = "{folder}/data"
run_dir = "{run}"
"""


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = 60.0, every_s: float = 0.02) -> Any:
    """Return the first truthy value of `condition`; fail the test naming `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"{what} did not come within {deadline_s:g} s", pytrace=False)
        time.sleep(every_s)


class Agent:
    """A real agent process (`millhand run`) with its own data and run folders."""

    def __init__(
        self, folder: Path, config: str, environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix` stands before the command line, such as `["strace", "-D", "-f"]`; it must keep the process' id."""
        self.folder = folder
        self.run_dir = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))
        self.config_path = folder / "millhand.toml"
        self.log_path = folder / "agent.log"
        self.environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **(environment or {})}
        self.prefix = prefix
        self.process: subprocess.Popen[bytes] | None = None
        self.write_config(config)

    def write_config(self, config: str) -> None:
        """Write the configuration; a running agent sees it after `reload`."""
        base = BASE_CONFIG.format(folder=self.folder, run=self.run_dir)
        self.config_path.write_text(base + config)

    def start(self, wait: bool = True) -> Agent:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "millhand", "--config", str(self.config_path), "run"],
                stderr=log,
                stdout=log,
                env=self.environment,
            )
        if wait:
            self.wait(self.answers, "the agent's control socket")
        return self

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.run_dir / "control.sock")

    def answers(self) -> bool:
        """Whether the agent is up. Fails the test if its process has ended."""
        if self.process is not None and self.process.poll() is not None:
            pytest.fail(f"the agent ended with {self.process.returncode}:\n{self.log()}", pytrace=False)
        try:
            return bool(self.call("state")["ready"])
        except ControlError:
            return False

    def call(self, name: str, /, **arguments: Any) -> Any:
        return self.client.call(name, **arguments)

    def wait(self, condition: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
        return wait_until(condition, what, deadline_s, every_s=0.05)

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        return self._end(signal.SIGTERM)

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the agent did not end within 20 s of {number.name}:\n{self.log()}", pytrace=False)
        self.process = None
        return code


@contextmanager
def millhand_agents(folder: Path) -> Iterator[Callable[..., Agent]]:
    """What the fixture `millhand_agent` gives, for fixtures of a wider scope: agents with their folders in `folder`."""
    agents: list[Agent] = []

    def start(
        config: str = "",
        *,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        started: bool = True,
    ) -> Agent:
        own = folder / f"agent-{len(agents)}"
        own.mkdir()
        agent = Agent(own, config, environment, prefix)
        agents.append(agent)
        return agent.start() if started else agent

    try:
        yield start
    finally:
        for agent in agents:
            if agent.process is not None:
                agent.process.kill()
                agent.process.wait()
            shutil.rmtree(agent.run_dir)


@pytest.fixture
def millhand_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start agents: call with the TOML that follows `[node]`; all are ended after the test."""
    with millhand_agents(tmp_path) as start:
        yield start
