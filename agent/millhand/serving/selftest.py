"""Tries the parts of backends that may not work on this machine, in worker processes of their own."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from millhand.errors import MillhandError, ProviderMissingError, WorkerError
from millhand.hookspecs import Trial, TriedBackend
from millhand.registry import Registry
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import backend_sources, trial_request
from millhand.serving.manifest import Manifest
from millhand.serving.placement import CPU, cpu_host
from millhand.serving.process import WorkerProcess
from millhand.serving.protocol import fault_of
from millhand.serving.repository import Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults

log = logging.getLogger("millhand.serving")

TRIAL_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Tried:
    """What became of one trial."""

    backend: str
    part: str
    accelerator: str
    works: bool
    message: str
    hint: str = ""
    needed: bool = True
    """False where models are served without it, on the CPU."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SelfTest:
    """The trials of a node: what its models and plugins' tables ask for, each once."""

    def __init__(
        self,
        registry: Registry,
        settings: ModelSettings,
        hosts: Sequence[WorkerDefaults],
        repository: Repository,
        needed: Sequence[str],
    ) -> None:
        """hosts: as `Placement` has them; an accelerator's parts are tried on the first. needed: models of assets."""
        self.tried: list[Tried] = []
        """What is known so far; what cannot even be tried is there from the beginning."""
        self._registry = registry
        self._settings = settings
        self._hosts = {CPU: cpu_host(hosts[0]), "": hosts[0]}
        self._requests: dict[str, list[LoadRequest]] = {}
        self._asked: list[LoadRequest] = []
        models = _manifests(repository, repository.names_to_load(settings, needed))
        for _, backend in registry.collect("millhand_backends"):
            if isinstance(backend, TriedBackend):
                self._plan(backend, [model for model in models if backend.name in model.backends])

    @property
    def worthwhile(self) -> bool:
        """Whether anything but the plain CPU is to be tried."""
        return any(request.model.rpartition(" ")[2] != CPU for request in self._planned())

    async def run(self) -> list[Tried]:
        """Try everything, one after the other. Never raises a MillhandError."""
        for place, requests in self._requests.items():
            self.tried += await _try_on(self._hosts[place], self._settings, requests, self._asked)
        return self.tried

    def _planned(self) -> Iterator[LoadRequest]:
        for requests in self._requests.values():
            yield from requests

    def _plan(self, backend: Any, models: Sequence[Manifest]) -> None:
        source = backend_sources(self._registry)[backend.name]
        for model in models:
            place = CPU if model.accelerator == CPU else ""
            host = self._hosts[place]
            try:
                trials: Sequence[Trial] = backend.trials(host.accelerator, _told(source.options, backend.name, model))
                wanted = [trial_request(one, backend.name, self._registry, self._settings, host) for one in trials]
            except Exception as error:  # whatever a plugin does, the others are tried
                self.tried.append(_untried(backend.name, model.name, host.accelerator, error))
                continue
            self._asked += [request for one, request in zip(trials, wanted, strict=True) if one.asked]
            known = self._requests.setdefault(place, [])
            known += [request for request in wanted if request not in known]


def _manifests(repository: Repository, names: Sequence[str]) -> list[Manifest]:
    """Of these models and those that they use; one that cannot be served is passed over, as its load says why."""
    found: dict[str, Manifest] = {}
    for name in names:
        with contextlib.suppress(MillhandError):
            found |= {folder.name: folder.manifest for folder, _ in repository.needed([name])}
    return list(found.values())


def _told(table: Mapping[str, Any], backend: str, model: Manifest) -> dict[str, Any]:
    """The plugin's table with the model's options over it, where they are the backend's."""
    return {**table, **(model.options if model.backend == backend and not model.steps else {})}


async def _try_on(
    host: WorkerDefaults, settings: ModelSettings, requests: Sequence[LoadRequest], asked: Sequence[LoadRequest]
) -> list[Tried]:
    """Load one after the other; a worker that dies over one is followed by another."""
    found: list[Tried] = []
    worker: WorkerProcess | None = None
    with tempfile.TemporaryDirectory(prefix="mh-try-") as folder:
        try:
            for number, request in enumerate(requests):
                try:
                    if worker is None or worker.client.closed:
                        worker = await WorkerProcess.start("self-test", Path(folder) / f"{number}.sock", settings, host)
                    found.append(_good(request, await _load(worker, request)))
                except MillhandError as error:
                    needed = request in asked or not isinstance(error, ProviderMissingError)
                    found.append(_bad(request, error, needed))
                    if isinstance(error, WorkerError) and worker is not None:
                        await worker.kill()
                        worker = None
        finally:
            if worker is not None:
                await worker.kill()
    return found


async def _load(worker: WorkerProcess, request: LoadRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = await worker.client.call("load", TRIAL_DEADLINE_S, **msgspec.structs.asdict(request))
    await worker.client.call("unload", TRIAL_DEADLINE_S, model=request.model, version=request.version)
    return loaded


def _good(request: LoadRequest, loaded: Mapping[str, Any]) -> Tried:
    proof = loaded["proof"]
    evidence = f"{proof['gpu_nodes']} of {proof['nodes']} nodes on {proof['provider']}" if proof else "computes"
    return _tried(request, True, f"works on {_place(request)}: {evidence}, loaded in {loaded['load_ms'] / 1e3:.1f} s")


def _bad(request: LoadRequest, error: MillhandError, needed: bool) -> Tried:
    message = f"does not work on {_place(request)}: {error.message}" + ("" if needed else "; the CPU computes")
    return _tried(request, False, message, error.hint, needed)


def _tried(request: LoadRequest, works: bool, message: str, hint: str = "", needed: bool = True) -> Tried:
    part = request.model.partition(" ")[2]
    return Tried(request.backend, part, request.accelerator, works, message, hint, needed)


def _untried(backend: str, model: str, accelerator: str, error: Exception) -> Tried:
    """What a model asks for cannot even be tried."""
    fault = fault_of(error)
    return Tried(backend, f"model '{model}'", accelerator, False, fault.message, fault.hint)


def _place(request: LoadRequest) -> str:
    return "the CPU" if request.accelerator == CPU else request.accelerator


async def log_trials(test: SelfTest) -> None:
    """Run a daemon's self-test and say in the log what came of it."""
    for tried in await test.run():
        level = logging.INFO if tried.works else logging.ERROR if tried.needed else logging.WARNING
        hint = f" (try: {tried.hint})" if tried.hint else ""
        log.log(level, "%s: '%s' %s%s", tried.backend, tried.part, tried.message, hint)
