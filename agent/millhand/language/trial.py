"""A language server for a measurement: started, asked, weighed, ended; not the one that serves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from millhand.errors import LanguageError
from millhand.hookspecs import LanguageServer
from millhand.language.launch import Launch
from millhand.language.process import KEEPER
from millhand.serving.process import describe_exit

START_S = 300.0
ANSWER_S = 600.0
PAUSE_S = 0.05
LOG_BYTES_CAP = 1 << 20
STOP_S = 5.0
WORD_CHARACTERS = 300


class TrialServer:
    """One server on loopback, as a context. It ends with this process, whatever ends that."""

    def __init__(self, server: LanguageServer, launch: Launch, log: Path) -> None:
        self._server = server
        self._launch = launch
        self._log = log

    def __enter__(self) -> TrialServer:
        """Start it and wait until it is ready. Raises LanguageError where it does not come up."""
        command = self._server.command(self._launch)
        told = {"argv": command.argv, "log": str(self._log), "log_bytes_cap": LOG_BYTES_CAP, "stop_s": STOP_S}
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", KEEPER, json.dumps(told)],
            stdin=subprocess.PIPE,  # its end tells the keeper that we are gone
            stdout=subprocess.DEVNULL,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask it. Raises LanguageError where it does not answer, or refuses."""
        return self._ask("POST", path, json.dumps(body).encode())

    def resident_bytes(self) -> int:
        """Memory of the server that is in use now, the parts of its file included that were read."""
        held = 0
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._keeper.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    held += process.memory_info().rss
        return held

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._launch.port, timeout=ANSWER_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise LanguageError(f"the trial of '{self._launch.name}': {error}{self._word()}") from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            text = data.decode(errors="replace")[:WORD_CHARACTERS]
            raise LanguageError(f"the trial of '{self._launch.name}' answers {path} with {answer.status}: {text}")
        return json.loads(data)

    def _wait_ready(self) -> None:
        end_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(LanguageError):
                self._ask("GET", "/health")
                return
            if (status := self._keeper.poll()) is not None:
                raise LanguageError(
                    f"the server for '{self._launch.model.name}' {describe_exit(status)}{self._word()}",
                    hint="look whether the server knows the model's architecture",
                )
            if time.monotonic() > end_s:
                raise LanguageError(f"the server for '{self._launch.model.name}' is not ready after {START_S:.0f} s")
            time.sleep(PAUSE_S)

    def _word(self) -> str:
        """What its log says last."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            troubled = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
            return f": {(troubled or lines or [''])[-1][:WORD_CHARACTERS]}"
        return ""

    def _end(self) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()  # the keeper kills what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(STOP_S + STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._keeper.pid, signal.SIGKILL)
        self._keeper.wait()
