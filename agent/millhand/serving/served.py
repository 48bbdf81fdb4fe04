"""What the pool knows of one model, and how it tells of it: its entry in the index, its metadata, its route."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from millhand.errors import MillhandError, ModelError, WorkerError
from millhand.serving.candidates import Standing, loads
from millhand.serving.client import WorkerClient
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import batch_cap, batch_cap_key, delay_us
from millhand.serving.manifest import Manifest, TensorSpec
from millhand.serving.repository import BadFolder, ModelFolder, Repository, strays_in, versions_in
from millhand.serving.settings import WorkerDefaults
from millhand.serving.steps import step_label
from millhand.serving.supervision import SupervisedWorker


@dataclass
class Served:
    """One model that the pool serves, or tried to."""

    folder: ModelFolder
    workers: list[SupervisedWorker]
    """Where it lives: one worker, or with `spread` one for each accelerator."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Version -> why it does not serve as the owner asked: a failed load, too many deaths. 0: the model as a whole."""
    hints: dict[int, str] = field(default_factory=dict)
    """Version -> what to do about its entry in `reasons`, where anything is known."""
    evicted: str = ""
    """Why it made room for another."""
    chosen: tuple[int, ...] = ()
    """The versions that were last asked for."""
    loading: set[int] = field(default_factory=set)
    moving: set[int] = field(default_factory=set)
    """Versions that are on their way from an accelerator that fails to another."""
    banned: set[int] = field(default_factory=set)
    deaths: deque[tuple[float, int]] = field(default_factory=deque)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is loaded or unloaded."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def wanted(self) -> list[int]:
        keys = {key for worker in self.workers for key in worker.wanted}
        return sorted(version for name, version in keys if name == self.name)

    @property
    def ready(self) -> list[int]:
        keys = {key for worker in self.workers for key in worker.ready}
        return sorted(version for name, version in keys if name == self.name)

    @property
    def state(self) -> str:
        """ready, loading, restarting, failed or unloaded."""
        if self.ready:
            return "ready"
        if self.moving:
            return "restarting"
        if self.loading:
            return "loading"
        if self.wanted:
            return "restarting"
        return "failed" if self.reasons else "unloaded"

    @property
    def reason(self) -> str:
        """Why the model is not what the owner asked for, of the highest version that is not."""
        if self.reasons:
            return self.reasons[max(self.reasons)]
        if self.state == "restarting":
            return "; ".join(worker.last_death for worker in self.workers if worker.last_death)
        return self.evicted

    def fail(self, version: int, error: MillhandError) -> None:
        """Keep why a version does not serve as the owner asked, and what to do; 0: the model as a whole."""
        self.reasons[version], self.hints[version] = error.message, error.hint

    def hint(self, version: int | None = None) -> str:
        """What to do about `reason`, or about that of one version; empty where nothing is wrong."""
        if version is None and self.reasons:
            version = max(self.reasons)
        if version in self.reasons:
            return self.hints.get(version) or f"millhand model load {self.name}"
        return f"millhand model load {self.name}" if self.evicted else ""

    def version_state(self, version: int) -> str:
        """The same words as `state`, of one version."""
        if version in self.ready:
            return "ready"
        if version in self.loading:
            return "loading"
        if version in self.wanted:
            return "restarting"
        return "failed" if version in self.reasons else "unloaded"

    def holders(self, version: int) -> list[SupervisedWorker]:
        """The workers in which a version is ready."""
        return [worker for worker in self.workers if (self.name, version) in worker.ready]

    def loads(self) -> dict[int, dict[str, Any]]:
        """Ready version -> what its worker told of the load; of several workers the first."""
        return {version: self.holders(version)[0].ready[self.name, version] for version in self.ready}

    def requests(self) -> list[LoadRequest]:
        """What its workers were told to load."""
        keys = [(worker, key) for worker in self.workers for key in worker.wanted if key[0] == self.name]
        return [worker.wanted[key] for worker, key in keys]

    def candidates(self, version: int) -> list[str]:
        """What is loaded in place of a version's own artifact, in any worker; of an ensemble `<model>: <candidate>`."""
        requests = (request for request in self.requests() if request.version == version)
        parts = [part for request in requests for part in loads(request) if part.candidate]
        names = (part.candidate if part.model == self.name else f"{part.model}: {part.candidate}" for part in parts)
        return list(dict.fromkeys(names))

    def health(self) -> dict[int, dict[str, Any]]:
        """Ready version -> how it stands with what its session depends on (hookspecs.Health), as of the last heartbeat;
        of several workers the first."""
        found = {}
        for version, loaded in self.loads().items():
            stats = self.holders(version)[0].ledger.running.get((self.name, version))
            fresh = stats is not None and stats["loaded_ns"] == loaded["loaded_ns"]
            found[version] = stats["health"] if stats and fresh else loaded["health"]
        return {version: health for version, health in found.items() if health}

    def memory_bytes(self, version: int, host: WorkerDefaults | None = None) -> int:
        """What a version takes of its memory in all workers, or in those on one host; 0 where it is not loaded."""
        key = (self.name, version)
        return sum(worker.ready[key]["memory_bytes"] for worker in self.holders(version) if host in (None, worker.host))

    def choose(self, version: int | None) -> tuple[WorkerClient, int]:
        """The connection and the version to ask, the highest for None; of several workers the least busy.

        Raises ModelError, or WorkerError (retriable) while the worker is restarted.
        """
        ready = self.ready
        chosen = ready[-1] if version is None and ready else version
        if chosen not in ready:
            raise self._not_ready(version)
        clients = [worker.client for worker in self.holders(chosen) if worker.client is not None]
        if not clients:
            raise self._restarting()
        return min(clients, key=lambda client: client.in_flight), chosen

    def route(self) -> dict[str, Any]:
        """What another process needs to send it requests: state, metadata, version -> sockets of workers."""
        manifest = self.folder.manifest
        sockets = {
            str(version): [str(worker.process.path) for worker in self.holders(version) if worker.process is not None]
            for version in self.ready
        }
        return {
            "state": self.state,
            "reason": self.reason,
            "hint": f"millhand model load {self.name}",
            "backend": manifest.backend,
            "inputs": [tensor(spec) for spec in manifest.inputs],
            "outputs": [tensor(spec) for spec in manifest.outputs],
            "labels": _labels(manifest),
            "sockets": {version: paths for version, paths in sockets.items() if paths},
        }

    def _not_ready(self, version: int | None) -> ModelError | WorkerError:
        state, ready = self.state, self.ready
        if state == "restarting":
            return self._restarting()
        if state != "ready":
            why = f": {self.reason}" if self.reason else ""
            return ModelError(
                f"model '{self.name}' is {state}{why}",
                hint=f"millhand model load {self.name}",
                retriable=bool(self.evicted),
            )
        return ModelError(
            f"model '{self.name}' has no version {version}; ready: {', '.join(map(str, ready))}",
            hint="ask for one of these, or for none in particular",
        )

    def _restarting(self) -> WorkerError:
        return WorkerError(f"the worker of model '{self.name}' is being restarted", hint="send the request again")


