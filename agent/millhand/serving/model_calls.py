"""The calls of the control socket that are about models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from millhand.errors import MillhandError
from millhand.serving.answer import encode_response
from millhand.serving.inference import read_request

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.serving.pool import ModelPool

log = logging.getLogger("millhand.serving")

UNNAMED = "a client of the control socket"


class ModelCalls:
    """Answers for one pool."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    def handlers(self) -> dict[str, Handler]:
        return {
            "model.list": self.list,
            "model.show": self.show,
            "model.load": self.load,
            "model.unload": self.unload,
            "model.stats": self._pool.stats,
            "model.infer": self.infer,
            "model.routes": self.routes,
        }

    async def list(self) -> list[dict[str, Any]]:
        """`ModelPool.index`."""
        return await asyncio.to_thread(self._pool.index)  # it reads artifacts to compare them with their proofs

    async def show(self, model: str) -> dict[str, Any]:
        """`ModelPool.metadata`."""
        return await asyncio.to_thread(self._pool.metadata, model)

    async def load(self, model: str, version: int | None = None, by: str = UNNAMED) -> dict[str, Any]:
        """`ModelPool.load`; the log tells of it, and who asked. An error says what serves on in spite of it."""
        try:
            entry = await self._pool.load(model, version)
        except MillhandError as error:
            told = self._with_what_serves(model, error)
            log.warning("model '%s' is not loaded, asked for by %s: %s", model, by, told.text)
            raise told from error
        log.info("model '%s' serves version %s, asked for by %s", model, _numbers(entry["versions"]), by)
        return entry

    async def unload(self, model: str, version: int | None = None, by: str = UNNAMED) -> dict[str, Any]:
        """`ModelPool.unload`; the log tells of it, and who asked."""
        entry = await self._pool.unload(model, version)
        left = f"serves version {_numbers(entry['versions'])}" if entry["versions"] else "is unloaded"
        log.info("model '%s' %s, an unload was asked for by %s", model, left, by)
        return entry

    async def infer(self, model: str, request: dict[str, Any], version: int | None = None) -> dict[str, Any]:
        """One Open Inference Protocol v2 request and its response, as plain data."""
        wanted = read_request(request)
        outputs, answered = await self._pool.infer(
            model, wanted.tensors, version=version, deadline_ms=wanted.deadline_ms, priority=wanted.priority
        )
        return encode_response(model, answered, wanted, outputs)

    def _with_what_serves(self, model: str, error: MillhandError) -> MillhandError:
        try:
            serving = self._pool.serving(model)
        except MillhandError:
            return error  # there is no such model
        what = f"version {_numbers(serving)} serves on" if serving else "no version of it serves"
        return type(error)(f"{error.message.removesuffix('.')}; {what}", hint=error.hint, retriable=error.retriable)

    def routes(self) -> AsyncIterator[dict[str, Any]]:
        """A stream: what another process needs to reach the workers itself, now and after every change."""
        return self._pool.watch_routes()


def _numbers(versions: list[int]) -> str:
    return ", ".join(map(str, versions))
