"""Pools of real workers around small models made on the fly."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from serving_kit import KIT, backends


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
async def make_pool(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[ModelPool]]]:
    """Start a pool on `root`; settings as keywords. Every pool is stopped at the end."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(KIT), prepend=os.pathsep)
    async with contextlib.AsyncExitStack() as stack:

        async def make(**options: Any) -> ModelPool:
            hosts = options.pop("hosts", [WorkerDefaults()])
            settings = ModelSettings(paths=(root,), **{"restart_delay_ms": 20, **options})
            repository = Repository([root], settings.require_proof)
            pool = ModelPool(repository, settings, hosts, backends(), tmp_path / "run")
            stack.push_async_callback(pool.stop)
            await pool.start()
            return pool

        yield make
