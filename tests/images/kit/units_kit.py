"""systemd's part of a node that has none: units are read as they were installed, and their commands run so.

`systemctl start` runs ExecStart as the unit's User and waits until the agent serves, `stop` ends it with SIGTERM,
`reload` sends SIGHUP. `journalctl` and `timedatectl` are held against what the programs of this machine know.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

from node_kit import Node

UNITS = Path("usr/lib/systemd/system")
STARTED_DEADLINE_S = 120.0
PROGRAMS = ("systemctl", "journalctl", "timedatectl")


class Units:
    """The units of a node; one at a time may run."""

    def __init__(self, node: Node, logs: Path) -> None:
        self._node, self._logs = node, logs
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def command(self, text: str) -> str:
        """Do what a command line of systemd's means; return what it prints. AssertionError where it is wrong."""
        program, *words = shlex.split(text)
        if program == "systemctl":
            verb, unit = words
            return str(getattr(self, f"_{verb.replace('-', '_')}")(unit) or "")
        known = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
        for word in words:
            if word.startswith("-") or (program == "timedatectl" and word == words[0]):
                assert re.search(rf"(^|\s){re.escape(word)}\b", known, re.MULTILINE), f"{program} knows no {word}"
        if program == "journalctl":
            self.read(words[words.index("-u") + 1])
        return ""

    def read(self, unit: str) -> configparser.RawConfigParser:
        """The unit as it was installed."""
        path = self._node.root / UNITS / f"{unit.removesuffix('.service')}.service"
        assert path.exists(), f"no unit {unit} is installed"
        read = configparser.RawConfigParser(strict=False)
        read.optionxform = str  # type: ignore[assignment,method-assign]
        read.read_string(path.read_text())
        return read

    def end(self) -> None:
        """Kill what still runs."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def _enable(self, unit: str) -> None:
        assert self.read(unit).has_section("Install"), f"{unit} cannot be enabled"

    def _start(self, unit: str) -> None:
        if self.running:
            return
        service = self.read(unit)["Service"]
        user = service["User"]
        for kind, place in (("RuntimeDirectory", "/run"), ("StateDirectory", "/var/lib")):
            mode = service[f"{kind}Mode"]
            self._node.run("install", "-d", "-m", mode, "-o", user, "-g", user, f"{place}/{service[kind]}")
        self._running = self._node.start(*shlex.split(service["ExecStart"]), user=user, log=self._logs / f"{unit}.log")
        end = time.monotonic() + STARTED_DEADLINE_S
        while not self._state().get("ready"):
            assert self.running, f"{unit} ended: {(self._logs / f'{unit}.log').read_text()[-2000:]}"
            assert time.monotonic() < end, f"{unit} was not ready in time"
            time.sleep(0.5)

    def _stop(self, unit: str) -> None:
        self.read(unit)
        if self._running is not None and self.running:
            self._signal("TERM")
            assert self._running.wait(60) == 0, f"{unit} did not end well"

    def _restart(self, unit: str) -> None:
        self._stop(unit)
        self._start(unit)

    def _reload(self, unit: str) -> None:
        assert "HUP" in self.read(unit)["Service"]["ExecReload"]
        self._signal("HUP")

    def _status(self, unit: str) -> str:
        assert self.running, f"{unit} does not run"
        return self.read(unit)["Unit"]["Description"]

    def _signal(self, name: str) -> None:
        self._node.run("sh", "-c", f"kill -{name} {self._state()['pid']}")

    def _state(self) -> dict[str, object]:
        state: dict[str, object] = json.loads(self._node.run("millhand", "--json", codes=(0, 1)).stdout)
        return state
