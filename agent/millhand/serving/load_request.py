"""What a worker is told to load: a version of a model's folder, with what its backend's plugin and the owner say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from millhand.errors import ConfigError, suggestion
from millhand.hookspecs import Trial
from millhand.registry import Registry
from millhand.serving.lanes import LoadRequest, Step
from millhand.serving.manifest import Manifest, StepSpec
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.steps import step_label, step_version
from millhand.serving.tensors import MAX_BATCH_KEY

if TYPE_CHECKING:
    from millhand.serving.candidates import Pick


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


def batch_cap(folder: ModelFolder, host: WorkerDefaults) -> int:
    """Most rows in one inference: model.toml's, within the profile's."""
    return min(folder.manifest.max_batch, host.max_batch or folder.manifest.max_batch)


def batch_cap_key(folder: ModelFolder, host: WorkerDefaults) -> str:
    """Where `batch_cap` comes from: what must be raised for more rows in one inference."""
    if 0 < host.max_batch < folder.manifest.max_batch:
        return f"[worker] max_batch in profile '{host.profile}', see docs/hardware.md"
    return f"{MAX_BATCH_KEY} of model '{folder.smallest}'" if folder.smallest else MAX_BATCH_KEY


def delay_us(folder: ModelFolder, host: WorkerDefaults) -> int:
    """How long a request may wait for others to share an inference with: model.toml's word, else the profile's."""
    return host.max_delay_us if folder.manifest.max_delay_us is None else folder.manifest.max_delay_us


def load_request(
    folder: ModelFolder,
    version: int,
    repository: Repository,
    registry: Registry,
    settings: ModelSettings,
    host: WorkerDefaults,
    picks: Mapping[tuple[str, int], Pick] | None = None,
) -> LoadRequest:
    """Describe one version for a worker, and with it the steps of an ensemble, which live where the ensemble lives.

    picks: (model, version) -> the candidate that takes its own artifact's place.

    Raises ConfigError where no plugin brings a backend, ModelError where a step's model is not there.
    """
    manifest = folder.manifest

    def describe_step(number: int, step: StepSpec) -> Step:
        label, load = step_label(number, step), None
        if step.model:
            model = repository.find(step.model)
            load = load_request(model, step_version(step, model), repository, registry, settings, host, picks)
        elif step.artifact:
            load = LoadRequest(
                model=f"{folder.name}/{step.artifact}",
                version=version,
                artifact=str(folder.path / str(version) / step.artifact),
                **_backend(f"model '{folder.name}': step {label}", step.backend, registry, settings, host),
                options=step.options,
                accelerator=host.accelerator,
                inputs={},
                outputs={},
                max_batch=batch_cap(folder, host),
            )
        options = step.options if step.transform else {}
        return Step(
            label=label, inputs=step.inputs, outputs=step.outputs, load=load, transform=step.transform, options=options
        )

    steps = tuple(describe_step(number, step) for number, step in enumerate(manifest.steps, 1))
    artifact: dict[str, Any] = {"artifact": str(folder.artifact(version)), "options": manifest.options}
    pick = (picks or {}).get((folder.name, version))
    if pick is not None:
        artifact = _candidate(pick, manifest)
    backend: dict[str, Any] = {"backend": manifest.backend, "module": ""}
    if not steps:
        name = manifest.backend if pick is None else pick.backend
        backend = _backend(f"model '{folder.name}'", name, registry, settings, host)
    return LoadRequest(
        model=folder.name,
        version=version,
        **artifact,
        **backend,
        accelerator=host.accelerator,
        inputs=manifest.specs(manifest.inputs),
        outputs=manifest.specs(manifest.outputs),
        max_batch=batch_cap(folder, host),
        max_batch_key=batch_cap_key(folder, host),
        max_delay_us=delay_us(folder, host),
        queue=settings.queue,
        warmup=manifest.warmup,
        fingerprint=folder.fingerprint(version),
        finite=tuple(tensor.name for tensor in manifest.inputs if tensor.finite),
        hang_ms=manifest.hang_ms or 0.0,
        own_bytes_cap=manifest.memory_bytes_cap,
        steps=steps,
    )


def trial_request(
    trial: Trial, backend: str, registry: Registry, settings: ModelSettings, host: WorkerDefaults
) -> LoadRequest:
    """Describe a part of a backend that a worker is to try. Raises ConfigError for a backend that no plugin brings."""
    return LoadRequest(
        model=f"{backend} {trial.part}",
        version=1,
        artifact=str(trial.artifact),
        **_backend(f"trial '{trial.part}'", backend, registry, settings, host),
        options=dict(trial.options),
        accelerator=host.accelerator,
        inputs=dict(trial.inputs),
        outputs=dict(trial.outputs),
        max_batch=1,
    )


def _candidate(pick: Pick, manifest: Manifest) -> dict[str, Any]:
    """The part of a LoadRequest that says which file is loaded, for a candidate. The model's own options hold for it
    where the same backend serves both."""
    own = manifest.options if pick.backend == manifest.backend else {}
    return {
        "artifact": str(pick.artifact),
        "options": {**own, **pick.options},
        "candidate": pick.name,
        "sha256": pick.sha256,
    }


def _backend(
    owner: str, name: str, registry: Registry, settings: ModelSettings, host: WorkerDefaults
) -> dict[str, Any]:
    """The part of a LoadRequest that says which backend loads the artifact, and what its plugin says."""
    sources = backend_sources(registry)
    source = sources.get(name)
    if source is None:
        raise ConfigError(
            f"{owner}: key 'backend' = '{name}' is not known{suggestion(name, sources)}",
            hint=f"loaded plugins bring: {', '.join(sources) or 'none'}; add the plugin to the config",
        )
    threads = source.options.get("threads") or settings.threads or host.threads
    return {
        "backend": source.name,
        "module": source.module,
        # A backend that has a cap of its own for the accelerator's memory sets it by `memory_bytes_cap`.
        "plugin_options": {**source.options, "threads": threads, "memory_bytes_cap": host.memory_bytes_cap},
    }