def entry(
    folder: ModelFolder, served: Served | None, repository: Repository, standings: Sequence[Standing]
) -> dict[str, Any]:
    """A model's entry of the index. It reads artifacts to compare them with their proofs."""
    missed = [*_troubles(served), *_missed(standings)]
    return {
        "name": folder.name,
        "description": folder.manifest.description,
        "state": served.state if served else "unloaded",
        "reason": (served.reason or "; ".join(one["reason"] for one in missed)) if served else "",
        "hint": (served.hint() or next((one["hint"] for one in missed), "")) if served else "",
        "missed": missed,
        "versions": served.ready if served else [],
        "available": list(folder.versions),
        "details": [
            _version(number, served, folder)
            for number in sorted({*folder.versions, *(served.wanted if served else ())})
        ],
        "strays": [asdict(stray) for stray in folder.strays],
        "proof": {str(version): repository.verdict(folder, version).state for version in folder.versions},
        "worker": ", ".join(worker.name for worker in served.workers) if served else "",
    }


def _version(number: int, served: Served | None, folder: ModelFolder) -> dict[str, Any]:
    """One version, and why it does not serve."""
    state = served.version_state(number) if served else "unloaded"
    reason = served.reasons.get(number, served.evicted) if served else ""
    return {
        "version": number,
        "state": state,
        "reason": reason or (_not_chosen(number, folder) if state == "unloaded" else ""),
        "hint": served.hint(number) if served else "",
        "memory_bytes": served.memory_bytes(number) if served else 0,
        "candidates": served.candidates(number) if served else [],
    }


def _troubles(served: Served | None) -> Iterator[dict[str, str]]:
    """Why versions that are ready do not answer, and what to do."""
    for version, health in (served.health() if served else {}).items():
        if health["trouble"]:
            yield {"reason": f"version {version} does not answer: {health['trouble']}", "hint": health["hint"]}


def _missed(standings: Sequence[Standing]) -> Iterator[dict[str, str]]:
    """Why candidates that were chosen do not serve, and what to do."""
    for one in standings:
        if one.candidate and one.reason:
            rebuild = f"; {one.rebuild}" if one.rebuild else ""
            reason = f"candidate '{one.candidate}' of version {one.version} does not serve: {one.reason}{rebuild}"
            yield {"reason": reason, "hint": one.hint}


