"""Which candidate from the shelf serves in place of a version's own artifact, and why a chosen one does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millhand.errors import MillhandError, ModelError
from millhand.proof.verification import Subject, verify
from millhand.registry import Registry
from millhand.serving.lanes import LoadRequest
from millhand.serving.load_request import backend_sources
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.settings import WorkerDefaults
from millhand.workshop.keys import Keys
from millhand.workshop.rebuilder import Rebuilder, Stale
from millhand.workshop.recipe import Target
from millhand.workshop.shelf import Candidate, Choice, Shelf, open_shelf
from millhand.workshop.targets import node_targets

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.hardware import Hardware
    from millhand.profiles import Match

log = logging.getLogger("millhand.serving")


@dataclass(frozen=True)
class Pick:
    """A candidate that takes the place of a version's own artifact."""

    name: str
    artifact: Path
    backend: str
    options: Mapping[str, Any]
    sha256: str
    """The artifact's digest."""
    subject: Subject


@dataclass(frozen=True)
class Standing:
    """What became of the choice for one version on one kind of hardware."""

    model: str
    version: int
    target: str
    candidate: str
    """As it was chosen; empty: the original was the best."""
    reason: str = ""
    """Why the chosen one does not serve; for the original why it was chosen."""
    hint: str = ""
    stale: bool = False
    """The candidate is tied to something else than this machine has now."""
    rebuild: str = ""
    """How it stands with its being made anew, for people."""


Place = tuple[str, str, int, str]
"""Who loads it (the model itself, or an ensemble that uses it), model, version, target."""


