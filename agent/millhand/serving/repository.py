"""Models on disk: `<root>/<model>/model.toml` and `<root>/<model>/<version>/<artifact>`, with proof.json beside it.

A bad folder is reported and left out, never fatal. Nothing is watched: `scan` reads the disk when told to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from millhand.errors import MillhandError, ModelError, suggestion
from millhand.proof.digest import speaks_of_it
from millhand.proof.signature import Keyring
from millhand.proof.verification import State, Subject, Verdict, verify
from millhand.serving.manifest import MANIFEST, NAME, Manifest, read_manifest
from millhand.serving.steps import resolve_ensembles, step_version
from millhand.serving.strays import Stray, is_version, stray_models, stray_versions
from millhand.workshop.shelf import Shelf, open_shelf

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.serving.settings import ModelSettings


ENSEMBLE = f"../{MANIFEST}"
"""An ensemble's artifact, as its versions' folders see it."""


@dataclass(frozen=True)
class ModelFolder:
    """One model that can be served. `versions` ascend."""

    path: Path
    manifest: Manifest
    versions: tuple[int, ...]
    smallest: str = ""
    """An ensemble's model whose own `max_batch` lowers the ensemble's."""
    strays: tuple[Stray, ...] = ()
    """Its folders that are passed over."""

    @property
    def name(self) -> str:
        return self.manifest.name

    def artifact(self, version: int) -> Path:
        """The file to load; an ensemble's is its model.toml."""
        return self.path / MANIFEST if self.manifest.steps else self.path / str(version) / self.manifest.artifact

    def subject(self, version: int) -> Subject:
        """The version as its proof must speak of it. An ensemble is its model.toml and its own nets."""
        manifest = self.path / MANIFEST
        ensemble = bool(self.manifest.steps)
        return Subject(
            model=self.name,
            version=version,
            folder=self.path / str(version),
            artifact=ENSEMBLE if ensemble else self.manifest.artifact,
            backend="" if ensemble else self.manifest.backend,
            beside={ENSEMBLE: manifest} if ensemble else {},
        )

    def digest(self, version: int) -> str:
        """SHA-256 of the version's artifact with its data files (proof/digest.py). Raises ModelError."""
        return self.subject(version).digest()

    def lowered_by(self, step: ModelFolder) -> ModelFolder:
        """The same folder, its `max_batch` no larger than that of a step's model."""
        max_batch = step.manifest.max_batch
        if max_batch >= self.manifest.max_batch:
            return self
        manifest = self.manifest.model_copy(update={"max_batch": max_batch})
        return replace(self, manifest=manifest, smallest=step.smallest or step.name)

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
        """Changes with any file of the version but what speaks of it: names, sizes and times of change."""
        root = self.path / str(version)
        try:
            files = [(path, path.stat()) for path in sorted(root.rglob("*")) if not _speaks_of(root, path)]
        except OSError as error:
            raise ModelError(
                f"model '{self.name}' version {version} changes while it is read: {error}", hint="load it again"
            ) from error
        return ";".join(f"{path.relative_to(root)}:{at.st_ino}:{at.st_size}:{at.st_mtime_ns}" for path, at in files)

    def size_bytes(self, version: int) -> int:
        """Of all files of the version but what speaks of it; what vanishes meanwhile counts nothing."""
        root, size = self.path / str(version), 0
        for path in root.rglob("*"):
            with suppress(OSError):
                size += path.stat().st_size if path.is_file() and not _speaks_of(root, path) else 0
        return size


@dataclass(frozen=True)
class BadFolder:
    """A folder that looks like a model and cannot be served."""

    path: Path
    message: str
    hint: str


