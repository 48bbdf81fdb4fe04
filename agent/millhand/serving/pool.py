"""The models that this node serves, and the workers that they live in. Runs in the daemon, on its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from millhand import metrics
from millhand.control import Handler
from millhand.errors import MillhandError, ModelError, WorkerError
from millhand.registry import Registry
from millhand.serving.candidate_metrics import export_candidates
from millhand.serving.candidates import Candidates, Standing
from millhand.serving.client import deadline_ns
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import batch_cap
from millhand.serving.loader import Loader
from millhand.serving.manifest import Manifest
from millhand.serving.placement import Placement
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
        hosts: Sequence[WorkerDefaults],
        registry: Registry,
        run_dir: Path,
        candidates: Candidates | None = None,
    ) -> None:
        """`hosts`: what the profile says of workers, one for each accelerator. `registry` brings backends; its plugins
        may come up later. `candidates`: none serves the models' own artifacts alone. Starts nothing."""
        self._repository = repository
        self._settings = settings
        self._registry = registry
        self._run_dir = run_dir
        self._served: dict[str, Served] = {}
        self._placement = Placement(
            hosts,
            settings,
            run_dir,
            approve=self._approve_again,
            on_death=self._died,
            on_change=self._touch,
            on_load_failed=self._failed_after_restart,
        )
        self._workers = self._placement.workers
        self._candidates = candidates
        if candidates is not None:
            candidates.when_rebuilt(self.refresh)
        self._loader = Loader(repository, registry, settings, self._placement, self._served, self._touch, candidates)
        self._changed = asyncio.Event()
        self._generation = 0
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._unhook: Callable[[], None] = lambda: None

    # ---- for the daemon ---------------------------------------------------------------------------------------------

    async def start(self, needed: Sequence[str] = ()) -> None:
        """Load what settings name and what assets need. One that fails is logged and shown by `index`, not fatal."""
        for stale in self._run_dir.glob("worker-*.sock"):
            stale.unlink(missing_ok=True)
        for bad in self._repository.bad:
            log.error("%s (%s)", bad.message, bad.hint)
        self._unhook = metrics.DAEMON.refresh_with(self._export_metrics)
        self._loader.kept = {*needed, *self._settings.pin}
        await self._load_all(self._repository.names_to_load(self._settings, needed))

    async def need(self, names: Sequence[str], folders: Sequence[Path]) -> None:
        """Load those of `names` that are not served yet; `folders` of plugins that came up since join the repository.

        As at `start`, one that fails is logged and shown.
        """
        self._repository.roots = tuple(dict.fromkeys([*self._repository.roots, *folders]))
        self._loader.kept = {*names, *self._settings.pin}
        await self._load_all([name for name in names if name not in self._served or not self._served[name].wanted])

    async def _load_all(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                entry = await self.load(name, evict=name in self._loader.kept)
                log.info("model '%s' serves version %s", name, ", ".join(map(str, entry["versions"])))
            except MillhandError as error:
                log.error("model '%s' is not served: %s", name, error.text)

    async def stop(self) -> None:
        """Let waiting requests run, then end every worker."""
        self._unhook()
        self._unhook = lambda: None
        self._stopped = True
        if self._candidates is not None:
            await self._candidates.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
        deadline = deadline_ns(self._settings.deadline_ms if deadline_ms is None else deadline_ms)
        client, chosen = served.choose(version)
        while True:
            try:
                answer = await client.infer(model, tensors, version=chosen, deadline=deadline, priority=priority)
                return answer.outputs, answer.version
            except ModelError as error:
                asked = client, chosen
                client, chosen = served.choose(version)
                if not error.retriable or asked == (client, chosen):
                    raise error  # else the version was unloaded while the request was on its way

    async def load(self, name: str, version: int | None = None, evict: bool = True) -> dict[str, Any]:
        """Read the repository anew and serve the model's version, or those of its policy.

        What is new or has changed is loaded, and what served before goes only when that is ready; where a load fails,
        the old serves on. Where memory is short, models that were asked least recently make room, if `evict`. Returns
        the model's entry of `index`. Raises ModelError, ConfigError, PluginError or WorkerError.
        """
        async with self._loading:  # one after the other, so that each one's memory can be told
            await asyncio.to_thread(self._repository.scan)
            served = self._served.get(name)
            try:
                folder = self._repository.find(name)
                chosen = folder.chosen() if version is None else (self._existing(folder, version),)
            except MillhandError as error:
                if served is not None:
                    served.fail(0, error)
                raise
            if served is None:
                served = self._served[name] = Served(folder, [])
            for stray in folder.strays:
                log.warning("model '%s': %s", name, stray.reason)
            if self._candidates is not None:
                self._candidates.forgive(name)
            async with served.lock:
                if self._stopped:
                    raise WorkerError("the agent is stopping", hint="load the model when it runs again")
                served.moving.clear()
                await self._loader.exchange(served, folder, chosen, evict)
            return await asyncio.to_thread(self._entry, name)

    async def refresh(self, model: str) -> None:
        """Serve what is served of a model with the candidates that the shelf has now, and ensembles that use it.

        No other version is taken than is loaded. Raises as `load`; then what served before serves on.
        """
        async with self._loading:
            for served in list(self._served.values()):
                async with served.lock:
                    if not self._stopped and served.wanted and self._loader.uses(served, model):
                        await self._loader.exchange(served, served.folder, served.wanted, evict=False)

    async def unload(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Stop serving a model, or one version; the last one of a worker ends it. Raises ModelError where it is not
        loaded."""
        served = self._find(name)
        async with served.lock:
            if version is not None and version not in served.wanted:
                loaded = ", ".join(map(str, served.wanted)) or "none"
                raise ModelError(f"model '{name}' has no version {version} loaded", hint=f"loaded: {loaded}")
            served.reasons.clear()
            served.evicted = ""
            served.moving.clear()
            await self._loader.remove(served, served.wanted if version is None else [version])
            return await asyncio.to_thread(self._entry, name)

    def index(self) -> list[dict[str, Any]]:
        """Every model of the repository, served or not, then the folders that are bad."""
        names = {*self._repository.models, *self._served}
        bad = [bad_entry(folder) for folder in self._repository.bad if folder.path.name not in names]
        return [self._entry(name) for name in sorted(names)] + bad

    def metadata(self, name: str) -> dict[str, Any]:
        """What a model takes and gives, where it lives, and its versions. Raises ModelError for an unknown one."""
        served = self._served.get(name)
        folder = served.folder if served else self._repository.find(name)
        host, standings = self._placement.defaults(folder), self._standings(name)
        return {**self._entry(name), **metadata(folder, served, host, self._repository, standings)}

    def serving(self, name: str) -> list[int]:
        """The versions of a model that answer now. Raises ModelError for an unknown one."""
        served = self._served.get(name)
        if served is None:
            self._repository.find(name)
        return served.ready if served else []

    def manifest(self, name: str) -> Manifest:
        """The model.toml that a model serves with, else the repository's; its `max_batch` is within the profile's.

        Raises ModelError for an unknown model.
        """
        served = self._served.get(name)
        folder = served.folder if served and served.wanted else self._repository.find(name)
        return folder.manifest.model_copy(update={"max_batch": batch_cap(folder, self._placement.defaults(folder))})

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
            models += await worker.counters()
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

    def _find(self, name: str) -> Served:
        served = self._served.get(name)
        if served is None:
            self._repository.find(name)
            raise ModelError(f"model '{name}' is not loaded", hint=f"millhand model load {name}")
        return served

    def _existing(self, folder: ModelFolder, version: int) -> int:
        if version not in folder.versions:
            known = ", ".join(map(str, folder.versions))
            why = "".join(f": {stray.reason}" for stray in folder.strays if stray.folder == str(version))
            raise ModelError(f"model '{folder.name}' has no version {version}{why}", hint=f"its folder holds {known}")
        return version

    # ---- deaths -----------------------------------------------------------------------------------------------------

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
        served.deaths.clear()
        count, period = self._settings.deaths_cap, self._settings.deaths_period_s
        why = f"took its worker down {count} times within {period:g} s ({reason})"
        dead = [worker for worker in served.workers if worker.client is None]
        exchanged = [self._exchange_for_original(worker, served, version, why) for worker in dead]
        if any(exchanged):
            return
        for worker in served.workers:
            worker.wanted.pop((served.name, version), None)
        self._fall_back(served, version, why)

    async def _approve_again(self, request: LoadRequest) -> None:
        await self._loader.approve_again(request)

    def _exchange_for_original(self, worker: SupervisedWorker, served: Served, version: int, why: str) -> bool:
        """Whether a worker had a version with candidates; from now on it shall have it without."""
        request = worker.wanted.get((served.name, version))
        if request is None or not self._loader.give_up(request, worker.host, f"it {why}"):
            return False
        worker.wanted[served.name, version] = self._loader.original(served.folder, version, worker.host)
        return True

    def _failed_after_restart(self, worker: SupervisedWorker, key: Key, error: MillhandError) -> None:
        served, version = self._served[key[0]], key[1]
        why = f"could not be loaded after a restart: {error.message}"
        if self._exchange_for_original(worker, served, version, why) or isinstance(error, WorkerError):
            return
        if self._placement.avoid(worker.host):
            served.moving.add(version)
            self._spawn(self._move(served, version, worker, why))
        else:
            self._fall_back(served, version, why)

    async def _move(self, served: Served, version: int, failed: SupervisedWorker, why: str) -> None:
        """Bring a version back on other accelerators than the one that fails it; give it up where none takes it."""
        async with self._loading, served.lock:
            if self._stopped or version not in served.moving:
                return  # it was unloaded, or another was loaded, meanwhile
            if self._candidates is not None:
                self._candidates.forgive(served.name)  # the original failed as well: the accelerator is to blame
            chosen, evict = sorted({*served.wanted, version}), served.name in self._loader.kept
            try:
                await self._loader.exchange(served, served.folder, chosen, evict)
                served.reasons[0] = f"version {version} left {failed.host.accelerator}: it {why}"
                log.error("model '%s': %s", served.name, served.reasons[0])
            except MillhandError as error:
                self._fall_back(served, version, f"{why}; nor elsewhere: {error.message}")
            finally:
                served.moving.discard(version)
        await failed.settle()  # it may hold no model any more

    def _fall_back(self, served: Served, version: int, why: str) -> None:
        """A version is given up: say why, and serve the one before it where no other serves."""
        served.banned.add(version)
        served.reasons[version], served.hints[version] = f"version {version} {why}", ""
        log.error("model '%s': %s", served.name, served.reasons[version])
        self._spawn(self._settle(served, version))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, served: Served, given_up: int) -> None:
        earlier = [n for n in served.folder.versions if n < given_up and n not in served.banned]
        async with served.lock:
            if earlier and not served.wanted:
                try:
                    for worker in served.workers:
                        request = await self._loader.request(served.folder, earlier[-1], worker.host)
                        worker.wanted[served.name, earlier[-1]] = request
                    served.reasons[given_up] += f"; version {earlier[-1]} came back"
                except MillhandError as error:
                    served.reasons[given_up] += f"; version {earlier[-1]} cannot come back: {error.message}"
                log.error("model '%s': %s", served.name, served.reasons[given_up])
            await asyncio.gather(*(worker.settle() for worker in served.workers))

    def _export_metrics(self) -> None:
        """Called before each rendering; worker counters are as old as their last heartbeat."""
        export_workers(self._workers.values())
        if self._candidates is not None:
            export_candidates(self._served.values(), self._candidates)

    def _touch(self) -> None:
        """Tell everyone who watches that routes may have changed."""
        self._generation += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _entry(self, name: str) -> dict[str, Any]:
        served = self._served.get(name)
        folder = self._repository.models.get(name)  # as it is on disk, which may be newer than what serves
        if folder is None:
            folder = served.folder if served else self._repository.find(name)
        return entry(folder, served, self._repository, self._standings(name))

    def _standings(self, name: str) -> list[Standing]:
        """What became of the choices for the versions of a model that are loaded or could not be."""
        served = self._served.get(name)
        if self._candidates is None or served is None:
            return []
        versions = {*served.wanted, *served.reasons}
        found = self._candidates.standings(name) if versions else []
        return [one for one in found if one.model != name or one.version in versions]
