"""One process of a language server, kept alive: started, proved, watched, started again with back-off, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from millhand.errors import LanguageError, MillhandError
from millhand.language.exchange import bearer, exchange
from millhand.language.launch import Launch, ServerFigures
from millhand.language.process import ServerProcess, free_port
from millhand.language.proving import Proof, await_health, healthy, prove

if TYPE_CHECKING:
    from millhand.hookspecs import LanguageServer
    from millhand.language.settings import LanguageSettings

log = logging.getLogger("millhand.language")

State = Literal["starting", "ready", "restarting", "failed"]
STEADY_DELAYS = 2
"""A server that was ready for so many of the longest pauses starts with the shortest again."""
HTTP_OK = 200
EXIT_WAIT_S = 0.5
KEY_BYTES = 32
KILLED = "died of SIGKILL"


class Replica:
    """Across the processes that it takes to keep it running. It is never given up: it tells its state and reason."""

    def __init__(
        self,
        name: str,
        launch: Launch,
        server: LanguageServer,
        settings: LanguageSettings,
        log_path: Path,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.launch = launch
        self.state: State = "starting"
        self.reason = ""
        """Why it is not ready, or why it was started again."""
        self.hint = ""
        self.restarts = 0
        self.proof: Proof | None = None
        self.figures = ServerFigures()
        """As of the last look."""
        self.url = ""
        """Where it answers; empty while it is not ready."""
        self.api_key = ""
        """What it wants to be shown there."""
        self.log_path = log_path
        self.pid = 0
        """The process that holds all of it, and leads its group; 0 while there is none."""
        self._server = server
        self._settings = settings
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._process: ServerProcess | None = None
        self._well = False

    def start(self) -> None:
        """Begin; returns at once."""
        self._task = asyncio.create_task(self._run(), name=f"language server {self.name}")

    async def stop(self) -> None:
        """End its process and everything in it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        was_ready = bool(self.url)
        self._withdraw()
        await self._bury(gently=was_ready)

    async def restart(self) -> None:
        """End the process and start another now, whatever pause was due."""
        await self.stop()
        self.restarts += 1
        self._set("restarting", "a restart was asked for")
        self.start()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "hint": self.hint,
            "url": self.url,
            "pid": self.pid,
            "restarts": self.restarts,
            "accelerators": list(self.launch.accelerators),
            "log": str(self.log_path),
            "proof": None if self.proof is None else msgspec.to_builtins(self.proof),
            "figures": dataclasses.asdict(self.figures),
        }

    # ---- its life ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        settings = self._settings
        delay_s = settings.restart_delay_s
        while True:
            ready_s = await self._live()
            if ready_s > STEADY_DELAYS * settings.restart_delay_cap_s:
                delay_s = settings.restart_delay_s
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, settings.restart_delay_cap_s)
            self.restarts += 1
            self._set("restarting", self.reason, self.hint)

    async def _live(self) -> float:
        """One process from its start to its end; returns the seconds that it was ready. The state tells the rest.

        Cancelled, it leaves the process to `stop`.
        """
        loop = asyncio.get_running_loop()
        ready_at: float | None = None
        verdict: tuple[State, str, str]
        try:
            self._process = process = await self._start()
            await self._prove(process)
            ready_at = loop.time()
            reason = await self._watch(process)
            verdict = "restarting", reason, _hint(reason, self.log_path)
        except MillhandError as error:
            verdict = "failed", error.message, error.hint or f"its log: {self.log_path}"
        except OSError as error:
            verdict = "failed", f"it cannot be started: {error}", "see the system's limits and the data folder"
        except Exception as error:
            log.exception("language server %s", self.name)
            what = f"the plugin of '{self._server.name}' failed: {type(error).__name__}: {error}"
            verdict = "failed", what, "report this to the author of the plugin"
        log.error("language server %s is started again: %s", self.name, verdict[1])
        ready_s = 0.0 if ready_at is None else loop.time() - ready_at
        self._withdraw()
        await self._bury()
        self._set(*verdict)
        return ready_s

    async def _bury(self, gently: bool = False) -> None:
        if self._process is not None:
            await (self._process.stop() if gently else self._process.kill())
        self._process = None
        self.pid = 0

    async def _start(self) -> ServerProcess:
        port, self.api_key = free_port(), secrets.token_urlsafe(KEY_BYTES)
        command = self._server.command(dataclasses.replace(self.launch, port=port, api_key=self.api_key))
        settings = self._settings
        process = await ServerProcess.start(
            command, port, self.log_path, log_bytes_cap=settings.log_bytes_cap, stop_s=settings.stop_s
        )
        self.pid = process.pid
        return process

    async def _prove(self, process: ServerProcess) -> None:
        """Raises LanguageError where it ends, or is not proved in time."""
        timeout_s = self._settings.start_timeout_s
        proving = asyncio.create_task(self._first_completion(process))
        ending = asyncio.create_task(process.wait())
        try:
            done, _ = await asyncio.wait({proving, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if proving in done and proving.exception() is not None:
                await asyncio.wait({ending}, timeout=EXIT_WAIT_S)  # an end is said as such
            if ending.done():
                word = process.last_word()
                raise LanguageError(
                    f"it {ending.result()} before it was ready{f': {word}' if word else ''}",
                    hint=_hint(ending.result(), self.log_path),
                )
            if not done:
                what = "says that it is well, but gave no completion" if self._well else "was not well"
                raise LanguageError(
                    f"it {what} within {timeout_s:g} s",
                    hint=f"see its log: {self.log_path}; for a large model raise [language] start_timeout_s",
                )
            self.proof = proving.result()
        finally:
            proving.cancel()
            ending.cancel()
            await asyncio.gather(proving, ending, return_exceptions=True)
        self.url = _url(process)
        log.info("language server %s is ready: %d tokens in %.2f s", self.name, self.proof.tokens, self.proof.seconds)
        self._set("ready", "")

    async def _first_completion(self, process: ServerProcess) -> Proof:
        self._well = False
        await await_health(process, _url(process))
        self._well = True
        return await prove(
            _url(process),
            self.launch.name,
            self._server.abilities,
            self.launch.embeddings,
            self._settings.start_timeout_s,
            bearer(self.api_key),
        )

    async def _watch(self, process: ServerProcess) -> str:
        """Return how it ended, or why it must be taken for hanging."""
        hang_s = self._settings.hang_s
        loop = asyncio.get_running_loop()
        ending = asyncio.create_task(process.wait())
        answered_s = moved_s = loop.time()
        steps: float | None = None
        try:
            while True:
                await asyncio.wait({ending}, timeout=min(self._settings.check_s, hang_s / 4))
                if ending.done():
                    return ending.result()
                if await healthy(f"{_url(process)}", hang_s):
                    answered_s = loop.time()
                with contextlib.suppress(LanguageError):
                    self.figures = await self._look(process)
                now_s, figures = loop.time(), self.figures
                if figures.steps != steps or not figures.running:
                    steps, moved_s = figures.steps, now_s
                if ending.done():
                    return ending.result()
                if now_s - answered_s > hang_s:
                    return f"hangs: it was not well for {hang_s:g} s"
                if figures.steps is not None and now_s - moved_s > hang_s:
                    return f"hangs: it got nowhere with {figures.running:g} requests for {hang_s:g} s"
        except TimeoutError:
            return f"hangs: it did not tell its figures within {hang_s:g} s"
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _look(self, process: ServerProcess) -> ServerFigures:
        reply = await exchange(
            f"{_url(process)}/metrics", headers=bearer(self.api_key), timeout_s=self._settings.hang_s
        )
        if reply.status != HTTP_OK:
            return ServerFigures()
        return self._server.figures(reply.body.decode(errors="replace"))

    def _withdraw(self) -> None:
        self.url, self.figures = "", ServerFigures()
        self._on_change()

    def _set(self, state: State, reason: str, hint: str = "") -> None:
        self.state, self.reason, self.hint = state, reason, hint
        self._on_change()


def _hint(reason: str, log_path: Path) -> str:
    if KILLED in reason:
        return (
            f"most likely memory ran out: see the kernel's log (dmesg), and take a smaller model; its log: {log_path}"
        )
    return f"see its log: {log_path}"


def _url(process: ServerProcess) -> str:
    return f"http://127.0.0.1:{process.port}"
