"""Brings versions into workers and out again, within the memory that models may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millhand.errors import MillhandError, ModelError
from millhand.proof.verification import Subject
from millhand.registry import Registry
from millhand.serving.budget import Holding, room_bytes, room_hint, shown_bytes, victims
from millhand.serving.candidates import Candidates, Pick, loads, uses_candidates
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import load_request
from millhand.serving.placement import CPU, Placement
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.served import Served
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.supervision import SupervisedWorker

log = logging.getLogger("millhand.serving")


class Loader:
    """One for a pool, whose models and workers it changes."""

    def __init__(
        self,
        repository: Repository,
        registry: Registry,
        settings: ModelSettings,
        placement: Placement,
        models: Mapping[str, Served],
        on_change: Callable[[], None],
        candidates: Candidates | None = None,
    ) -> None:
        """`models`: what the pool serves, by name. `candidates`: none serves the models' own artifacts alone."""
        self.kept: set[str] = set()
        """Models that never make room for others."""
        self._repository = repository
        self._registry = registry
        self._settings = settings
        self._placement = placement
        self._models = models
        self._on_change = on_change
        self._candidates = candidates
        self._subjects: dict[tuple[str, int, tuple[str, ...]], list[Subject]] = {}

    async def exchange(self, served: Served, folder: ModelFolder, chosen: Sequence[int], evict: bool = True) -> None:
        """Load `chosen` where they are missing or have changed, then unload the model's other versions.

        Others make room if need be, unless `evict` is false. Raises the first failure, when all have been tried; then
        the other versions stay.
        """
        before = list(served.workers)
        workers = self._placement.place(folder, before)
        served.workers = list(dict.fromkeys([*before, *workers]))
        served.chosen = tuple(chosen)
        served.loading.update(chosen)
        self._on_change()
        failure: MillhandError | None = None
        for number in chosen:
            try:
                await self._load(served, folder, number, workers, evict)
                served.reasons.pop(number, None)
                served.banned.discard(number)
                served.evicted = ""
            except MillhandError as error:
                served.fail(number, error)
                failure = failure or error
            finally:
                served.loading.discard(number)
                self._on_change()
        if failure is not None:
            served.workers = [worker for worker in served.workers if worker.holds(served.name)] or workers
            raise failure
        served.folder, served.reasons = folder, {}
        await self.remove(served, [number for number in served.wanted if number not in chosen])
        for worker in before:
            if worker not in workers:
                await self._remove_from(worker, served.name, chosen)
        served.workers = workers
        self._on_change()

    async def remove(self, served: Served, versions: Sequence[int]) -> None:
        """Unload versions wherever they live."""
        for worker in served.workers:
            await self._remove_from(worker, served.name, versions)
        self._on_change()

    async def request(self, folder: ModelFolder, version: int, host: WorkerDefaults) -> LoadRequest:
        """What a worker on `host` is told to load: what was made of a model where that was chosen, else its own.

        Raises ConfigError or ModelError, as `Repository.approve` too.
        """
        request = self._describe(folder, version, host, await self._picks(folder, version, host))
        await self.approve_again(request)
        return request

    def uses(self, served: Served, model: str) -> bool:
        """Whether all versions of a model and its steps are still those that are loaded, and `model` is among them."""
        loaded = {(part.model, part.version) for request in served.requests() for part in loads(request)}
        try:
            planned = {
                (part.name, number)
                for version in served.wanted
                for part, number in self._repository.parts(served.folder, version)
            }
        except ModelError:
            return False  # one of them is gone from disk; what is loaded serves on
        return planned <= loaded and any(name == model for name, _ in planned)

    def original(self, folder: ModelFolder, version: int, host: WorkerDefaults) -> LoadRequest:
        """The same with the models' own artifacts, not yet approved."""
        return self._describe(folder, version, host, {})

    def give_up(self, request: LoadRequest, host: WorkerDefaults, why: str) -> bool:
        """Whether a load that went wrong used candidates; then they are not tried again, and `original` is left."""
        if self._candidates is None or not uses_candidates(request):
            return False
        self._candidates.fail(request.model, request, host, why)
        return True

    async def _picks(self, folder: ModelFolder, version: int, host: WorkerDefaults) -> dict[tuple[str, int], Pick]:
        """(model, version) -> the candidate, of a version and all that it uses."""
        if self._candidates is None:
            return {}
        parts = self._repository.parts(folder, version)
        picks = [await self._candidates.pick(folder.name, part, number, host) for part, number in parts]
        found = zip(parts, picks, strict=True)
        return {(part.name, number): pick for (part, number), pick in found if pick is not None}

    def _describe(
        self, folder: ModelFolder, version: int, host: WorkerDefaults, picks: Mapping[tuple[str, int], Pick]
    ) -> LoadRequest:
        request = load_request(folder, version, self._repository, self._registry, self._settings, host, picks)
        self._subjects[_key(request)] = [
            picks[part.name, number].subject if (part.name, number) in picks else self._repository.subject(part, number)
            for part, number in self._repository.parts(folder, version)
        ]
        return request

    async def approve_again(self, request: LoadRequest) -> None:
        """Call right before a load, a restarted worker's too: files may have changed since. Raises ModelError."""
        for subject in self._subjects[_key(request)]:
            await asyncio.to_thread(self._repository.approve, subject)

    async def _remove_from(self, worker: SupervisedWorker, name: str, versions: Sequence[int]) -> None:
        for number in versions:
            if (name, number) in worker.wanted:
                await worker.unload((name, number))

    async def _load(
        self, served: Served, folder: ModelFolder, version: int, workers: Sequence[SupervisedWorker], evict: bool
    ) -> None:
        key = (folder.name, version)
        fresh: list[SupervisedWorker] = []
        try:
            for worker in workers:
                if key not in worker.wanted:
                    fresh.append(worker)
                await self._bring(worker, served, folder, version, evict)
        except MillhandError:
            for worker in fresh:
                await self._remove_from(worker, folder.name, [version])
            raise

    async def _bring(
        self, worker: SupervisedWorker, served: Served, folder: ModelFolder, version: int, evict: bool
    ) -> None:
        """Load a version as it was chosen; where a candidate goes wrong, the original in its place."""
        request = await self.request(folder, version, worker.host)
        try:
            await self._put(worker, request, served, folder, evict)
        except MillhandError as error:
            if not self.give_up(request, worker.host, error.message):
                raise
            request = self.original(folder, version, worker.host)
            await self.approve_again(request)
            await self._put(worker, request, served, folder, evict)

    async def _put(
        self, worker: SupervisedWorker, request: LoadRequest, served: Served, folder: ModelFolder, evict: bool
    ) -> None:
        key = (request.model, request.version)
        if worker.wanted.get(key) == request and key in worker.ready:
            return
        bytes_cap = await self._make_room(worker.host, served, folder, request.version, evict)
        if worker.wanted and uses_candidates(request):
            await self._placement.try_out(request, worker.host)
            await self.approve_again(request)  # nothing may have changed while it was tried
        await worker.load(request, bytes_cap)
        await self._shed(worker.host, served, request.version, served.memory_bytes(request.version, worker.host))

    # ---- memory -----------------------------------------------------------------------------------------------------

    async def _make_room(
        self, host: WorkerDefaults, served: Served, folder: ModelFolder, version: int, evict: bool
    ) -> int:
        """Make room for what the version takes at least; return the most that it may take, 0 for any.

        Raises ModelError where it cannot fit.
        """
        own_cap, cap = folder.manifest.memory_bytes_cap, self._bytes_cap(host)
        if not cap:
            return own_cap
        room = room_bytes(cap, await self._holdings(host, served, version, evict))
        wanted = served.memory_bytes(version, host) or folder.size_bytes(version)
        if wanted > room:
            raise ModelError(
                f"model '{folder.name}' version {version} takes {shown_bytes(wanted)} of memory or more, "
                f"{shown_bytes(max(room, 0))} of {shown_bytes(cap)} can be had",
                hint=room_hint(host.accelerator),
            )
        if evict:
            await self._shed(host, served, version, wanted)
        return min(room, own_cap) if own_cap else room

    async def _shed(self, host: WorkerDefaults, served: Served, version: int, wanted_bytes: int) -> None:
        """Unload what was asked least recently until this much fits."""
        cap = self._bytes_cap(host)
        if cap:
            for name in victims(cap, await self._holdings(host, served, version), wanted_bytes):
                await self._evict(self._models[name], served.name)

    def _bytes_cap(self, host: WorkerDefaults) -> int:
        return self._settings.memory_bytes_cap if host.accelerator == CPU else host.memory_bytes_cap

    async def _evict(self, victim: Served, winner: str) -> None:
        async with victim.lock:
            victim.reasons.clear()
            victim.evicted = f"unloaded to make room for model '{winner}'"
            log.warning("model '%s' is %s", victim.name, victim.evicted)
            await self.remove(victim, victim.wanted)

    async def _holdings(self, host: WorkerDefaults, served: Served, version: int, evict: bool = True) -> list[Holding]:
        """What is held of a host's memory beside this version and those of its model that will go once it is ready."""
        counters: dict[str, list[dict[str, Any]]] = {}
        for worker in self._placement.workers.values():
            if worker.host == host:
                for entry in await worker.counters():
                    counters.setdefault(entry["model"], []).append(entry)
        holdings = []
        for name, other in self._models.items():
            versions = set(other.ready)
            if other is served:
                versions &= set(served.chosen) - {version}
            bytes_held = sum(other.memory_bytes(number, host) for number in versions)
            counted = counters.get(name, [])
            busy = not counted or any(entry["waiting"] or entry["running"] for entry in counted)
            kept = not evict or busy or other is served or name in self.kept or other.lock.locked()
            used_ns = max((entry["used_ns"] for entry in counted), default=0)
            holdings.append(Holding(name, bytes_held, used_ns, kept))
        return holdings


def _key(request: LoadRequest) -> tuple[str, int, tuple[str, ...]]:
    return request.model, request.version, tuple(part.artifact for part in loads(request))