class Repository:
    """Several roots; an earlier one wins over a later one of the same model name."""

    def __init__(
        self,
        roots: Sequence[Path],
        require_proof: bool = False,
        keyring: Keyring | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """`keyring`: whose signatures count; none trusts nobody's. `shelf`: where proofs of own artifacts may lie."""
        self._shelf = shelf
        self.roots = tuple(roots)
        self.require_proof = require_proof
        self.keyring = keyring or Keyring()
        self.models: dict[str, ModelFolder] = {}
        self.bad: list[BadFolder] = []
        self.scan()

    @classmethod
    def from_config(cls, config: Config, shipped: Sequence[Path]) -> Repository:
        """The owner's folders, the node's own, then those that plugins ship."""
        keyring = Keyring(config.node.data_dir, config.models.trusted_keys)
        own = [config.node.models_dir] if config.node.models_dir.is_dir() else []
        return cls([*config.models.paths, *own, *shipped], config.models.require_proof, keyring, open_shelf(config))

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
                if not root.is_dir():
                    bad.append(BadFolder(root, f"'{root}' is no folder", "mend [models] paths or MODEL_PATH"))
                    continue
                folders = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
                bad += [_without_manifest(folder) for folder in stray_models(root, MANIFEST)]
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
        for path in [root / name for root in self.roots if re.fullmatch(NAME, name)]:
            if path.is_dir() and not (path / MANIFEST).exists():
                folder = _without_manifest(path)
                raise ModelError(folder.message, hint=folder.hint)
        raise ModelError(
            f"model '{name}' is not known{suggestion(name, self.models)}",
            hint=f"the repository has: {', '.join(sorted(self.models)) or 'no model'}",
        )

    def names_to_load(self, settings: ModelSettings, needed: Iterable[str]) -> list[str]:
        """What is served from the start: what assets need, and what the settings pin and name, or hold in `paths`."""
        named = list(settings.load)
        if "*" in named:
            named = sorted(self.models)
        if not named:
            own = [path.resolve() for path in settings.paths]
            named = sorted(model.name for model in self.models.values() if model.path.parent.resolve() in own)
        return list(dict.fromkeys([*needed, *settings.pin, *named]))

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

    def verdict(self, folder: ModelFolder, version: int) -> Verdict:
        """Whether a version's own artifact may be believed; reads it, where it has changed since.

        An ensemble is proved where it and all the models that it uses are.
        """
        found = verify(self.subject(folder, version), self.keyring)
        for step in folder.manifest.steps if found.state == "proved" else ():
            if step.model:
                part = self.find(step.model)
                number = step_version(step, part)
                member = self.verdict(part, number)
                if member.state != "proved":
                    reason = f"it uses model '{part.name}' version {number}, which is {member.state}: {member.reason}"
                    return replace(found, state="unproved", reason=reason, hint=member.hint, signers=())
        return found

    def subject(self, folder: ModelFolder, version: int) -> Subject:
        """A version's own artifact, with the place on the shelf where its proof may lie."""
        shelved = None if self._shelf is None else self._shelf.original(folder.name, version)
        return replace(folder.subject(version), shelved=shelved)

    def parts(self, folder: ModelFolder, version: int) -> list[tuple[ModelFolder, int]]:
        """What serving a version loads: itself, then the models that an ensemble uses.

        Raises ModelError where one of them is not there.
        """
        found = [(folder, version)]
        for step in folder.manifest.steps:
            if step.model:
                model = self.find(step.model)
                found += self.parts(model, step_version(step, model))
        return found

    def subjects(self, folder: ModelFolder, version: int) -> list[Subject]:
        """The own artifacts of all `parts`. Raises ModelError where one of them is not there."""
        return [self.subject(part, number) for part, number in self.parts(folder, version)]

    def check_proof(self, folder: ModelFolder, version: int) -> State:
        """What a version's own proof is worth. Raises ModelError as `approve`, for all its `subjects`."""
        states = [self.approve(subject) for subject in self.subjects(folder, version)]
        return states[0]

    def approve(self, subject: Subject) -> State:
        """Call right before an artifact is loaded. Returns `proved` or `unproved`.

        Raises ModelError where it is refused, and under `require_proof` where it is unproved.
        """
        found = verify(subject, self.keyring)
        if found.state == "refused":
            raise ModelError(f"{subject} is refused: {found.reason}", hint=found.hint)
        if found.state == "unproved" and self.require_proof:
            raise ModelError(
                f"{subject} is unproved: {found.reason}", hint=f"{found.hint}, or set [models] require_proof = false"
            )
        return found.state


def _without_manifest(path: Path) -> BadFolder:
    return BadFolder(path, f"'{path}' has no {MANIFEST}", "write one as docs/models.md shows, or take the folder away")


def _speaks_of(root: Path, path: Path) -> bool:
    return speaks_of_it(path.relative_to(root).as_posix())


def versions_in(path: Path, manifest: Manifest) -> tuple[int, ...]:
    """The versions that a model's folder holds now, ascending. Raises OSError."""
    numbers = sorted(int(entry.name) for entry in path.iterdir() if entry.is_dir() and is_version(entry.name))
    files = _files(manifest)
    found = tuple(n for n in numbers if all((path / str(n) / file).exists() for file in files))
    # An ensemble that only uses other models needs no folder of its own.
    return found or (() if files else (1,))


def strays_in(path: Path, manifest: Manifest, versions: Sequence[int]) -> tuple[Stray, ...]:
    """The folders in a model's folder that look like versions beside `versions`, and are none. Raises OSError."""
    return tuple(stray_versions(path, _files(manifest), versions))


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
    strays = strays_in(path, manifest, versions)
    if not versions:
        found = "".join(f"; {stray.reason}" for stray in strays)
        raise ModelError(
            f"model '{manifest.name}' has no version: no '{path}/<number>/{_files(manifest)[0]}'{found}",
            hint="put the artifact into a folder named by its version, for example 1",
        )
    return ModelFolder(path, manifest, versions, strays=strays)
