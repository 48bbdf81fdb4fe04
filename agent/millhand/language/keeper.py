"""The first process of each language server: `python -m millhand.language.keeper '<JSON>'`. Standard library only.

It starts the server, keeps what the server prints in a log of bounded size, and waits. When the daemon leaves, be it by
kill -9, the pipe at standard input closes and all that the server started ends. SIGTERM asks the server to end, and
makes it end after a grace. The log is written here and not by the daemon, so that a flood costs the daemon nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIFELINE = 0
"""Standard input: a pipe that nobody writes to; its end means that the daemon is gone."""
FIRST_TO_GO = "1000"
"""Where memory runs out the kernel takes these processes, not the agent (proc(5), oom_score_adj)."""
CHUNK_BYTES = 1 << 16
MINUTE_S = 60.0
SWEEPS = 100


class BoundedLog:
    """A file of at most `bytes_cap` with one older beside it; takes at most `bytes_cap` a minute, counts the rest."""

    def __init__(self, path: Path, bytes_cap: int) -> None:
        self._path = path
        self._bytes_cap = bytes_cap
        self._file = self._begin()
        self._size = 0
        self._minute_s = time.monotonic()
        self._minute_bytes = 0
        self._left_out = 0

    def write(self, data: bytes) -> None:
        """Write what still fits this minute. A disk that fails costs the log, not the server."""
        now_s = time.monotonic()
        if now_s - self._minute_s >= MINUTE_S:
            self._say_left_out()
            self._minute_s, self._minute_bytes = now_s, 0
        room = max(0, self._bytes_cap - self._minute_bytes)
        self._left_out += max(0, len(data) - room)
        self._minute_bytes += min(len(data), room)
        self._append(data[:room])

    def close(self) -> None:
        self._say_left_out()
        self._file.close()

    def _begin(self) -> IO[bytes]:
        """A new file; what the one before says, of a server that died perhaps, is kept. Without a disk, nothing is."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.replace(self._path.with_suffix(".log.1"))
            return self._path.open("wb")
        except OSError:
            return Path(os.devnull).open("wb")

    def _say_left_out(self) -> None:
        if self._left_out:
            self._append(b"\n(%d bytes more were not written: too many in a minute)\n" % self._left_out)
            self._left_out = 0

    def _append(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._size + len(data) > self._bytes_cap:
                self._file.close()
                self._file = self._begin()
                self._size = 0
            self._file.write(data)
            self._file.flush()
            self._size += len(data)


def main() -> None:
    """Entry point of the process, which leads a session of its own."""
    told = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what the server leaves behind becomes ours to end
    log = BoundedLog(Path(told["log"]), told["log_bytes_cap"])
    try:
        server = _start(told["argv"])
    except OSError as error:
        log.write(f"'{told['argv'][0]}' cannot be started: {error.strerror}\n".encode())
        log.close()
        os._exit(127)
    _watch(server, told["stop_s"])
    assert server.stdout is not None
    reader = threading.Thread(target=_keep, args=(server.stdout, log), daemon=True)
    reader.start()
    status = server.wait()
    _end_descendants()
    reader.join(1.0)
    log.close()
    os._exit(status if status >= 0 else 128 - status)


def _start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def prepare() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(FIRST_TO_GO)

    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=prepare,  # noqa: PLW1509 - one thread runs here
    )


def _watch(server: subprocess.Popen[bytes], stop_s: float) -> None:
    """End the server on SIGTERM within `stop_s`, and at once where the daemon is gone."""

    def end_later() -> None:
        time.sleep(stop_s)
        server.kill()

    def ask(number: int, frame: object) -> None:
        server.terminate()
        threading.Thread(target=end_later, daemon=True).start()

    def hold_lifeline() -> None:
        while os.read(LIFELINE, 1):
            pass
        server.kill()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=hold_lifeline, daemon=True).start()


def _keep(pipe: IO[bytes], log: BoundedLog) -> None:
    while chunk := os.read(pipe.fileno(), CHUNK_BYTES):
        log.write(chunk)


def _end_descendants() -> None:
    """Kill what the server left, which has become ours; each round may bring children of those just killed."""
    for _ in range(SWEEPS):
        children = _children()
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _children() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


if __name__ == "__main__":
    main()