class Candidates:
    """Picks for one node."""

    def __init__(
        self,
        shelf: Shelf,
        repository: Repository,
        registry: Registry,
        keys: Keys,
        targets: Mapping[str, Target],
        use_built: bool | Collection[str] = True,
        rebuilder: Rebuilder | None = None,
    ) -> None:
        """`targets`: accelerator, as workers name it -> its target. `use_built`: as `[models]` has it. `rebuilder`:
        makes stale ones anew; none leaves them stale."""
        self._shelf = shelf
        self._repository = repository
        self._registry = registry
        self._keys = keys
        self._targets = targets
        self._use_built = use_built
        self.rebuilder = rebuilder
        self._standings: dict[Place, Standing] = {}
        self._failed: dict[tuple[Place, str, str], str] = {}
        """(place, candidate, its artifact's SHA-256) -> why it is not tried again."""

    async def pick(self, user: str, folder: ModelFolder, version: int, host: WorkerDefaults) -> Pick | None:
        """The candidate that `user` shall load on a host in place of a version's own artifact, None for the artifact.

        user: the model itself, or the ensemble that uses it. `standings` says why a chosen one is not returned.
        """
        target = self._targets.get(host.accelerator)
        if target is None or folder.manifest.steps:
            return None
        place = (user, folder.name, version, target.name)
        choice = await asyncio.to_thread(self._shelf.choice, folder.name, version, target.name)
        if choice is None or not self._may_use(folder.name):
            self._standings.pop(place, None)
            return None
        standing = Standing(
            folder.name, version, target.name, choice.candidate, reason="" if choice.candidate else choice.why
        )
        pick = None
        if choice.candidate:
            try:
                candidate, sha256 = await asyncio.to_thread(self._find, place, folder, choice)
                differences = await self._keys.differences(candidate.record.maker, candidate.record.made, target)
                if differences:
                    standing = replace(standing, stale=True)
                    self._rebuild(standing, candidate, differences)
                    raise ModelError(f"it is stale: {'; '.join(differences)}", hint=_anew(folder.name))
                pick = self._picked(place, candidate, sha256)
            except MillhandError as error:
                standing = replace(standing, reason=error.message, hint=error.hint)
        self._keep(place, standing)
        return pick

    def fail(self, user: str, request: LoadRequest, host: WorkerDefaults, why: str) -> None:
        """Do not pick the candidates of a load again that went wrong, until they are made anew or `forgive`."""
        target = self._targets[host.accelerator].name
        for part in loads(request):
            if part.candidate:
                place = (user, part.model, part.version, target)
                self._failed[place, part.candidate, part.sha256] = why
                self._keep(place, Standing(part.model, part.version, target, part.candidate, why, _again(user)))

    def forgive(self, user: str) -> None:
        """Try again what went wrong: the owner asks for it."""
        self._failed = {key: why for key, why in self._failed.items() if key[0][0] != user}
        if self.rebuilder is not None:
            self.rebuilder.forgive(user)

    def standings(self, user: str) -> list[Standing]:
        """What became of the choices at the last load of a model; of an ensemble those of the models it uses."""
        found = [standing for (name, *_), standing in sorted(self._standings.items()) if name == user]
        if self.rebuilder is None:
            return found
        told = self.rebuilder.told
        return [replace(one, rebuild=told(one.model, one.version, one.target) if one.stale else "") for one in found]

    def when_rebuilt(self, refresh: Callable[[str], Awaitable[None]]) -> None:
        """`refresh(model)` is called whenever one of its candidates was made anew."""
        if self.rebuilder is not None:
            self.rebuilder.on_built = refresh

    async def stop(self) -> None:
        """End what is made or asked."""
        if self.rebuilder is not None:
            await self.rebuilder.stop()
        await self._keys.stop()

    def _may_use(self, model: str) -> bool:
        return self._use_built if isinstance(self._use_built, bool) else model in self._use_built

    def _find(self, place: Place, folder: ModelFolder, choice: Choice) -> tuple[Candidate, str]:
        """The chosen candidate and its digest, held against the original and its proof.

        Raises ModelError where it must not serve.
        """
        _, model, version, target = place
        candidate = self._shelf.find(model, version, target, choice.candidate)
        source = folder.digest(version)
        if choice.source_sha256 != source or candidate.record.source_sha256 != source:
            raise ModelError("it was made of another artifact than this version has now", hint=_anew(model))
        backend = candidate.record.made.backend
        if backend not in backend_sources(self._registry):
            raise ModelError(f"no loaded plugin brings its backend '{backend}'", hint="name its plugin under [plugins]")
        verdict = verify(self._shelf.subject(model, version, target, candidate), self._repository.keyring)
        if verdict.state != "proved" or verdict.proof is None:
            raise ModelError(f"it is {verdict.state}: {verdict.reason}", hint=verdict.hint)
        sha256 = verdict.proof.sha256
        why = self._failed.get((place, candidate.name, sha256))
        if why:
            raise ModelError(why, hint=_again(place[0]))
        return candidate, sha256

    def _picked(self, place: Place, candidate: Candidate, sha256: str) -> Pick:
        _, model, version, target = place
        made = candidate.record.made
        return Pick(
            name=candidate.name,
            artifact=candidate.artifact,
            backend=made.backend,
            options=made.options,
            sha256=sha256,
            subject=self._shelf.subject(model, version, target, candidate),
        )

    def _rebuild(self, standing: Standing, candidate: Candidate, differences: list[str]) -> None:
        if self.rebuilder is not None:
            recipe = candidate.record.recipe.name
            self.rebuilder.ask(
                Stale(standing.model, standing.version, standing.target, candidate.name, recipe, tuple(differences))
            )

    def _keep(self, place: Place, standing: Standing) -> None:
        before = self._standings.get(place)
        self._standings[place] = standing
        if standing.candidate and standing.reason and standing != before:
            log.warning(
                "model '%s' version %d: candidate '%s' for %s does not serve: %s",
                standing.model, standing.version, standing.candidate, standing.target, standing.reason,
            )  # fmt: skip


def _anew(model: str) -> str:
    return f"millhand model build {model} makes it anew"


def _again(user: str) -> str:
    return f"millhand model load {user} tries it again"


def node_candidates(
    config: Config,
    config_path: Path | None,
    registry: Registry,
    repository: Repository,
    hardware: Hardware,
    match: Match,
) -> Candidates:
    """Those of a daemon; `config_path` is of the file that `config` was read from."""
    models = config.models
    return Candidates(
        open_shelf(config),
        repository,
        registry,
        Keys(registry, models.interpreter or match.worker.interpreter),
        node_targets(hardware, match),
        models.use_built,
        Rebuilder(config_path) if models.rebuild_stale else None,
    )


def loads(request: LoadRequest) -> Iterator[LoadRequest]:
    """A request, and those of the models that its steps use."""
    yield request
    for step in request.steps:
        if step.load is not None:
            yield from loads(step.load)


def uses_candidates(request: LoadRequest) -> bool:
    """Whether anything but the models' own artifacts is loaded."""
    return any(part.candidate for part in loads(request))
