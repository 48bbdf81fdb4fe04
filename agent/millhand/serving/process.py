"""One worker process as the daemon sees it: started by exec, spoken to over its control socket, ended for good."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

import millhand
from millhand.control import check_socket_path
from millhand.errors import WorkerError
from millhand.serving.blackbox import Blackbox
from millhand.serving.client import WorkerClient
from millhand.serving.settings import ModelSettings, WorkerDefaults

log = logging.getLogger("millhand.serving")

WORKER = "millhand.serving.worker"
# What a foreign interpreter runs: its own packages win, millhand and the plugins come last.
FOREIGN_START = (
    "import importlib, sys; sys.path.extend(sys.argv.pop(1).split(':')); "
    "importlib.import_module(sys.argv.pop(1)).main()"
)
LISTEN_BACKLOG = 64
RUNNERS_DEFAULT_CAP = 4
STUCK_S = 1.0
"""At the stop, a worker that runs one batch for longer, or runs none and does not answer, is not waited for."""
STDERR_LINES = 20
STDERR_LINE_CHARACTERS = 400


async def _whole(*command: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a process; a caller that is cancelled meanwhile, even twice, leaves none that nobody collects."""
    starting = asyncio.create_task(asyncio.create_subprocess_exec(*command, **options))
    cancelled = await _outlasts_cancelling(starting)
    process = starting.result()
    if cancelled:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await _outlasts_cancelling(asyncio.create_task(process.communicate()))
        raise asyncio.CancelledError
    return process


