"""Keeps one worker alive: starts it for its first model, watches it, restarts it with back-off, ends it after its last.

What it does not decide: which versions should run. That is the pool's, which is told of every death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from millhand.errors import MillhandError, WorkerError
from millhand.serving.client import WorkerClient
from millhand.serving.lanes import LoadRequest
from millhand.serving.process import STUCK_S, WorkerProcess, describe_exit
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.worker_metrics import Ledger

log = logging.getLogger("millhand.serving")

EXIT_WAIT_S = 0.5
STATS_WAIT_S = 1.0
Key = tuple[str, int]  # model, version


class SupervisedWorker:
    """A worker by name, across the processes that it takes to keep it running."""

    def __init__(
        self,
        name: str,
        host: WorkerDefaults,
        launch: Callable[[str, int], Awaitable[WorkerProcess]],
        settings: ModelSettings,
        *,
        approve: Callable[[LoadRequest], Awaitable[None]],
        on_death: Callable[[Key | None, str], None],
        on_change: Callable[[], None],
        on_load_failed: Callable[[SupervisedWorker, Key, MillhandError], None],
    ) -> None:
        """`launch(name, generation)` starts a process. `approve(request)` raises ModelError where a version must not be
        loaded again. `on_death(blamed, reason)` and `on_load_failed(self, key, error)`, of a load after a restart,
        may change `wanted`."""
        self.name = name
        self.host = host
        """What the profile says about it, the accelerator above all."""
        self.wanted: dict[Key, LoadRequest] = {}
        """Versions that run, or come back after a restart."""
        self.ready: dict[Key, dict[str, Any]] = {}
        """Versions that answer now, with their metadata."""
        self.restarts = 0
        self.last_death = ""
        """Why the last process ended, or could not be started."""
        self.ledger = Ledger()
        """The counters of every version as of the last heartbeat, those of dead workers included."""
        self.process: WorkerProcess | None = None
        self._launch = launch
        self._settings = settings
        self._approve = approve
        self._on_death = on_death
        self._on_change = on_change
        self._on_load_failed = on_load_failed
        self._generations = itertools.count(1)
        self._lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._buried = asyncio.Event()
        self._buried.set()
        self._verdict = ""
        self._culprit = 0  # the thread that hangs
        self._stopped = False

    @property
    def client(self) -> WorkerClient | None:
        """The control connection; None while there is no living worker."""
        process = self.process
        return None if process is None or process.client.closed else process.client

    def holds(self, model: str) -> bool:
        """Whether a version of the model lives here, or comes back after a restart."""
        return any(name == model for name, _ in self.wanted)

    async def counters(self) -> list[dict[str, Any]]:
        """What each loaded version has counted (see LaneStats); nothing from a worker that does not answer."""
        client = self.client
        if client is None:
            return []
        try:
            entries: list[dict[str, Any]] = await client.call("stats", timeout_s=STATS_WAIT_S)
        except WorkerError:
            return []  # it dies or hangs; the heartbeat sees to it
        return entries

    async def load(self, request: LoadRequest, memory_bytes_cap: int = 0) -> dict[str, Any]:
        """Load a version, starting the worker if need be; one that is loaded is replaced once the new one is ready.

        One that takes more than `memory_bytes_cap` is refused (0 allows all); after a restart it no longer is. Raises
        what the worker raised; then nothing has changed.
        """
        async with self._turn():
            key = (request.model, request.version)
            if self.client is None:
                await self._begin()
                if self.wanted.get(key) == request and key in self.ready:
                    return self.ready[key]
            try:
                metadata = await self._load(msgspec.structs.replace(request, memory_bytes_cap=memory_bytes_cap))
            except MillhandError:
                if not self.wanted:
                    await self._end()
                raise
            self.wanted[key] = request
            self._on_change()
            return metadata

    async def unload(self, key: Key) -> None:
        """Let a version's waiting requests run, then free it; the last one ends the process."""
        async with self._lock:
            self.wanted.pop(key, None)
            if self.wanted:
                await self._free(key)
            else:
                await self._end()

    async def settle(self) -> None:
        """Load what is wanted and unload what is not, where the worker lives: `wanted` was changed from outside."""
        async with self._lock:
            if self.client is None:
                if self.wanted and self._watch is None:
                    self._watch = asyncio.create_task(self._keep_alive())
                return
            for key in [key for key in self.ready if key not in self.wanted]:
                await self._free(key)
            for key, request in list(self.wanted.items()):
                if key not in self.ready:
                    with contextlib.suppress(WorkerError):  # it died over it: a restart tries again
                        await self._reload(key, request)
            self._on_change()
            if not self.wanted:
                await self._end()

    async def stop(self) -> None:
        """End the worker for good. A load that is under way is not waited for."""
        self._stopped = True
        self.wanted.clear()
        self.ready.clear()
        try:
            async with asyncio.timeout(STUCK_S):
                await self._lock.acquire()
        except TimeoutError:
            if self.process is not None:
                self.process.client.close()
            await self._lock.acquire()
        try:
            await self._end()
        finally:
            self._lock.release()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The lock, with no dead process left: one is counted first, by the watcher, which may want the lock before."""
        while True:
            async with self._lock:
                if self.client is not None or self._buried.is_set():
                    yield
                    return
            await self._buried.wait()

    # ---- one process ------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        if self._stopped:
            raise WorkerError(f"worker '{self.name}' is stopped", hint="start the agent again", retriable=False)
        process = await self._launch(self.name, next(self._generations))
        self.process = process
        self._buried.clear()
        self._lost.clear()
        self._verdict, self._culprit = "", 0
        process.client.on_close = self._on_lost
        if process.client.closed:
            self._on_lost()
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_alive())
        for key, request in list(self.wanted.items()):
            await self._reload(key, request)

    async def _end(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        process, self.process = self.process, None
        self._buried.set()
        self.ready.clear()
        self._on_change()
        if process is not None:
            stats = await process.stop()
            if stats:
                self.ledger.take(stats)

    async def _load(self, request: LoadRequest) -> dict[str, Any]:
        if self.process is None:
            raise WorkerError(f"worker '{self.name}' is being restarted", hint="try again")
        process = self.process
        timeout_s = self._settings.load_timeout_s
        try:
            metadata: dict[str, Any] = await process.client.call("load", timeout_s, **msgspec.structs.asdict(request))
        except WorkerError as error:
            failure = await self._load_failure(request, process, error)
            process.client.close()  # a load cannot be called off: the worker goes with it
            raise failure from error
        if "replaced" in metadata:
            self.ledger.replace(metadata.pop("replaced"))
        self.ready[request.model, request.version] = metadata
        return metadata

    async def _load_failure(self, request: LoadRequest, process: WorkerProcess, error: WorkerError) -> WorkerError:
        """What went wrong with a load: the worker died, took too long, or said that it cannot."""
        version = f"model '{request.model}' version {request.version}"
        if process.client.closed:
            end = describe_exit(await process.exit_status(EXIT_WAIT_S))
            word = f": {process.last_word()}" if process.last_word() else ""
            text = f"worker '{self.name}' {end} while it loaded {version}{word}"
            hint = "look at the log, then load it again"
        elif isinstance(error.__cause__, TimeoutError):
            text = f"{version} did not load within {self._settings.load_timeout_s:g} s"
            hint = "raise [models] load_timeout_s for a large model"
        else:
            text, hint = f"{version} could not be loaded: {error.message}", error.hint
        return WorkerError(text, hint=hint, retriable=False)

    async def _free(self, key: Key) -> None:
        """Unload a version; new requests go elsewhere before those that wait are waited for."""
        was_ready = self.ready.pop(key, None) is not None
        self._on_change()
        client = self.client
        if was_ready and client is not None:
            with contextlib.suppress(WorkerError):  # a worker that dies over it is restarted without the version
                answer = await client.call("unload", self._settings.load_timeout_s, model=key[0], version=key[1])
                self.ledger.take(answer["stats"])

    def _on_lost(self) -> None:
        self.ready.clear()
        self._lost.set()
        self._on_change()

    # ---- watching ---------------------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """Runs as long as the worker has a process or should have one."""
        delay_ms = self._settings.restart_delay_ms
        while True:
            if self.process is not None:
                lived_s = await self._watch_process()
                await self._bury()
                if lived_s * 1e3 > 2 * self._settings.restart_delay_cap_ms:
                    delay_ms = self._settings.restart_delay_ms
            while self.process is None:
                if not self.wanted:
                    self._watch = None
                    return
                await asyncio.sleep(delay_ms / 1e3)
                delay_ms = min(2 * delay_ms, self._settings.restart_delay_cap_ms)
                await self._restart()

    async def _watch_process(self) -> float:
        """Return the seconds the process lived, when it has died or was found hanging."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not self._lost.is_set():
            limits_ms = [self._settings.hang_ms, *(self._hang_ms(key) for key in self.wanted)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._settings.heartbeat_ms, min(limits_ms) / 2) / 1e3):
                    await self._lost.wait()
            if not self._lost.is_set():
                self._verdict = await self._hang()
                if self._verdict:
                    break
        return loop.time() - started

    async def _hang(self) -> str:
        """Why the worker must be taken for hanging, else an empty string."""
        process = self.process
        assert process is not None
        for run in process.blackbox.runs():
            limit_ms = self._hang_ms((run.model, run.version))
            if run.since_ns > limit_ms * 1e6:
                self._culprit = run.thread
                return f"hangs: model '{run.model}' version {run.version} runs for more than {limit_ms:g} ms"
        limit_ms = self._settings.hang_ms
        try:
            self.ledger.take(await process.client.call("stats", limit_ms / 1e3))
        except WorkerError:
            return "" if self._lost.is_set() else f"hangs: no answer to a heartbeat within {limit_ms:g} ms"
        return ""

    def _hang_ms(self, key: Key) -> float:
        request = self.wanted.get(key)
        return request.hang_ms if request is not None and request.hang_ms else self._settings.hang_ms

    async def _bury(self) -> None:
        process = self.process
        assert process is not None
        process.client.close()
        status = None if self._verdict else await process.exit_status(EXIT_WAIT_S)
        suspects, (crashed, stack) = process.blackbox.suspects(), process.blackbox.crash()
        culprit = self._culprit or crashed
        found = next((one for one in suspects if one.thread == culprit), suspects[0] if suspects else None)
        blamed = None if found is None else (found.model, found.version)
        await process.kill()
        reason = f"worker '{self.name}' {self._verdict or describe_exit(status)}"
        if blamed and not self._verdict:
            reason += f" while model '{blamed[0]}' version {blamed[1]} ran"
        self.process = None
        self._buried.set()
        self.last_death = reason
        log.error("%s; it is started again", reason)
        if stack:
            log.warning("where worker '%s' crashed:\n%s", self.name, stack)
        self._on_death(blamed, reason)

    async def _restart(self) -> None:
        async with self._lock:
            if self.process is not None or not self.wanted:
                return  # a load started it, or everything was unloaded meanwhile
            self.restarts += 1
            try:
                await self._begin()
            except WorkerError as error:
                self.last_death = error.message
                log.error("%s", error.message)
            self._on_change()

    async def _reload(self, key: Key, request: LoadRequest) -> None:
        try:
            await self._approve(request)
            await self._load(request)
        except MillhandError as error:
            self._on_load_failed(self, key, error)
            if isinstance(error, WorkerError):
                raise  # the worker is gone; the death is counted, and all is tried again
            if self.wanted.get(key) == request:
                del self.wanted[key]
            elif key in self.wanted:
                await self._reload(key, self.wanted[key])
