"""A real agent process for benchmarks: `millhand run` with its own folders, asked over its control socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from millhand.control import ControlClient
from millhand.errors import ControlError

BASE = """\
[node]
id = "bench"
group = "bench"
data_dir = "{folder}/data"
run_dir = "{folder}/run"
[log]
level = "warning"
"""


class BenchAgent:
    """Use as a context manager: started and ready inside, ended after."""

    def __init__(self, config: str, *, keep: bool = False, environment: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mhb-"))
        self.config_path = self.folder / "millhand.toml"
        self.config_path.write_text(BASE.format(folder=self.folder) + config)
        self.log_path = self.folder / "agent.log"
        self.start_s = 0.0
        self._keep = keep
        self._environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BenchAgent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM)
        if not self._keep and error is None:
            shutil.rmtree(self.folder)

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.folder / "run" / "control.sock", timeout_s=120)

    @property
    def store_path(self) -> Path:
        return self.folder / "data" / "millhand.db"

    def call(self, name: str, /, **arguments: Any) -> Any:
        return self.client.call(name, **arguments)

    def start(self) -> None:
        """Start the process and wait until it is ready; `start_s` says how long that took."""
        begin = time.monotonic()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millhand", "--config", str(self.config_path), "run"],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.wait(self._ready, "readiness", 60, every_s=0.01)
        self.start_s = time.monotonic() - begin

    def end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None

    def wait(self, condition: Callable[[], Any], what: str, deadline_s: float, every_s: float = 0.2) -> Any:
        """Return the first truthy value of `condition`. Raises SystemExit with the agent's log after the deadline."""
        end = time.monotonic() + deadline_s
        while True:
            if self.process is not None and self.process.poll() is not None:
                raise SystemExit(f"the agent ended: {self.log_path.read_text()[-2000:]}")
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise SystemExit(f"{what} did not come in {deadline_s} s: {self.log_path.read_text()[-2000:]}")
            time.sleep(every_s)

    def wait_assets_ended(self, deadline_s: float, say: Callable[[int, int], None] | None = None) -> None:
        """Wait until every asset's source has ended."""

        def ended() -> bool:
            assets = self.call("asset.list")
            done = sum(asset["state"] == "ended" for asset in assets)
            if say is not None:
                say(done, len(assets))
            broken = [asset for asset in assets if asset["state"] == "waiting"]
            if broken:
                raise SystemExit(f"an asset cannot start: {broken[0]}")
            return done == len(assets)

        self.wait(ended, "the end of all assets", deadline_s, every_s=1.0)

    def _ready(self) -> bool:
        try:
            return bool(self.call("state")["ready"])
        except ControlError:
            return False