async def _outlasts_cancelling(task: asyncio.Task[Any]) -> bool:
    """Wait until a task is done, whoever cancels the caller; whether somebody did."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


class WorkerProcess:
    """A living worker. Make one with `start`."""

    def __init__(self, name: str, path: Path, process: asyncio.subprocess.Process, blackbox: Blackbox) -> None:
        self.name = name
        self.path = path
        """The socket that other clients connect to."""
        self.pid = process.pid
        self.blackbox = blackbox
        self.client: WorkerClient
        self.last_words: deque[str] = deque(maxlen=STDERR_LINES)
        self._process = process
        self._ended: asyncio.Task[int] | None = None
        self._stderr = asyncio.create_task(self._read_stderr())

    @classmethod
    async def start(cls, name: str, path: Path, settings: ModelSettings, host: WorkerDefaults) -> WorkerProcess:
        """Start a worker on `host` and wait for its hello. Raises WorkerError naming the remedy."""
        listener = _listen(path)
        near, far = socket.socketpair()
        blackbox, blackbox_fd = Blackbox.create()
        try:
            argument = {
                "name": name,
                "control_fd": far.fileno(),
                "blackbox_fd": blackbox_fd,
                "listen_fd": listener.fileno(),
                "cpus": settings.cpus or host.cpus,
                "runners": settings.runners or host.runners or _runners(host),
            }
            interpreter = settings.interpreter or host.interpreter
            process = await _whole(
                *python_command(interpreter, WORKER, msgspec.json.encode(argument).decode()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(far.fileno(), blackbox_fd, listener.fileno()),
                env=native_environment(host.accelerator, settings.threads or host.threads),
                start_new_session=True,  # Ctrl-C reaches the daemon alone, which ends workers in order
            )
        except BaseException as error:
            near.close()
            blackbox.close()
            path.unlink()  # noqa: ASYNC240 (a name on tmpfs)
            if not isinstance(error, OSError):
                raise
            raise WorkerError(
                f"worker '{name}' cannot be started with '{interpreter or sys.executable}': {error.strerror}",
                hint="mend [models] interpreter or the profile's",
                retriable=False,
            ) from error
        finally:
            far.close()
            listener.close()
            os.close(blackbox_fd)
        self = cls(name, path, process, blackbox)
        self.client = WorkerClient(near, name, settings.ring_slots, settings.ring_slot_bytes)
        try:
            await self.client.start(settings.load_timeout_s)
        except BaseException as error:
            await self.kill()
            if isinstance(error, Exception):
                raise WorkerError(
                    f"worker '{name}' did not start: {self.last_word() or error}",
                    hint="the workers' interpreter needs NumPy, msgspec, pluggy and the backend",
                ) from error
            raise
        return self

    async def stop(self, grace_s: float = 5.0) -> list[dict[str, Any]]:
        """Let waiting requests run, then end the process: at once where it hangs, after `grace_s` in any case.

        Returns the stats of every loaded version after its last request; none where the worker did not answer. It ends
        at once where the caller is cancelled, who has let go of it already.
        """
        stats: list[dict[str, Any]] = []
        if self._ended is not None:
            await self.kill()
            return stats
        shutdown = asyncio.create_task(self.client.call("shutdown", timeout_s=grace_s))
        try:
            await self._wait_while_it_works(shutdown)
            shutdown.cancel()
            with contextlib.suppress(WorkerError, asyncio.CancelledError):
                stats = (await shutdown)["stats"]
        finally:
            shutdown.cancel()
            await self.kill()
        return stats

    async def _wait_while_it_works(self, task: asyncio.Task[Any]) -> None:
        """Wait for the task, but no longer than the worker gets anywhere: the black box says what it does."""
        loop = asyncio.get_running_loop()
        idle_since_s = loop.time()
        while not task.done():
            await asyncio.wait({task}, timeout=STUCK_S / 20)
            running = self.blackbox.running()
            if running is not None:
                idle_since_s = loop.time()
            if (running is not None and running.since_ns > STUCK_S * 1e9) or loop.time() - idle_since_s > STUCK_S:
                return

    async def kill(self) -> int:
        """End the process now and return its exit status (negative: the signal).

        A caller that is cancelled meanwhile still waits for the end, which is near: nobody else collects the process.
        """
        self.client.close() if hasattr(self, "client") else None
        if self._ended is None:
            self._signal_kill()
            self._ended = asyncio.create_task(self._collect())
        if await _outlasts_cancelling(self._ended):
            raise asyncio.CancelledError
        return self._ended.result()

    def _signal_kill(self) -> None:
        """SIGKILL. `Process.kill` polls first, and takes a dead process's status from asyncio, which then says 255."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _collect(self) -> int:
        status = await self._process.wait()
        await self._stderr
        self.blackbox.close()
        self.path.unlink(missing_ok=True)
        return status

    async def exit_status(self, within_s: float) -> int | None:
        """The status of a process that ends by itself within that time, else None."""
        try:
            async with asyncio.timeout(within_s):
                return await self._process.wait()
        except TimeoutError:
            return None

    def last_word(self) -> str:
        """The last line that it wrote to stderr."""
        return self.last_words[-1] if self.last_words else ""

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        rest = b""
        while chunk := await self._process.stderr.read(4096):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-STDERR_LINE_CHARACTERS:]
            for line in lines:
                self._keep(line)
        if rest:
            self._keep(rest)

    def _keep(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()[:STDERR_LINE_CHARACTERS]
        if text:
            self.last_words.append(text)
            log.warning("worker %s: %s", self.name, text)  # the log limits repeats


def _runners(host: WorkerDefaults) -> int:
    """Batches at once where nobody says: an accelerator is shared best by large batches, CPUs by several small ones."""
    if host.accelerator != "cpu":
        return 1
    return min(len(host.cpus or os.sched_getaffinity(0)), RUNNERS_DEFAULT_CAP)


def describe_exit(status: int | None) -> str:
    """Words for an exit status."""
    if status is None:
        return "closed its control socket"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"exited with status {status}"


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(check_socket_path(path)))
        path.chmod(0o660)
        listener.listen(LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def python_command(interpreter: Path | None, module: str, argument: str) -> list[str]:
    """How to start a module of ours, by its `main`, with the profile's interpreter; None takes the daemon's own."""
    if interpreter is None or os.fspath(interpreter) == sys.executable:
        return [sys.executable, "-m", module, argument]
    roots = [str(Path(millhand.__file__).parents[1])]
    with contextlib.suppress(ImportError):
        import millhand_plugins

        roots += [str(Path(folder).parent) for folder in millhand_plugins.__path__]
    return [os.fspath(interpreter), "-c", FOREIGN_START, ":".join(dict.fromkeys(roots)), module, argument]


def native_environment(accelerator: str, threads: int | str) -> dict[str, str]:
    """The environment of a process with native libraries, which sees one accelerator or none."""
    return {
        **os.environ,
        "ORT_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "" if accelerator == "cpu" else accelerator,
        "OMP_NUM_THREADS": str(threads) if isinstance(threads, int) else "1",
        # NumPy only copies here; its BLAS would reserve memory for a thread on each core.
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # malloc_trim gives back all of the first arena, of others not what lies on top
        "PYTHONUNBUFFERED": "1",
    }
