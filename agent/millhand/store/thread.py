"""The store's thread: the event loop hands it work and is told when that is done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from millhand.errors import StoreError
from millhand.store.database import Database
from millhand.store.engine import Engine
from millhand.store.settings import StoreSettings
from millhand.store.writer import EncodedStep, Writer

Result = TypeVar("Result")

GROUP_STEPS = 256


class StoreThread:
    """Owns the database from open to close, so that an fsync never stalls the event loop.

    Steps that wait while a commit is under way go together into the next one (group commit). Single calls run between
    groups, one a round, so neither starves the other. `changed` is called on the loop after new rows are committed.
    """

    def __init__(self, path: Path, settings: StoreSettings, changed: Callable[[], None]) -> None:
        self.database = Database(path, settings)
        self._settings = settings
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._steps: deque[tuple[EncodedStep, asyncio.Future[None]]] = deque()
        self._calls: deque[tuple[Callable[[Engine], Any], asyncio.Future[Any]]] = deque()
        self._stopping = False
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    async def start(self) -> None:
        """Open the database. Raises StoreError."""
        self._thread.start()
        await self._opened

    async def stop(self) -> None:
        """Finish what is queued, close the database, end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await self._closed
        self._thread.join()

    def commit(self, step: EncodedStep) -> asyncio.Future[None]:
        done: asyncio.Future[None] = self._loop.create_future()
        self._put(lambda: self._steps.append((step, done)))
        return done

    def engine_call(self, function: Callable[[Engine], Result]) -> asyncio.Future[Result]:
        done: asyncio.Future[Result] = self._loop.create_future()
        self._put(lambda: self._calls.append((function, done)))
        return done

    def call(self, function: Callable[[Writer], Result]) -> asyncio.Future[Result]:
        return self.engine_call(lambda engine: engine.call(function))

    def _put(self, append: Callable[[], None]) -> None:
        with self._wake:
            if self._stopping:
                raise StoreError("the store is closed", hint="start the daemon again", retriable=True)
            append()
            self._wake.notify()

    # ---- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.database.open()
            engine = Engine(self.database, self._settings)
        except BaseException as error:
            self._tell(_fail, [self._opened], error)
            return
        self._tell(_succeed, [self._opened], None)
        wait_s = 0.0
        while self._round(engine, wait_s):
            wait_s = engine.upkeep()
        self.database.close()
        self._tell(_succeed, [self._closed], None)

    def _round(self, engine: Engine, wait_s: float) -> bool:
        """Wait for work, do one group and one call; False when all is done and the store is to close."""
        with self._wake:
            until_s = time.monotonic() + wait_s
            while not (self._steps or self._calls or self._stopping):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return True
                self._wake.wait(left_s)
            group = [self._steps.popleft() for _ in range(min(len(self._steps), GROUP_STEPS))]
            call = self._calls.popleft() if self._calls else None
        if group:
            errors = engine.write([step for step, _ in group])
            self._tell(self._finish, [done for _, done in group], errors)
        if call is not None:
            self._answer(engine, *call)
        return bool(group or call or not self._stopping)

    def _answer(self, engine: Engine, function: Callable[[Engine], Any], done: asyncio.Future[Any]) -> None:
        try:
            result = function(engine)
        except Exception as error:
            self._tell(_fail, [done], error)
        else:
            self._tell(_succeed, [done], result)

    def _tell(self, function: Callable[..., None], futures: Sequence[asyncio.Future[Any]], outcome: Any) -> None:
        # A loop that is closed has nobody left who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, futures, outcome)

    # ---- on the loop ------------------------------------------------------------------------------------------------

    def _finish(self, futures: Sequence[asyncio.Future[None]], errors: Sequence[StoreError | None]) -> None:
        for done, error in zip(futures, errors, strict=True):
            if error is None:
                _succeed([done], None)
            else:
                _fail([done], error)
        if None in errors:
            self._changed()


def _succeed(futures: Sequence[asyncio.Future[Any]], result: Any) -> None:
    for done in futures:
        if not done.done():
            done.set_result(result)


def _fail(futures: Sequence[asyncio.Future[Any]], error: BaseException) -> None:
    for done in futures:
        if not done.done():
            done.set_exception(error)
