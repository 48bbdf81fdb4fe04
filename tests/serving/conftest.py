"""Pools of real workers around small models made on the fly."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from millhand import metrics
from millhand.control import ControlServer
from millhand.proof.signature import Keyring
from millhand.serving.candidates import Candidates
from millhand.serving.front import FrontProcess, http_front
from millhand.serving.front_metrics import FrontMetrics
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.settings import HttpSettings, ModelSettings, WorkerDefaults
from millhand.workshop.keys import Keys
from millhand.workshop.recipe import Target
from millhand.workshop.shelf import Shelf

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "proof" / "kit"))

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
            hosts, rebuilder = options.pop("hosts", [WorkerDefaults()]), options.pop("rebuilder", None)
            names = options.pop("targets", {"cpu": "cpu"})
            targets = {accelerator: Target(name=name, accelerator=accelerator) for accelerator, name in names.items()}
            settings = ModelSettings(paths=(root,), **{"restart_delay_ms": 20, **options})
            keyring = Keyring(tmp_path / "data", settings.trusted_keys)
            repository = Repository([root], settings.require_proof, keyring)
            registry = backends()
            shelf, keys = Shelf(tmp_path / "data" / "built"), Keys(registry, settings.interpreter)
            candidates = Candidates(shelf, repository, registry, keys, targets, settings.use_built, rebuilder)
            pool = ModelPool(repository, settings, hosts, registry, tmp_path / "run", candidates)
            stack.push_async_callback(pool.stop)
            await pool.start()
            return pool

        yield make


Node = tuple[ModelPool, httpx.AsyncClient, FrontProcess]


@pytest.fixture
async def served(
    root: Path, make_pool: Callable[..., Awaitable[ModelPool]], tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Node]]]:
    """Start a pool and one HTTP process in front of whatever `root` holds then: keys of [http], and those of [models]
    as keywords."""

    async def render(names: str, front: dict[str, Any]) -> str:
        fronts = FrontMetrics()
        fronts.take(front)
        return metrics.DAEMON.render(names) + fronts.render(names)

    async def take_report(front: dict[str, Any]) -> None:
        """What the daemon would keep."""

    async with contextlib.AsyncExitStack() as stack:

        async def start(http: dict[str, Any] | None = None, **options: Any) -> Node:
            pool = await make_pool(**options)
            handlers = {**pool.control_handlers(), "metrics": render, "metrics.report": take_report}
            control = ControlServer(tmp_path / "c.sock", handlers)
            await control.start()
            stack.push_async_callback(control.stop)
            process = http_front(HttpSettings(port=0, processes=1, **(http or {})), tmp_path / "c.sock")
            await process.start()
            stack.push_async_callback(process.stop)
            url = f"http://127.0.0.1:{process.port}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, trust_env=False))
            return pool, client, process

        yield start