def _not_chosen(number: int, folder: ModelFolder) -> str:
    """Why a version is not loaded of which nobody has said anything."""
    manifest, newest = folder.manifest, max(folder.versions)
    if manifest.policy == "latest" and number < newest:
        return f"policy latest: {newest} is newer"
    if manifest.policy == "specific" and number not in manifest.versions:
        return "not named by the policy"
    return "not loaded"


def bad_entry(folder: BadFolder) -> dict[str, Any]:
    """The index entry of a folder that cannot be served."""
    return {"name": folder.path.name, "state": "bad", "reason": folder.message, "hint": folder.hint, "versions": []}


def _labels(manifest: Manifest) -> dict[str, list[str]]:
    """Output -> the names of its classes."""
    prediction = manifest.prediction
    return {prediction.output: list(prediction.labels)} if prediction and prediction.labels else {}


def metadata(
    folder: ModelFolder,
    served: Served | None,
    host: WorkerDefaults,
    repository: Repository,
    standings: Sequence[Standing],
) -> dict[str, Any]:
    """What the model takes and gives, and where it lies; `host` is where it runs or would run."""
    manifest, prediction = folder.manifest, folder.manifest.prediction
    return {
        "licence": manifest.licence,
        "backend": manifest.backend,
        "path": str(folder.path),
        "policy": manifest.policy,
        "max_batch": batch_cap(folder, host),
        "max_batch_key": batch_cap_key(folder, host),
        "max_delay_us": delay_us(folder, host),
        "inputs": [tensor(spec) for spec in manifest.inputs],
        "outputs": [tensor(spec) for spec in manifest.outputs],
        "needs": [] if manifest.window is None else [*manifest.window.signals, *manifest.window.waveforms],
        "rules": [rule.name for rule in manifest.rules],
        "prediction": prediction and prediction.model_dump(mode="json", exclude_defaults=True),
        "metadata": manifest.metadata,
        "accelerator": _evidence(served),
        "threads": _threads(served),
        "depends": {str(version): found["facts"] for version, found in (served.health() if served else {}).items()},
        "steps": _steps(folder, served),
        **_on_disk(folder, repository),
        "choices": [asdict(standing) for standing in standings],
    }


def _on_disk(folder: ModelFolder, repository: Repository) -> dict[str, Any]:
    """What lies in the model's folder now, which may be newer than what was read: version -> its files, and strays."""
    try:
        versions = versions_in(folder.path, folder.manifest)
        strays = strays_in(folder.path, folder.manifest, versions)
    except OSError:
        versions, strays = (), ()
    return {
        "artifacts": {str(version): _artifact(folder, version, repository) for version in versions},
        "strays": [asdict(stray) for stray in strays],
    }


def _artifact(folder: ModelFolder, version: int, repository: Repository) -> dict[str, Any]:
    """What a version takes on disk, and why it is not proved."""
    verdict = repository.verdict(folder, version)
    return {"bytes": folder.size_bytes(version), "proof": verdict.state, "proof_reason": verdict.reason}


def _steps(folder: ModelFolder, served: Served | None) -> list[dict[str, Any]]:
    """An ensemble's steps: of its highest loaded version with the models' versions that it uses, else as declared.

    `compute_us`: mean time of a batch since the load, microseconds, as of the last heartbeat; None before the first.
    """
    loaded = served.wanted[-1:] if served else []
    if not served or not loaded:
        steps = enumerate(folder.manifest.steps, 1)
        return [
            {"step": step_label(number, step), "version": step.version, "compute_us": None} for number, step in steps
        ]
    key = served.name, loaded[0]
    request = next(worker.wanted[key] for worker in served.workers if key in worker.wanted)
    stats = [worker.ledger.running[key] for worker in served.workers if key in worker.ledger.running]
    batches = sum(entry["batches"] for entry in stats)
    return [
        {
            "step": step.label,
            "version": step.load.version if step.load else None,
            "compute_us": sum(entry["steps_ns"][step.label] for entry in stats) / batches / 1e3 if batches else None,
        }
        for step in request.steps
    ]


def _threads(served: Served | None) -> dict[str, Any]:
    """Ready version -> the threads of one inference and what was measured to choose them; see threads.Choice."""
    loads = served.loads() if served else {}
    return {str(version): loaded["threads"] for version, loaded in loads.items() if loaded.get("threads")}


def _evidence(served: Served | None) -> dict[str, Any]:
    """Ready version -> what its session proved of the accelerator at its load; see hookspecs.ProvingSession."""
    loads = served.loads() if served else {}
    return {str(version): loaded["proof"] for version, loaded in loads.items() if loaded.get("proof")}


def tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape), "unit": spec.unit}
