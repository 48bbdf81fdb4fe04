"""Models on disk: `<root>/<model>/model.toml` and `<root>/<model>/<version>/<artifact>`, with proof.json beside it.

A bad folder is reported and left out, never fatal. Nothing is watched: `scan` reads the disk when told to.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millhand.errors import MillhandError, ModelError, suggestion
from millhand.serving.manifest import MANIFEST, Manifest, read_manifest
from millhand.serving.settings import ModelSettings
from millhand.serving.steps import resolve_ensembles, step_version

PROOF = "proof.json"


@dataclass(frozen=True)
class ModelFolder:
    """One model that can be served. `versions` ascend."""

    path: Path
    manifest: Manifest
    versions: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.manifest.name

    def artifact(self, version: int) -> Path:
        """The file to load; an ensemble's is its model.toml."""
        return self.path / MANIFEST if self.manifest.steps else self.path / str(version) / self.manifest.artifact

    def files(self, version: int) -> list[Path]:
        """Everything of its own that makes the version what it is: the artifact, and those of an ensemble's steps."""
        own = [step.artifact for step in self.manifest.steps if step.artifact]
        return [self.artifact(version), *(self.path / str(version) / name for name in own)]

    def with_max_batch(self, max_batch: int) -> ModelFolder:
        """The same folder, its manifest with another `max_batch`."""
        return replace(self, manifest=self.manifest.model_copy(update={"max_batch": max_batch}))

    def chosen(self) -> tuple[int, ...]:
        """The versions that the policy serves, ascending. Raises ModelError where it names one that is not there."""
        if self.manifest.policy == "latest":
            return self.versions[-1:]
        if self.manifest.policy == "all":
            return self.versions
        missing = [version for version in self.manifest.versions if version not in self.versions]
        if missing or not self.manifest.versions:
            raise ModelError(
                f"model '{self.name}': policy 'specific' names version {missing[0] if missing else 'none'}; "
                f"in '{self.path}' are {', '.join(map(str, self.versions))}",
                hint="mend `versions` in model.toml",
            )
        return tuple(sorted(self.manifest.versions))

    def fingerprint(self, version: int) -> str:
        """Changes with any file of the version but its proof: names, sizes and times of change."""
        root = self.path / str(version)
        try:
            files = [(path, path.stat()) for path in sorted(root.rglob("*")) if path.name != PROOF]
        except OSError as error:
            raise ModelError(
                f"model '{self.name}' version {version} changes while it is read: {error}", hint="load it again"
            ) from error
        return ";".join(f"{path.relative_to(root)}:{at.st_ino}:{at.st_size}:{at.st_mtime_ns}" for path, at in files)

    def size_bytes(self, version: int) -> int:
        """Of all files of the version but its proof; what vanishes meanwhile counts nothing."""
        size = 0
        for path in (self.path / str(version)).rglob("*"):
            with suppress(OSError):
                size += path.stat().st_size if path.name != PROOF and path.is_file() else 0
        return size

    def proof(self, version: int) -> tuple[str, dict[str, Any]]:
        """("proved", what was measured) where proof.json names this very artifact's SHA-256, else ("unproved", {...}).

        An ensemble's is that of its `files`, one after another. An unproved version's second part says why under
        `reason`.
        """
        path = self.path / str(version) / PROOF
        try:
            proof: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            claimed = proof["sha256"]
            stamped = [(file, file.stat()) for file in self.files(version)]
            found = _digest(tuple((file, status.st_mtime_ns, status.st_size) for file, status in stamped))
        except FileNotFoundError:
            return "unproved", {"reason": "there is no proof.json"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            return "unproved", {"reason": f"'{path}' cannot be read: {type(error).__name__}: {error}"}
        if claimed != found:
            return "unproved", {"reason": f"'{path}' is of another artifact"}
        return "proved", proof


@dataclass(frozen=True)
class BadFolder:
    """A folder that looks like a model and cannot be served."""

    path: Path
    message: str
    hint: str


class Repository:
    """Several roots; an earlier one wins over a later one of the same model name."""

    def __init__(self, roots: Sequence[Path], require_proof: bool = False) -> None:
        self.roots = tuple(roots)
        self.require_proof = require_proof
        self.models: dict[str, ModelFolder] = {}
        self.bad: list[BadFolder] = []
        self.scan()

    @classmethod
    def from_settings(cls, settings: ModelSettings, shipped: Sequence[Path]) -> Repository:
        """The owner's folders, then those that plugins ship."""
        return cls([*settings.paths, *shipped], settings.require_proof)

    def names(self) -> list[str]:
        """The models that can be served."""
        return sorted(self.models)

    def problems(self) -> list[tuple[str, str]]:
        """(folder name, message) of every bad folder."""
        return [(folder.path.name, folder.message) for folder in self.bad]

    def scan(self) -> None:
        """Read all roots anew."""
        models: dict[str, ModelFolder] = {}
        bad: list[BadFolder] = []
        for root in self.roots:
            try:
                folders = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
                if not root.is_dir():
                    bad.append(BadFolder(root, f"'{root}' is no folder", "mend [models] paths or MODEL_PATH"))
            except OSError as error:
                bad.append(BadFolder(root, f"'{root}' cannot be read: {error.strerror}", "check its permissions"))
                continue
            for folder in folders:
                try:
                    model = read_folder(folder)
                    models.setdefault(model.name, model)
                except MillhandError as error:
                    bad.append(BadFolder(folder, error.message, error.hint))
                except OSError as error:
                    bad.append(BadFolder(folder, f"'{folder}' cannot be read: {error}", "check its permissions"))
        self.models, refused = resolve_ensembles(models, {folder.path.name: folder.message for folder in bad})
        self.bad = bad + [BadFolder(models[name].path, error.message, error.hint) for name, error in refused.items()]

    def find(self, name: str) -> ModelFolder:
        """Return a model. Raises ModelError naming what is there, or why its folder is bad."""
        if name in self.models:
            return self.models[name]
        for folder in self.bad:
            if folder.path.name == name:
                raise ModelError(folder.message, hint=folder.hint)
        raise ModelError(
            f"model '{name}' is not known{suggestion(name, self.models)}",
            hint=f"the repository has: {', '.join(sorted(self.models)) or 'no model'}",
        )

    def needed(self, names: Iterable[str]) -> list[tuple[ModelFolder, int]]:
        """Every (model, version) that serving these models loads: by their policies, and as steps of ensembles.

        Names that are not in the repository are passed over. Raises ModelError as `ModelFolder.chosen`.
        """
        found: dict[tuple[str, int], ModelFolder] = {}
        waiting = [
            (self.models[name], number)
            for name in names
            if name in self.models
            for number in self.models[name].chosen()
        ]
        while waiting:
            folder, number = waiting.pop(0)
            found[folder.name, number] = folder
            models = [(step, self.models[step.model]) for step in folder.manifest.steps if step.model]
            waiting += [(model, step_version(step, model)) for step, model in models]
        return [(folder, number) for (_, number), folder in found.items()]

    def check_proof(self, folder: ModelFolder, version: int) -> str:
        """Return `proved` or `unproved`. Raises ModelError for the latter under `require_proof`."""
        state, details = folder.proof(version)
        if state == "unproved" and self.require_proof:
            raise ModelError(
                f"model '{folder.name}' version {version} is unproved: {details['reason']}",
                hint="prove it on this node, or set [models] require_proof = false",
            )
        return state


@functools.lru_cache(maxsize=256)
def _digest(stamped: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files, one after another; read again only when a time or size has changed (engines are large)."""
    digest = hashlib.sha256()
    for path, _, _ in stamped:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def versions_in(path: Path, manifest: Manifest) -> tuple[int, ...]:
    """The versions that a model's folder holds now, ascending. Raises OSError."""
    numbers = sorted(int(entry.name) for entry in path.iterdir() if entry.is_dir() and entry.name.isdecimal())
    files = _files(manifest)
    found = tuple(n for n in numbers if n > 0 and all((path / str(n) / file).exists() for file in files))
    # An ensemble that only uses other models needs no folder of its own.
    return found or (() if files else (1,))


def _files(manifest: Manifest) -> list[str]:
    """What a version's folder must hold: the artifact, or those of an ensemble's steps."""
    return [step.artifact for step in manifest.steps if step.artifact] if manifest.steps else [manifest.artifact]


def read_folder(path: Path) -> ModelFolder:
    """Read one model's folder. Raises ConfigError or ModelError."""
    manifest = read_manifest(path)
    if manifest.name != path.name:
        raise ModelError(
            f"model '{path / 'model.toml'}': key 'name' = '{manifest.name}' is not its folder's name",
            hint=f"rename the folder or set name = '{path.name}'",
        )
    versions = versions_in(path, manifest)
    if not versions:
        raise ModelError(
            f"model '{manifest.name}' has no version: no '{path}/<number>/{_files(manifest)[0]}'",
            hint="put the artifact into a folder named by its version, for example 1",
        )
    return ModelFolder(path, manifest, versions)
