"""The calls of the control socket that are about models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from millhand.serving.inference import encode_response, read_request

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.serving.pool import ModelPool


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

    async def load(self, model: str, version: int | None = None) -> dict[str, Any]:
        """`ModelPool.load`."""
        return await self._pool.load(model, version)

    async def unload(self, model: str, version: int | None = None) -> dict[str, Any]:
        """`ModelPool.unload`."""
        return await self._pool.unload(model, version)

    async def infer(self, model: str, request: dict[str, Any], version: int | None = None) -> dict[str, Any]:
        """One Open Inference Protocol v2 request and its response, as plain data."""
        wanted = read_request(request)
        outputs, answered = await self._pool.infer(
            model, wanted.tensors, version=version, deadline_ms=wanted.deadline_ms, priority=wanted.priority
        )
        return encode_response(model, answered, wanted, outputs)

    def routes(self) -> AsyncIterator[dict[str, Any]]:
        """A stream: what another process needs to reach the workers itself, now and after every change."""
        return self._pool.watch_routes()
