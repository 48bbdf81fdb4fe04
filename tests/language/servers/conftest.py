"""Language servers: stand-in processes for what a real one seldom does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from server_kit import StandIn

from millhand.language.launch import Launch
from millhand.language.replica import Replica
from millhand.language.settings import LanguageSettings
from millhand.testing import wait_until


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Callable[..., Replica]]:
    """Start a replica of a stand-in with the given ways; keys of [language] as keywords. All are stopped at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def start(ways: str = "", server: Any = None, launch: Launch | None = None, **settings: Any) -> Replica:
            quick = {"model": "m", "check_s": 0.1, "restart_delay_s": 0.05, "stop_s": 5, "start_timeout_s": 60}
            launch = launch or Launch(name="m", model=tmp_path, port=0, context_tokens=512)
            made = Replica(
                "m",
                launch,
                server or StandIn(ways, tmp_path),
                LanguageSettings(**{**quick, **settings}),
                tmp_path / "log" / "m.log",
                lambda: None,
            )
            stack.push_async_callback(made.stop)
            made.start()
            return made

        yield start


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition with a deadline; returns its first truthy value."""

    async def wait(condition: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
        return await asyncio.to_thread(wait_until, condition, what, deadline_s)

    return wait
