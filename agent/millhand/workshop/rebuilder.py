"""Makes stale candidates anew in the background: one at a time, at the lowest priority, and never in a loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from millhand.errors import MillhandError, ModelError
from millhand.serving.process import describe_exit
from millhand.workshop.background import Task

log = logging.getLogger("millhand.workshop")

MODULE = "millhand.workshop.background"
FAILURES_CAP = 5
"""After so many nothing is tried until the model is loaded on command, or the agent starts again."""
PAUSE_FIRST_S, PAUSE_FACTOR = 60.0, 4.0
DEADLINE_S = 4 * 3600.0
"""The workshop ends its jobs itself, long before."""
STOP_GRACE_S = 5.0
WORDS_BYTES = 4000


@dataclass(frozen=True)
class Stale:
    """A candidate that has to be made anew."""

    model: str
    version: int
    target: str
    candidate: str
    recipe: str
    differences: tuple[str, ...]
    """In what the machine differs from what the candidate is tied to."""


@dataclass
class _Order:
    stale: Stale
    state: str = "waits"
    """waits, builds, done, failed."""
    failures: int = 0
    due_s: float = 0.0
    """CLOCK_MONOTONIC."""
    error: str = ""


class Rebuilder:
    """One for a node; `ask` may be called at every load."""

    def __init__(self, config_path: Path | None) -> None:
        """`config_path`: of the configuration that builds read."""
        self.on_built: Callable[[str], Awaitable[None]] | None = None
        """Brings what was made of a model into use; may raise MillhandError."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(model, `built` or `failed`) -> how often."""
        self._config = "" if config_path is None else os.fspath(config_path)
        self._orders: dict[tuple[str, int, str], _Order] = {}
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def states(self) -> Counter[str]:
        """How many candidates wait, build, are done and have failed for good."""
        return Counter(order.state for order in self._orders.values())

    def ask(self, stale: Stale) -> None:
        """Make a candidate anew, unless that is under way or has failed too often. One that was made anew and is stale
        all the same counts as a failure."""
        place = (stale.model, stale.version, stale.target)
        order = self._orders.get(place)
        if order is None or order.stale != stale:
            self._orders[place] = _Order(stale)
            log.warning("%s is made anew: %s", _name(stale), "; ".join(stale.differences))
        elif order.state == "done":
            self._fail(order, "what was made anew is stale as well")
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="rebuilder")
        self._asked.set()

    def forgive(self, model: str) -> None:
        """Try again at once what has failed: the owner loads the model."""
        for place in [place for place, order in self._orders.items() if place[0] == model and order.state != "builds"]:
            del self._orders[place]

    def told(self, model: str, version: int, target: str) -> str:
        """How it stands with one, for people; empty where nothing was asked."""
        order = self._orders.get((model, version, target))
        if order is None or order.state == "done":
            return ""
        if order.state == "builds":
            return "it is being made anew"
        if order.state == "failed":
            return f"it could not be made anew {order.failures} times, the last time: {order.error}"
        if not order.failures:
            return "it will be made anew"
        wait_s = max(0, round(order.due_s - time.monotonic()))
        return f"it could not be made anew: {order.error}; tried again in {wait_s} s"

    async def stop(self) -> None:
        """End the build that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            self._asked.clear()
            waiting = [order for order in self._orders.values() if order.state == "waits"]
            order = min(waiting, key=lambda order: order.due_s, default=None)
            wait_s = None if order is None else order.due_s - time.monotonic()
            if order is None or (wait_s is not None and wait_s > 0):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._asked.wait()
                continue
            await self._carry_out(order)

    async def _carry_out(self, order: _Order) -> None:
        stale, order.state = order.stale, "builds"
        try:
            await self._build(stale)
        except (MillhandError, OSError) as error:
            self._fail(order, error.message if isinstance(error, MillhandError) else str(error))
            return
        order.state = "done"
        self.counts[stale.model, "built"] += 1
        log.info("%s was made anew", _name(stale))
        try:
            if self.on_built is not None:
                await self.on_built(stale.model)
        except MillhandError as error:
            log.error("model '%s' was made anew and could not be loaded: %s", stale.model, error.message)

    def _fail(self, order: _Order, why: str) -> None:
        order.failures += 1
        order.error = why
        order.state = "waits" if order.failures < FAILURES_CAP else "failed"
        order.due_s = time.monotonic() + PAUSE_FIRST_S * PAUSE_FACTOR ** (order.failures - 1)
        self.counts[order.stale.model, "failed"] += 1
        log.error("%s could not be made anew: %s", _name(order.stale), why)

    async def _build(self, stale: Stale) -> None:
        """Raises ModelError with the last word of a build that failed, OSError where none can be started."""
        task = Task(
            agent=os.getpid(),
            config=self._config,
            model=stale.model,
            version=stale.version,
            target=stale.target,
            recipe=stale.recipe,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", MODULE, msgspec.json.encode(task).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(DEADLINE_S):
                _, err = await process.communicate()
        except TimeoutError as error:
            raise ModelError(f"it took longer than {DEADLINE_S / 3600:g} h") from error
        finally:
            await _end(process)
        if process.returncode:
            raise ModelError(_last_word(err) or f"the build {describe_exit(process.returncode)}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a build and what it started: gently, then for good."""
    if process.returncode is not None:
        return
    for number, wait_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await process.wait()


def _last_word(err: bytes) -> str:
    """The message of the error that the build said last."""
    lines = err[-WORDS_BYTES:].decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(msgspec.MsgspecError, TypeError, KeyError):
            return str(msgspec.json.decode(line)["message"])
    return lines[-1].strip() if lines else ""


def _name(stale: Stale) -> str:
    return f"candidate '{stale.candidate}' of model '{stale.model}' version {stale.version} for {stale.target}"
