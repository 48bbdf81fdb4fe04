"""One process of a language server as the daemon sees it: started behind a keeper, ended for good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path

import msgspec

from millhand.errors import LanguageError
from millhand.language.launch import Command
from millhand.serving.process import describe_exit

KEEPER = "millhand.language.keeper"
KEEPER_GRACE_S = 5.0
"""Beyond the server's own grace, until the keeper itself is killed."""
LOG_TAIL_BYTES = 1 << 14
WORD_CHARACTERS = 300
NOT_STARTED = 127
SIGNALLED = 128
_TROUBLE = re.compile(r"error|fail|exception|out of memory|cannot|couldn't|unable", re.IGNORECASE)


class ServerProcess:
    """A living server. Make one with `start`."""

    def __init__(self, keeper: asyncio.subprocess.Process, port: int, log_path: Path, stop_s: float) -> None:
        self.port = port
        self.log_path = log_path
        self._keeper = keeper
        self._stop_s = stop_s

    @classmethod
    async def start(
        cls, command: Command, port: int, log_path: Path, *, log_bytes_cap: int, stop_s: float
    ) -> ServerProcess:
        """Start it; what it prints goes to `log_path`. It ends with the daemon, whatever ends that."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "argv": command.argv,
            "log": os.fspath(log_path),
            "log_bytes_cap": log_bytes_cap,
            "stop_s": stop_s,
        }
        keeper = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            KEEPER,
            msgspec.json.encode(told).decode(),
            stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the keeper that we are gone
            stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, **command.environment},
            start_new_session=True,  # Ctrl-C reaches the daemon alone, which ends servers in order
        )
        return cls(keeper, port, log_path, stop_s)

    @property
    def pid(self) -> int:
        """The keeper's, which is also the number of its session and process group."""
        return self._keeper.pid

    @property
    def ended(self) -> bool:
        return self._keeper.returncode is not None

    async def wait(self) -> str:
        """Wait for its end; returns how it ended, in words."""
        status = await self._keeper.wait()
        self._end_group()
        if status == NOT_STARTED:
            return self.last_word() or "could not be started"
        return describe_exit(SIGNALLED - status if status > SIGNALLED else status)

    async def stop(self) -> None:
        """SIGTERM, after the grace SIGKILL; nothing of it is left."""
        await self._end(signal.SIGTERM, self._stop_s + KEEPER_GRACE_S)

    async def kill(self) -> None:
        """End it now."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()  # the keeper kills what it started
        await self._end(None, KEEPER_GRACE_S)

    async def _end(self, number: signal.Signals | None, within_s: float) -> None:
        if number is not None and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._keeper.send_signal(number)
        try:
            async with asyncio.timeout(within_s):
                await self._keeper.wait()
        except TimeoutError:
            self._end_group()
            await self._keeper.wait()
        self._end_group()
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._keeper.pid, signal.SIGKILL)

    def last_word(self) -> str:
        """The last line of its log that sounds like trouble, else the last line."""
        lines = [line.strip() for line in self._tail().splitlines() if line.strip()]
        troubled = [line for line in lines if _TROUBLE.search(line)]
        word = (troubled or lines or [""])[-1]
        return word[:WORD_CHARACTERS]

    def _tail(self) -> str:
        try:
            with self.log_path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


def free_port() -> int:
    """A port of 127.0.0.1 that is free now. Another may take it before a server does; see `require_owner`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_owner(process: ServerProcess) -> None:
    """Raises LanguageError where another process listens on the server's port: its answers must not be believed."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        keeper = psutil.Process(process.pid)
        for one in keeper.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for connection in one.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == process.port:
                        return
    raise LanguageError(f"another process answers on its port {process.port}", hint="a further port is tried")
