"""What a build needs to know of this node: its hardware and profile, plugins, models, and the shelf."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from millhand.config import Config
from millhand.errors import ModelError
from millhand.hardware import Hardware, discover
from millhand.hardware.visible import VARIABLE, find_device, visible_devices
from millhand.profiles import Match, Profile, load_profiles, match, profile_named
from millhand.registry import Registry
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import backend_sources, load_request
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.settings import WorkerDefaults
from millhand.workshop.judge import PluginRef
from millhand.workshop.process import JobRunner
from millhand.workshop.recipe import CPU, Target
from millhand.workshop.shelf import Shelf, open_shelf
from millhand.workshop.targets import node_targets


@dataclass(frozen=True)
class Site:
    """This node. Make one with `open_site`."""

    config: Config
    registry: Registry
    repository: Repository
    hardware: Hardware
    profiles: list[Profile]
    match: Match
    targets: dict[str, Target]
    """Accelerator, as workers name it -> its target."""
    shelf: Shelf

    def own_target(self, folder: ModelFolder) -> Target:
        """What a model is built for where nobody says: where it serves. Raises ModelError."""
        accelerator = CPU if folder.manifest.accelerator == CPU else self.match.worker.accelerator
        target = self.targets.get(accelerator)
        if target is None:
            raise ModelError(
                f"the compute capability of GPU '{accelerator}' is not known", hint="millhand hw show; or --target cpu"
            )
        return target

    def worker(self, target: Target) -> WorkerDefaults:
        """What the profile says of workers on a target."""
        for host in self.match.workers:
            if host.accelerator == target.accelerator:
                return host
        host = self.match.worker.model_copy(update={"accelerator": CPU, "cpus": ()})
        return host if target.runs_here else host.model_copy(update=self._board(target))

    def _board(self, target: Target) -> dict[str, Any]:
        """What the profile of a board that is not here says of batches; a chip's name alone says nothing of them."""
        board = next((profile for profile in self.profiles if profile.name == target.profile), None)
        return {"max_batch": board.worker.max_batch, "profile": board.name} if board else {"max_batch": 0}

    def runner(self, target: Target, threads: int, deadline_s: float) -> JobRunner:
        """Where jobs for a target run: with the interpreter of its workers."""
        host = self.worker(target)
        return JobRunner(
            interpreter=self.config.models.interpreter or host.interpreter,
            accelerator=target.accelerator or CPU,
            threads=threads,
            deadline_s=deadline_s,
            memory_bytes_cap=self.config.workshop.memory_bytes_cap,
        )

    def request(self, folder: ModelFolder, version: int, target: Target) -> LoadRequest:
        """How a worker would load the model's own artifact, with one thread, so that times can be compared."""
        models = self.config.models
        request = load_request(folder, version, self.repository, self.registry, models, self.worker(target))
        return _on_one_thread(request, target.accelerator or CPU)

    def serves_on(self, folder: ModelFolder, target: Target) -> bool:
        """Whether a target is where a model serves on this node."""
        accelerator = CPU if folder.manifest.accelerator == CPU else self.match.worker.accelerator
        return target.runs_here and target == self.targets.get(accelerator)

    def backends(self) -> dict[str, PluginRef]:
        """Backend -> what brings it."""
        found = backend_sources(self.registry)
        return {name: PluginRef(module=source.module, options=dict(source.options)) for name, source in found.items()}

    def plugins(self, hook: str) -> Iterator[tuple[str, PluginRef]]:
        """The loaded plugins that implement a hook, by name."""
        for plugin in self.registry.plugins.values():
            if hook in plugin.hooks and plugin.state in ("loaded", "degraded"):
                yield plugin.name, self.plugin(plugin.name)

    def plugin(self, name: str) -> PluginRef:
        """A loaded plugin as jobs import it."""
        state = self.registry.plugins[name]
        options = {} if state.config is None else state.config.model_dump(mode="json")
        return PluginRef(module=state.module.partition(":")[0], options=options)

    def facts(self, target: Target) -> dict[str, Any]:
        """What a proof says of the node that it was made on."""
        cpu, device = self.hardware.cpu, find_device(self.hardware, target.accelerator)
        facts: dict[str, Any] = {
            "name": self.config.node.id,
            "profile": self.match.profile.name,
            "cpu": cpu.model,
            "instruction_sets": list(cpu.instructions),
        }
        if target.accelerator not in ("", CPU):
            name = getattr(device, "name", "") or getattr(device, "profile", "")
            facts |= {"accelerator": target.accelerator, "gpu": name, "driver": self.hardware.driver}
        return facts


def _on_one_thread(request: LoadRequest, accelerator: str) -> LoadRequest:
    """The same load with one thread, an ensemble's steps too."""
    steps = tuple(
        msgspec.structs.replace(step, load=_on_one_thread(step.load, accelerator)) if step.load else step
        for step in request.steps
    )
    return msgspec.structs.replace(
        request,
        plugin_options={**request.plugin_options, "threads": 1},
        options={name: value for name, value in request.options.items() if name != "threads"},
        accelerator=accelerator,
        steps=steps,
    )


def open_site(config: Config) -> Site:
    """Look at the node, as the daemon does at its start. Raises MillhandError."""
    registry = Registry()
    registry.load(config.plugin_tables())
    hardware = discover(config.node.hardware_root)
    profiles = _profiles(config, registry)
    visible = visible_devices(hardware, os.environ.get(VARIABLE))
    if config.node.profile == "auto":
        found = match(profiles, hardware, visible)
    else:
        found = profile_named(profiles, config.node.profile, hardware, visible)
    shipped = [Path(folder) for _, folder in registry.collect("millhand_models")]
    return Site(
        config=config,
        registry=registry,
        repository=Repository.from_config(config, shipped),
        hardware=hardware,
        profiles=profiles,
        match=found,
        targets=node_targets(hardware, found),
        shelf=open_shelf(config),
    )


def _profiles(config: Config, registry: Registry) -> list[Profile]:
    folders = [Path(folder) for _, folder in registry.collect("millhand_profiles")]
    return load_profiles([*folders, config.node.profiles_dir] if config.node.profiles_dir else folders)
