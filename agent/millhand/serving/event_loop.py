"""The event loop of the front processes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


def run(life: Coroutine[None, None, None]) -> None:
    """Run a process's life: on uvloop, or on asyncio's own loop where there is no wheel for it."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(life)
    else:
        uvloop.run(life)
