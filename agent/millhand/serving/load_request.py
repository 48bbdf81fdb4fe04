"""What a worker is told to load: a version of a model's folder, with what its backend's plugin and the owner say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from millhand.errors import ConfigError, suggestion
from millhand.registry import Registry
from millhand.serving.lanes import LoadRequest
from millhand.serving.repository import ModelFolder
from millhand.serving.settings import ModelSettings, WorkerDefaults


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


def load_request(
    folder: ModelFolder, version: int, registry: Registry, settings: ModelSettings, host: WorkerDefaults
) -> LoadRequest:
    """Describe one version for a worker. Raises ConfigError where no plugin brings the backend."""
    manifest = folder.manifest
    sources = backend_sources(registry)
    source = sources.get(manifest.backend)
    if source is None:
        raise ConfigError(
            f"model '{folder.name}': key 'backend' = '{manifest.backend}' is not known"
            f"{suggestion(manifest.backend, sources)}",
            hint=f"loaded plugins bring: {', '.join(sources) or 'none'}; add the plugin to the config",
        )
    threads = settings.threads or host.threads
    return LoadRequest(
        model=folder.name,
        version=version,
        artifact=str(folder.artifact(version)),
        backend=source.name,
        module=source.module,
        plugin_options={**source.options, "threads": source.options.get("threads") or threads},
        options=manifest.options,
        accelerator=host.accelerator,
        inputs=manifest.specs(manifest.inputs),
        outputs=manifest.specs(manifest.outputs),
        max_batch=batch_cap(folder, host),
        max_delay_us=host.max_delay_us if manifest.max_delay_us is None else manifest.max_delay_us,
        queue=settings.queue,
        warmup=manifest.warmup,
        fingerprint=folder.fingerprint(version),
    )
