"""The models that this node serves, and the workers that they live in. Runs in the daemon, on its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from millhand import metrics
from millhand.control import Handler
from millhand.errors import MillhandError, ModelError, WorkerError
from millhand.registry import Registry
from millhand.serving.client import deadline_ns
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import batch_cap, load_request
from millhand.serving.manifest import Manifest
from millhand.serving.process import WorkerProcess
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.served import Served, bad_entry, entry, metadata
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.supervision import Key, SupervisedWorker
from millhand.serving.tensors import Tensors
from millhand.serving.worker_metrics import export_workers

log = logging.getLogger("millhand.serving")


class ModelPool:
    """Loads versions by policy, sends requests to them, and takes a version back that keeps killing its worker."""

    def __init__(
        self,
        repository: Repository,
        settings: ModelSettings,
        defaults: WorkerDefaults,
        registry: Registry,
        run_dir: Path,
    ) -> None:
        """`registry` brings backends; its plugins may come up later. Starts nothing."""
        self._repository = repository
        self._settings = settings
        self._defaults = defaults
        self._registry = registry
        self._run_dir = run_dir
        self._served: dict[str, Served] = {}
        self._workers: dict[str, SupervisedWorker] = {}
        self._changed = asyncio.Event()
        self._generation = 0
        self._load_lock = asyncio.Lock()
        self._unhook: Callable[[], None] = lambda: None

    # ---- for the daemon ---------------------------------------------------------------------------------------------

    async def start(self, needed: Sequence[str] = ()) -> None:
        """Load what settings name and what assets need. One that fails is logged and shown by `index`, not fatal."""
        for stale in self._run_dir.glob("worker-*.sock"):
            stale.unlink(missing_ok=True)
        for bad in self._repository.bad:
            log.error("%s", bad.message)
        self._unhook = metrics.DAEMON.refresh_with(self._export_metrics)
        await self._load_all(self._names_to_load(needed))

    async def need(self, names: Sequence[str], folders: Sequence[Path]) -> None:
        """Load those of `names` that are not served yet; `folders` of plugins that came up since join the repository.

        As at `start`, one that fails is logged and shown.
        """
        self._repository.roots = tuple(dict.fromkeys([*self._repository.roots, *folders]))
        await self._load_all([name for name in names if name not in self._served or not self._served[name].wanted])

    async def _load_all(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                await self.load(name)
            except MillhandError as error:
                log.error("model '%s' is not served: %s", name, error.message)

    async def stop(self) -> None:
        """Let waiting requests run, then end every worker."""
        self._unhook()
        self._unhook = lambda: None
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))
        self._served.clear()
        self._workers.clear()
        self._touch()

    async def infer(
        self,
        model: str,
        tensors: Tensors,
        *,
        version: int | None = None,
        deadline_ms: float | None = None,
        priority: int = 0,
    ) -> tuple[dict[str, Any], int]:
        """Run one request; returns (output name -> array, the version that answered).

        tensors: input name -> array with the batch as its first dimension. deadline_ms: time from now, the settings'
        where None. A cancelled call is cancelled in the worker. Raises InputError, ModelError, OverloadError,
        DeadlineError, or WorkerError (retriable: the worker died, hangs or is being restarted).
        """
        served = self._find(model)
        chosen = served.choose(version)
        client = served.worker.client
        if client is None:
            raise served.restarting()
        deadline = deadline_ns(self._settings.deadline_ms if deadline_ms is None else deadline_ms)
        answer = await client.infer(model, tensors, version=chosen, deadline=deadline, priority=priority)
        return answer.outputs, answer.version

    async def load(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Read the repository anew and serve the model's version, or those of its policy.

        What served before goes only when the new is ready; a failed load changes nothing and says why. Returns the
        model's entry of `index`. Raises ModelError, ConfigError, PluginError or WorkerError.
        """
        async with self._load_lock:
            self._repository.scan()
            folder = self._repository.find(name)
            served = self._served.get(name) or self._admit(folder)
            try:
                chosen = folder.chosen() if version is None else (self._existing(folder, version),)
                for number in chosen:
                    if (name, number) not in served.worker.wanted:
                        await served.worker.load(self._request(folder, number))
            except MillhandError as error:
                served.reason = error.message
                self._touch()
                raise
            served.folder, served.reason = folder, ""
            served.banned.difference_update(chosen)
            for number in served.wanted:
                if number not in chosen:
                    await served.worker.unload((name, number))
            self._touch()
            return self._entry(name)

    async def unload(self, name: str) -> dict[str, Any]:
        """Stop serving a model; the last one of a worker ends it. Raises ModelError for an unknown one."""
        async with self._load_lock:
            served = self._find(name)
            served.reason = ""
            for number in served.wanted:
                await served.worker.unload((name, number))
            self._touch()
            return self._entry(name)

    def index(self) -> list[dict[str, Any]]:
        """Every model of the repository, served or not, then the folders that are bad."""
        entries = [self._entry(name) for name in sorted({*self._repository.models, *self._served})]
        return entries + [bad_entry(folder) for folder in self._repository.bad]

    def metadata(self, name: str) -> dict[str, Any]:
        """What a model takes and gives, where it lives, and its versions. Raises ModelError for an unknown one."""
        served = self._served.get(name)
        folder = served.folder if served else self._repository.find(name)
        return metadata(folder, served, batch_cap(folder, self._defaults))

    def manifest(self, name: str) -> Manifest:
        """The model.toml of a model in the repository, its `max_batch` within the profile's. Raises ModelError."""
        folder = self._repository.find(name)
        return folder.manifest.model_copy(update={"max_batch": batch_cap(folder, self._defaults)})

    async def stats(self) -> dict[str, Any]:
        """`models`: counters of every loaded version (see LaneStats); `workers`: pid, restarts, in flight."""
        models: list[dict[str, Any]] = []
        workers: list[dict[str, Any]] = []
        for worker in list(self._workers.values()):
            client, process = worker.client, worker.process
            workers.append({
                "name": worker.name,
                "pid": process.pid if process and client else None,
                "restarts": worker.restarts,
                "in_flight": client.in_flight if client else 0,
            })  # fmt: skip
            if client is not None:
                try:
                    models += await client.call("stats", timeout_s=1.0)
                except WorkerError:
                    continue  # it dies or hangs; the heartbeat sees to it
        return {"models": models, "workers": workers}

    def routes(self) -> dict[str, Any]:
        """What another process needs to send requests itself: model -> state, metadata, version -> worker socket."""
        models = {name: served.route() for name, served in self._served.items()}
        return {"generation": self._generation, "models": models, "deadline_ms": self._settings.deadline_ms}

    async def watch_routes(self) -> AsyncIterator[dict[str, Any]]:
        """Yield `routes` now and after every change."""
        while True:
            changed = self._changed
            yield self.routes()
            await changed.wait()

    def control_handlers(self) -> dict[str, Handler]:
        """The calls of the control socket that are the pool's; see serving/model_calls.py."""
        from millhand.serving.model_calls import ModelCalls

        return ModelCalls(self).handlers()

    # ---- choosing ---------------------------------------------------------------------------------------------------

    def _names_to_load(self, needed: Sequence[str]) -> list[str]:
        named = list(self._settings.load)
        if "*" in named:
            return sorted(self._repository.models)
        if not named:
            own = [path.resolve() for path in self._settings.paths]
            models = self._repository.models.values()
            named = sorted(model.name for model in models if model.path.parent.resolve() in own)
        return list(dict.fromkeys([*needed, *named]))

    def _find(self, name: str) -> Served:
        served = self._served.get(name)
        if served is None:
            self._repository.find(name)
            raise ModelError(f"model '{name}' is not loaded", hint=f"load it: add '{name}' to [models] load")
        return served

    def _existing(self, folder: ModelFolder, version: int) -> int:
        if version not in folder.versions:
            known = ", ".join(map(str, folder.versions))
            raise ModelError(f"model '{folder.name}' has no version {version}", hint=f"its folder holds {known}")
        return version

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _admit(self, folder: ModelFolder) -> Served:
        own = folder.manifest.isolation == "own" or (
            folder.manifest.isolation == "auto" and self._defaults.accelerator != "cpu"
        )
        label = folder.name if own else "shared"
        worker = self._workers.get(label)
        if worker is None:
            worker = SupervisedWorker(
                label, self._launch, self._settings, self._died, self._touch, self._failed_after_restart
            )
            self._workers[label] = worker
        served = self._served[folder.name] = Served(folder, worker)
        return served

    async def _launch(self, name: str, generation: int) -> WorkerProcess:
        number = list(self._workers).index(name)  # short, for the kernel's limit on socket paths
        path = self._run_dir / f"worker-{number}-{generation}.sock"
        return await WorkerProcess.start(name, path, self._defaults.accelerator, self._settings, self._defaults)

    def _request(self, folder: ModelFolder, version: int) -> LoadRequest:
        self._repository.check_proof(folder, version)
        return load_request(folder, version, self._registry, self._settings, self._defaults)

    def _died(self, blamed: Key | None, reason: str) -> None:
        """A worker died; count it against the version that ran, and take that version back after too many."""
        if blamed is None or blamed[0] not in self._served:
            return
        name, version = blamed
        served = self._served[name]
        now_s = time.monotonic()
        served.deaths.append((now_s, version))
        while served.deaths and served.deaths[0][0] < now_s - self._settings.deaths_period_s:
            served.deaths.popleft()
        if sum(number == version for _, number in served.deaths) >= self._settings.deaths_cap:
            self._take_back(served, version, reason)

    def _take_back(self, served: Served, version: int, reason: str) -> None:
        served.banned.add(version)
        served.deaths.clear()
        served.worker.wanted.pop((served.name, version), None)
        earlier = [n for n in served.folder.versions if n < version and n not in served.banned]
        count, period = self._settings.deaths_cap, self._settings.deaths_period_s
        served.reason = f"version {version} took its worker down {count} times within {period:g} s ({reason})"
        if earlier and not served.wanted:
            served.worker.wanted[served.name, earlier[-1]] = self._request(served.folder, earlier[-1])
            served.reason += f"; version {earlier[-1]} came back"
        log.error("model '%s': %s", served.name, served.reason)

    def _failed_after_restart(self, key: Key, error: MillhandError) -> None:
        served = self._served[key[0]]
        served.reason = f"version {key[1]} could not be loaded after a restart: {error.message}"
        log.error("model '%s': %s", served.name, served.reason)

    def _export_metrics(self) -> None:
        """Called before each rendering; worker counters are as old as their last heartbeat."""
        export_workers(self._workers.values())

    def _touch(self) -> None:
        """Tell everyone who watches that routes may have changed."""
        self._generation += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _entry(self, name: str) -> dict[str, Any]:
        served = self._served.get(name)
        return entry(served.folder if served else self._repository.models[name], served)
