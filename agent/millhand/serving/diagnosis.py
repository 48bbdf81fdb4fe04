"""What `millhand check` looks at on the serving side: models and their proofs, workers, and what backends can do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from millhand.errors import MillhandError
from millhand.findings import Finding, Level, of_error

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.serving.packages import Found
    from millhand.serving.repository import ModelFolder, Repository

WORKER_PACKAGES = ("numpy", "msgspec", "pluggy")
# Backend -> the package that none of its sessions can do without. Which library an engine needs, only its file tells.
BACKEND_PACKAGES = {"onnxruntime": "onnxruntime", "tensorrt": "pycuda"}


def model_findings(config: Config) -> Iterator[Finding]:
    """Every model that will be served, every folder that cannot be one, and what their proofs are worth."""
    repository = repository_of(config)
    for bad in repository.bad:
        yield Finding(f"model {bad.path.name}", "error", bad.message, bad.hint)
    for name, folder in repository.models.items():
        if folder.strays:
            hint = "rename the folder, put the artifact into it, or take it away"
            text = "; ".join(stray.reason for stray in folder.strays)
            yield Finding(f"model {name}", "warning", text, hint)
    of_assets = config.models_needed()
    for name in repository.names_to_load(config.models, of_assets):
        if name not in repository.models and name in of_assets:
            continue  # said where the asset is looked at
        try:
            folder = repository.find(name)
            states = [f"version {number} {repository.check_proof(folder, number)}" for number in folder.chosen()]
            yield Finding(f"model {name}", "ok", ", ".join(states))
        except MillhandError as error:
            yield of_error(f"model {name}", error)


def repository_of(config: Config) -> Repository:
    """What the folders of configuration and plugins hold."""
    from millhand.registry import Registry
    from millhand.serving.repository import Repository

    registry = Registry()
    registry.load(config.plugin_tables())
    folders = [Path(folder) for _, folder in registry.collect("millhand_models")]
    return Repository.from_config(config, folders)


def loaded(config: Config) -> list[tuple[ModelFolder, int]]:
    """Every (model, version) that the agent loads at its start, but for models whose folders are wrong."""
    repository = repository_of(config)
    found: dict[tuple[str, int], tuple[ModelFolder, int]] = {}
    for name in repository.names_to_load(config.models, config.models_needed()):
        with suppress(MillhandError):  # said where the models are looked at
            found |= {(folder.name, version): (folder, version) for folder, version in repository.needed([name])}
    return list(found.values())


def worker_findings(config: Config) -> Iterator[Finding]:
    """The workers' interpreter and its packages; nothing is imported, so a broken package costs no crash here."""
    from millhand.profiles import match_node

    interpreter = str(config.models.interpreter or match_node(config)[1].worker.interpreter or sys.executable)
    try:
        found = _packages(config, interpreter)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("worker", "error", f"'{interpreter}' does not run: {error}", "mend [models] interpreter")
        return
    for name in found["missing"]:
        hint = f"'{interpreter}' -m pip install {name}, or name another [models] interpreter"
        yield Finding("worker", "error", f"'{interpreter}' has no package '{name}'", hint)
    if len(found["twins"]) > 1:
        names = " and ".join(f"{name} {version}" for name, version in found["twins"].items())
        hint = "they share one import name: uninstall both, then install the one that suits this node"
        yield Finding("worker", "error", f"'{interpreter}' has {names}", hint)
    elif not found["missing"]:
        yield Finding("worker", "ok", f"'{interpreter}' has what its models need")


def _packages(config: Config, interpreter: str) -> Found:
    """What an interpreter has of what its models need. Raises OSError or subprocess.SubprocessError."""
    from millhand.serving.packages import look_into

    backends = {backend for folder, _ in loaded(config) for backend in folder.manifest.backends}
    packages = sorted(BACKEND_PACKAGES[name] for name in backends & BACKEND_PACKAGES.keys())
    return look_into(interpreter, [*WORKER_PACKAGES, *packages])


def backend_findings(config: Config) -> Iterator[Finding]:
    """Each part of the backends that the models need, tried in a worker process: none is believed."""
    from millhand.profiles import match_node
    from millhand.registry import Registry
    from millhand.serving.selftest import SelfTest

    match = match_node(config)[1]
    try:
        found = _packages(config, str(config.models.interpreter or match.worker.interpreter or sys.executable))
    except (OSError, subprocess.SubprocessError):
        return  # said where the workers are looked at, as are missing packages
    if found["missing"] or len(found["twins"]) > 1:
        return
    registry, repository = Registry(), repository_of(config)
    registry.load(config.plugin_tables())
    test = SelfTest(registry, config.models, match.workers, repository, config.models_needed())
    for tried in asyncio.run(test.run()):
        level: Level = "ok" if tried.works else "error" if tried.needed else "warning"
        yield Finding(f"{tried.backend} {tried.part}", level, tried.message, tried.hint)
