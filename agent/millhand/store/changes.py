"""A counter that any number of tasks can wait on."""

from __future__ import annotations

import asyncio


class Changes:
    """Counts commits that brought new rows. A waiter names the count it has seen, so no change is missed:

    `seen = store.changed.count`; read the rows; `seen = await store.changed.after(seen)`; read again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def after(self, count: int) -> int:
        """Return the new count as soon as it is above `count`."""
        while self.count <= count:
            await self._event.wait()
        return self.count
