"""Ensembles in the repository: every step's model is found, and every connection checked, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from millhand.errors import MillhandError, ModelError, suggestion
from millhand.serving.graph import ModelPart, Node, Part, TransformPart, UnknownPart, connect
from millhand.serving.manifest import MANIFEST, StepSpec
from millhand.serving.transforms import read_transform

if TYPE_CHECKING:
    from millhand.serving.repository import ModelFolder


def resolve_ensembles(
    folders: Mapping[str, ModelFolder], bad: Mapping[str, str]
) -> tuple[dict[str, ModelFolder], dict[str, MillhandError]]:
    """Check every ensemble; returns (models that can be served, name -> why an ensemble cannot).

    `bad`: folders that are left out already, and why. An ensemble's `max_batch` comes back lowered to that of its
    steps, since one batch goes through all of them.
    """
    resolver = _Resolver(folders, bad)
    good: dict[str, ModelFolder] = {}
    refused: dict[str, MillhandError] = {}
    for name in folders:
        try:
            good[name] = resolver.resolve(name)
        except MillhandError as error:
            refused[name] = error
    return good, refused


def step_label(number: int, step: StepSpec) -> str:
    """How messages and statistics name a step, counted from 1."""
    return f"{number} ({step.name})"


def step_version(step: StepSpec, folder: ModelFolder) -> int:
    """The version of the step's model that an ensemble takes now. Raises ModelError where it is not there."""
    if step.version is None:
        return folder.chosen()[-1]
    if step.version not in folder.versions:
        raise ModelError(
            f"model '{step.model}' has no version {step.version}; it has {', '.join(map(str, folder.versions))}",
            hint="mend the step's version, or leave it out",
        )
    return step.version


class _Resolver:
    def __init__(self, folders: Mapping[str, ModelFolder], bad: Mapping[str, str]) -> None:
        self._folders = folders
        self._bad = bad
        self._done: dict[str, ModelFolder | MillhandError] = {}
        self._path: list[str] = []

    def resolve(self, name: str) -> ModelFolder:
        """A model with its steps checked. Raises ModelError naming model.toml and step."""
        if name not in self._done:
            self._path.append(name)
            try:
                self._done[name] = self._check(self._folders[name])
            except MillhandError as error:
                self._done[name] = error
            finally:
                self._path.pop()
        found = self._done[name]
        if isinstance(found, MillhandError):
            raise found
        return found

    def _check(self, folder: ModelFolder) -> ModelFolder:
        manifest = folder.manifest
        if not manifest.steps:
            return folder
        source = f"model '{folder.path / MANIFEST}'"
        nodes, lowered = [], folder
        for number, step in enumerate(manifest.steps, 1):
            label = step_label(number, step)
            try:
                part: Part = UnknownPart()
                if step.model:
                    model = self._model(step)
                    lowered = lowered.lowered_by(model)
                    specs = model.manifest.specs
                    part = ModelPart(specs(model.manifest.inputs), specs(model.manifest.outputs))
                elif step.transform:
                    part = TransformPart(read_transform(step.transform, step.options))
            except MillhandError as error:
                raise ModelError(f"{source}: step {label}: {error.message}", hint=error.hint) from error
            except ValueError as error:
                hint = "docs/models.md lists the transforms and their options"
                raise ModelError(f"{source}: step {label}: {error}", hint=hint) from error
            nodes.append(Node(label, part, step.inputs, step.outputs))
        connect(source, manifest.specs(manifest.inputs), manifest.specs(manifest.outputs), nodes)
        return lowered

    def _model(self, step: StepSpec) -> ModelFolder:
        name = step.model
        if name in self._path:
            loop = " -> ".join([*self._path[self._path.index(name) :], name])
            raise ModelError(f"model '{name}' would run itself: {loop}", hint="take the step out that leads back")
        if name not in self._folders:
            if name in self._bad:
                raise ModelError(f"its model cannot be served: {self._bad[name]}", hint="mend that model first")
            raise ModelError(
                f"model '{name}' is not known{suggestion(name, self._folders)}",
                hint=f"the repository has: {', '.join(sorted(self._folders))}",
            )
        folder = self.resolve(name)
        step_version(step, folder)
        return folder
