"""Models on disk: `<root>/<model>/model.toml` and `<root>/<model>/<version>/<artifact>`, with proof.json beside it.

A bad folder is reported and left out, never fatal. Nothing is watched: `scan` reads the disk when told to.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.errors import MillhandError, ModelError, suggestion
from millhand.serving.manifest import Manifest, read_manifest
from millhand.serving.settings import ModelSettings

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
        return self.path / str(version) / self.manifest.artifact

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

    def proof(self, version: int) -> tuple[str, dict[str, Any]]:
        """("proved", what was measured) where proof.json names this very artifact's SHA-256, else ("unproved", {...}).

        An unproved version's second part says why under `reason`.
        """
        path = self.path / str(version) / PROOF
        try:
            proof: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            claimed = proof["sha256"]
            artifact = self.artifact(version)
            status = artifact.stat()
            found = _digest(artifact, status.st_mtime_ns, status.st_size)
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
                folders = sorted(path.parent for path in root.glob("*/model.toml"))
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
        self.models, self.bad = models, bad

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
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    """SHA-256 of a file; read again only when its time or size has changed (engines are large)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_folder(path: Path) -> ModelFolder:
    """Read one model's folder. Raises ConfigError or ModelError."""
    manifest = read_manifest(path)
    if manifest.name != path.name:
        raise ModelError(
            f"model '{path / 'model.toml'}': key 'name' = '{manifest.name}' is not its folder's name",
            hint=f"rename the folder or set name = '{path.name}'",
        )
    numbers = [int(entry.name) for entry in path.iterdir() if entry.is_dir() and entry.name.isdecimal()]
    versions = tuple(sorted(n for n in numbers if n > 0 and (path / str(n) / manifest.artifact).exists()))
    if not versions:
        raise ModelError(
            f"model '{manifest.name}' has no version: no '{path}/<number>/{manifest.artifact}'",
            hint="put the artifact into a folder named by its version, for example 1",
        )
    return ModelFolder(path, manifest, versions)
