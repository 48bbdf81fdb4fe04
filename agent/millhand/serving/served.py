"""What the pool knows of one model, and how it tells of it: its entry in the index, its metadata, its route."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from millhand.errors import ModelError, WorkerError
from millhand.serving.manifest import TensorSpec
from millhand.serving.repository import BadFolder, ModelFolder
from millhand.serving.supervision import SupervisedWorker


@dataclass
class Served:
    """One model that the pool serves, or tried to."""

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

    def choose(self, version: int | None) -> int:
        """The ready version to ask, the highest for None. Raises ModelError, or WorkerError (retriable)."""
        ready = self.ready
        if version is None and ready:
            return ready[-1]
        if version is not None and version in ready:
            return version
        if self.state == "restarting":
            raise self.restarting()
        if self.state != "ready":
            why = f": {self.reason}" if self.reason else ""
            raise ModelError(f"model '{self.name}' is {self.state}{why}", hint="load it again once that is mended")
        raise ModelError(
            f"model '{self.name}' has no version {version}; ready: {', '.join(map(str, ready))}",
            hint="ask for one of these, or for none in particular",
        )

    def restarting(self) -> WorkerError:
        return WorkerError(f"the worker of model '{self.name}' is being restarted", hint="send the request again")

    def route(self) -> dict[str, Any]:
        """What another process needs to send it requests: state, metadata, version -> worker socket."""
        process, manifest = self.worker.process, self.folder.manifest
        return {
            "state": self.state,
            "reason": self.reason,
            "backend": manifest.backend,
            "inputs": [tensor(spec) for spec in manifest.inputs],
            "outputs": [tensor(spec) for spec in manifest.outputs],
            "sockets": {} if process is None else {str(n): str(process.path) for n in self.ready},
        }


def entry(folder: ModelFolder, served: Served | None) -> dict[str, Any]:
    """A model's entry of the index. It reads artifacts to compare them with their proofs."""
    return {
        "name": folder.name,
        "description": folder.manifest.description,
        "state": served.state if served else "unloaded",
        "reason": served.reason if served else "",
        "versions": served.ready if served else [],
        "available": list(folder.versions),
        "proof": {str(version): folder.proof(version)[0] for version in folder.versions},
        "worker": served.worker.name if served else "",
    }


def bad_entry(folder: BadFolder) -> dict[str, Any]:
    """The index entry of a folder that cannot be served."""
    return {"name": folder.path.name, "state": "bad", "reason": folder.message, "hint": folder.hint, "versions": []}


def metadata(folder: ModelFolder, served: Served | None, max_batch: int) -> dict[str, Any]:
    """The entry, and what the model takes and gives and where it lives."""
    manifest, prediction = folder.manifest, folder.manifest.prediction
    return {
        **entry(folder, served),
        "licence": manifest.licence,
        "backend": manifest.backend,
        "path": str(folder.path),
        "policy": manifest.policy,
        "max_batch": max_batch,
        "inputs": [tensor(spec) for spec in manifest.inputs],
        "outputs": [tensor(spec) for spec in manifest.outputs],
        "needs": [] if manifest.window is None else [*manifest.window.signals, *manifest.window.waveforms],
        "rules": [rule.name for rule in manifest.rules],
        "prediction": prediction and prediction.model_dump(mode="json", exclude_defaults=True),
        "metadata": manifest.metadata,
        "accelerator": _evidence(served),
    }


def _evidence(served: Served | None) -> dict[str, Any]:
    """Ready version -> what its session proved of the accelerator at its load; see hookspecs.ProvingSession."""
    if served is None:
        return {}
    loaded = {version: served.worker.ready[served.name, version] for version in served.ready}
    return {str(version): metadata["proof"] for version, metadata in loaded.items() if metadata.get("proof")}


def tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape), "unit": spec.unit}
