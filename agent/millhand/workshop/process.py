"""One job in a process group of its own, from the caller's side: started, listened to, ended by deadline."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from millhand.control import error_from_dict
from millhand.errors import ModelError
from millhand.serving.process import describe_exit, native_environment, python_command
from millhand.workshop.jobs import AnyJob

log = logging.getLogger("millhand.workshop")

MODULE = "millhand.workshop.supervisor"
TICK_S = 0.1
GRACE_S = 2.0
"""Between SIGTERM and SIGKILL, for a maker that wants to leave things in order."""
LINE_BYTES_CAP = 64 << 20
"""The answer of a maker describes every layer."""
STDERR_LINES = 20
STDERR_LINE_CHARACTERS = 400
MIB = 1 << 20

Answer = TypeVar("Answer")
Line = dict[str, Any]


@dataclass(frozen=True)
class JobRunner:
    """Where jobs run: an interpreter, an accelerator, and limits."""

    interpreter: Path | None
    """None takes the agent's own."""
    accelerator: str
    threads: int
    deadline_s: float
    memory_bytes_cap: int = 0

    def run(
        self,
        job: AnyJob,
        answer: type[Answer],
        on_line: Callable[[Line], None] = lambda line: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Do a job and return what it answers. `on_line` gets each line on the way, `on_tick` comes every TICK_S.

        Raises the job's own MillhandError; ModelError where the process dies, takes longer than `deadline_s` or more
        memory than `memory_bytes_cap`. Whatever happens, no process of it is left.
        """
        running = _Running(self, job)
        try:
            last = running.listen(on_line, on_tick)
        finally:
            running.end()
        if "error" in last:
            raise error_from_dict(last["error"])
        if "done" not in last:
            raise running.death()
        try:
            return msgspec.convert(last["done"], answer)
        except msgspec.ValidationError as error:
            hint = "report this to the author of the plugin"
            raise ModelError(f"its answer is not what was asked for: {error}", hint=hint) from error


@dataclass
class _Pipe:
    """A stream that is read as it comes, in lines."""

    file: Any
    take: Callable[[bytes], None]
    rest: bytes = b""

    def read(self) -> bool:
        """Take what has come; False at the end."""
        chunk = os.read(self.file.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        self.rest = self.rest[-LINE_BYTES_CAP:]
        if not chunk and self.rest:
            lines.append(self.rest)
        for line in lines:
            self.take(line)
        return bool(chunk)


@dataclass
class _Running:
    """A living job."""

    runner: JobRunner
    job: AnyJob
    process: subprocess.Popen[bytes] = field(init=False)
    words: deque[str] = field(default_factory=lambda: deque(maxlen=STDERR_LINES))
    lines: deque[Line] = field(default_factory=deque)

    def __post_init__(self) -> None:
        runner = self.runner
        command = python_command(runner.interpreter, MODULE, msgspec.json.encode(self.job).decode())
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # never written to: its end tells the supervisor that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=native_environment(runner.accelerator, runner.threads),
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(
                f"the workshop's process cannot be started with '{command[0]}': {error.strerror}",
                hint="mend [models] interpreter or the profile's",
            ) from error

    def listen(self, on_line: Callable[[Line], None], on_tick: Callable[[], None]) -> Line:
        """Pass lines on until the process has ended; returns its last line."""
        last: Line = {}
        end_s = time.monotonic() + self.runner.deadline_s
        ended = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for file, take in ((self.process.stdout, self._take_line), (self.process.stderr, self._take_word)):
                    assert file is not None
                    selector.register(file, selectors.EVENT_READ, _Pipe(file, take))
                selector.register(ended, selectors.EVENT_READ)
                alive = True
                while alive:
                    ready = selector.select(TICK_S)
                    alive = all(key.data is not None for key, _ in ready)
                    for key, _ in ready:
                        if key.data is not None and not key.data.read():
                            selector.unregister(key.fileobj)
                    if alive:
                        on_tick()
                        self._check_limits(end_s, ended)
                    else:
                        self._drain(selector)
                    while self.lines:
                        last = self.lines.popleft()
                        on_line(last)
                return last
        finally:
            os.close(ended)

    def end(self) -> None:
        """End the process group and everything in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            if file is not None:
                file.close()

    def death(self) -> ModelError:
        """The error of a process that ended without a word."""
        status = self.process.returncode
        what = f"its process {describe_exit(status)}"
        hint = "report this to the author of the plugin"
        if status == -signal.SIGKILL:
            what, hint = "its process was killed", "most likely memory ran out: see the kernel's log (dmesg)"
        return ModelError(f"{what}: {self.words[-1]}" if self.words else what, hint=hint)

    def _check_limits(self, end_s: float, ended: int) -> None:
        cap = self.runner.memory_bytes_cap
        if time.monotonic() > end_s:
            os.killpg(self.process.pid, signal.SIGTERM)
            select.select([ended], [], [], GRACE_S)
            raise ModelError(
                f"it was not done within {self.runner.deadline_s:.0f} s",
                hint="give it more time: [workshop] deadline_s, or --budget",
            )
        if cap and (held := _group_bytes(self.process.pid)) > cap:
            raise ModelError(
                f"it took {held / MIB:.0f} MiB of memory, allowed are {cap / MIB:.0f}",
                hint="raise [workshop] memory_bytes_cap",
            )

    def _drain(self, selector: selectors.BaseSelector) -> None:
        """Read what lies in the pipes still; a process that was left behind may hold them open for ever."""
        pipes = [key for key in selector.get_map().values() if key.data is not None]
        for key in pipes:
            os.set_blocking(key.fd, False)
            with contextlib.suppress(BlockingIOError):
                while key.data.read():
                    pass

    def _take_line(self, line: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            self.lines.append(msgspec.json.decode(line, type=Line))

    def _take_word(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()[:STDERR_LINE_CHARACTERS]
        if text:
            self.words.append(text)
            log.debug("workshop: %s", text)


def _group_bytes(leader: int) -> int:
    """Resident memory of a process and all that descend from it."""
    with contextlib.suppress(psutil.Error):
        processes = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
        held = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
        return held
    return 0


def own_runner(deadline_s: float) -> JobRunner:
    """For what needs the agent's own packages: the plugins' evaluations."""
    return JobRunner(Path(sys.executable), "cpu", 1, deadline_s)
