"""Real processes, started in order and ended against it: broker, hub, rig, agent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from millhand.demo.pace import slowed
from millhand.errors import MillhandError

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 15.0


class DemoError(MillhandError):
    """A part of the demo could not be started, or ended too early."""

    code = "demo"


@dataclass
class Part:
    """One process of the stack."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    log_path: Path


class Stack:
    """Holds the processes; leaving it ends every one of them, also after an error or Ctrl-C."""

    def __init__(self, folder: Path, scale: float = 1.0) -> None:
        """`scale`: rig seconds a second; every deadline is that much longer for a rig that lives more slowly."""
        self.folder = folder
        self._scale = scale
        self._parts: list[Part] = []

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        for part in reversed(self._parts):
            self.end(part)

    def start(self, name: str, command: Sequence[str], *, ready_line: bool = False) -> tuple[Part, dict[str, Any]]:
        """Start a process with its log in the stack's folder.

        ready_line: wait for one JSON line on stdout and return it. Raises DemoError where the process ends first.
        """
        log_path = self.folder / f"{name}.log"
        log = log_path.open("w")
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE if ready_line else log,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us alone; we end the parts in order
        )
        part = Part(name, process, log, log_path)
        self._parts.append(part)
        return part, (_ready_line(part) if ready_line else {})

    def check(self) -> None:
        """Raise DemoError if a part has ended on its own with an error."""
        for part in self._parts:
            code = part.process.poll()
            if code:
                raise DemoError(f"{part.name} ended with {code}: {_tail(part.log_path)}", hint=f"see {part.log_path}")

    def wait(self, condition: Callable[[], Any], what: str, deadline_s: float = START_DEADLINE_S) -> Any:
        """Return the first truthy value of `condition`. Raises DemoError naming `what` after the deadline."""
        deadline_s = slowed(deadline_s, self._scale)
        end = time.monotonic() + deadline_s
        while True:
            self.check()
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise DemoError(f"{what} did not come within {deadline_s:g} s", hint=f"see the logs in {self.folder}")
            time.sleep(0.05)

    def end(self, part: Part) -> int:
        """SIGTERM, then SIGKILL after a deadline; return the exit code."""
        if part.process.poll() is None:
            part.process.send_signal(signal.SIGTERM)
            try:
                part.process.wait(slowed(STOP_DEADLINE_S, self._scale))
            except subprocess.TimeoutExpired:
                part.process.kill()
                part.process.wait()
        if part.process.stdout is not None:
            part.process.stdout.close()
        part.log.close()
        if part in self._parts:
            self._parts.remove(part)
        return part.process.returncode


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def port_answers(port: int) -> bool:
    """Whether something listens on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _ready_line(part: Part) -> dict[str, Any]:
    assert part.process.stdout is not None
    line = part.process.stdout.readline()
    if not line:
        part.process.wait(STOP_DEADLINE_S)
        raise DemoError(f"{part.name} did not start: {_tail(part.log_path)}", hint=f"see {part.log_path}")
    ready: dict[str, Any] = json.loads(line)
    return ready


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"
