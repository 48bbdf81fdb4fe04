"""The models that this node serves, and the workers that they live in. Runs in the daemon, on its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millhand import metrics
from millhand.control import Handler
from millhand.errors import ConfigError, MillhandError, ModelError, WorkerError, suggestion
from millhand.registry import Registry
from millhand.serving.client import deadline_ns
from millhand.serving.lanes import LoadRequest
from millhand.serving.manifest import Manifest, TensorSpec
from millhand.serving.process import WorkerProcess
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.supervision import Key, SupervisedWorker
from millhand.serving.tensors import Tensors
from millhand.serving.worker_metrics import export_workers

log = logging.getLogger("millhand.serving")


@dataclass(frozen=True)
class BackendSource:
    """Where a backend comes from: what a worker imports, and the plugin's validated table as plain data."""

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)


def backend_sources(registry: Registry) -> dict[str, BackendSource]:
    """Backend name -> where it comes from, of every loaded plugin; the first of a name wins."""
    sources: dict[str, BackendSource] = {}
    for plugin_name, backend in registry.collect("millhand_backends"):
        plugin = registry.plugins[plugin_name]
        options = {} if plugin.config is None else plugin.config.model_dump(mode="json")
        module = plugin.module.partition(":")[0]
        sources.setdefault(backend.name, BackendSource(backend.name, module, options))
    return sources


@dataclass
class Served:
    """What the pool knows of one model that it serves, or tried to."""

    folder: ModelFolder
    worker: SupervisedWorker
    reason: str = ""
    """Why the model is not what the owner asked for: a failed load, a version that was taken back."""
    banned: set[int] = field(default_factory=set)
    deaths: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def wanted(self) -> list[int]:
        return sorted(version for name, version in self.worker.wanted if name == self.name)

    @property
    def ready(self) -> list[int]:
        return sorted(version for name, version in self.worker.ready if name == self.name)

    @property
    def state(self) -> str:
        """ready, restarting, failed or unloaded."""
        if self.ready:
            return "ready"
        if self.wanted:
            return "restarting"
        return "failed" if self.reason else "unloaded"


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
        chosen = self._choose(served, version)
        client = served.worker.client
        if client is None:
            raise self._restarting(served)
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
        bad = [
            {"name": folder.path.name, "state": "bad", "reason": folder.message, "hint": folder.hint, "versions": []}
            for folder in self._repository.bad
        ]
        return entries + bad

    def metadata(self, name: str) -> dict[str, Any]:
        """What a model takes and gives, where it lives, and its versions. Raises ModelError for an unknown one."""
        served = self._served.get(name)
        folder = served.folder if served else self._repository.find(name)
        manifest = folder.manifest
        return {
            **self._entry(name),
            "licence": manifest.licence,
            "backend": manifest.backend,
            "path": str(folder.path),
            "policy": manifest.policy,
            "max_batch": self._max_batch(folder),
            "inputs": [_tensor(spec) for spec in manifest.inputs],
            "outputs": [_tensor(spec) for spec in manifest.outputs],
            "needs": [] if manifest.window is None else [*manifest.window.signals, *manifest.window.waveforms],
            "rules": [rule.name for rule in manifest.rules],
            "metadata": manifest.metadata,
        }

    def manifest(self, name: str) -> Manifest:
        """The model.toml of a model in the repository, its `max_batch` within the profile's. Raises ModelError."""
        folder = self._repository.find(name)
        return folder.manifest.model_copy(update={"max_batch": self._max_batch(folder)})

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
        models: dict[str, Any] = {}
        for name, served in self._served.items():
            process = served.worker.process
            manifest = served.folder.manifest
            models[name] = {
                "state": served.state,
                "reason": served.reason,
                "backend": manifest.backend,
                "inputs": [_tensor(spec) for spec in manifest.inputs],
                "outputs": [_tensor(spec) for spec in manifest.outputs],
                "sockets": {} if process is None else {str(n): str(process.path) for n in served.ready},
            }
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

    def _choose(self, served: Served, version: int | None) -> int:
        ready = served.ready
        if version is None and ready:
            return ready[-1]
        if version is not None and version in ready:
            return version
        if served.state == "restarting":
            raise self._restarting(served)
        if served.state != "ready":
            why = f": {served.reason}" if served.reason else ""
            raise ModelError(f"model '{served.name}' is {served.state}{why}", hint="load it again once that is mended")
        raise ModelError(
            f"model '{served.name}' has no version {version}; ready: {', '.join(map(str, ready))}",
            hint="ask for one of these, or for none in particular",
        )

    def _restarting(self, served: Served) -> WorkerError:
        return WorkerError(f"the worker of model '{served.name}' is being restarted", hint="send the request again")

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
        manifest = folder.manifest
        sources = backend_sources(self._registry)
        source = sources.get(manifest.backend)
        if source is None:
            raise ConfigError(
                f"model '{folder.name}': key 'backend' = '{manifest.backend}' is not known"
                f"{suggestion(manifest.backend, sources)}",
                hint=f"loaded plugins bring: {', '.join(sources) or 'none'}; add the plugin to the config",
            )
        self._repository.check_proof(folder, version)
        threads = self._settings.threads or self._defaults.threads
        plugin_options = {**source.options, "threads": source.options.get("threads") or threads}
        return LoadRequest(
            model=folder.name,
            version=version,
            artifact=str(folder.artifact(version)),
            backend=source.name,
            module=source.module,
            plugin_options=plugin_options,
            options=manifest.options,
            accelerator=self._defaults.accelerator,
            inputs=manifest.specs(manifest.inputs),
            outputs=manifest.specs(manifest.outputs),
            max_batch=self._max_batch(folder),
            max_delay_us=manifest.max_delay_us,
            queue=self._settings.queue,
            warmup=manifest.warmup,
        )

    def _max_batch(self, folder: ModelFolder) -> int:
        return min(folder.manifest.max_batch, self._defaults.max_batch or folder.manifest.max_batch)

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
        folder = served.folder if served else self._repository.models[name]
        return {
            "name": name,
            "description": folder.manifest.description,
            "state": served.state if served else "unloaded",
            "reason": served.reason if served else "",
            "versions": served.ready if served else [],
            "available": list(folder.versions),
            "proof": {str(version): folder.proof(version)[0] for version in folder.versions},
            "worker": served.worker.name if served else "",
        }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape), "unit": spec.unit}
