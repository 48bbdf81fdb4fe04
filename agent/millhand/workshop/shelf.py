"""Where candidates lie: `<root>/<model>/<version>/<target>/<candidate>/`, and `choice.json` beside them.

A candidate's folder appears whole or not at all: it is written under a name that is never read, then renamed. Nothing
here judges or trusts; that is the proof's part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millhand.durable import sync_folder, write_durably
from millhand.errors import ModelError
from millhand.proof.digest import artifact_files
from millhand.proof.document import ORIGINAL, RECORD
from millhand.proof.verification import Subject
from millhand.workshop.recipe import Made, Recipe

if TYPE_CHECKING:
    from millhand.config import Config

CHOICE = "choice.json"
_STAGING = ".making-"
_LOCK = ".lock"
BUILT = "built"
_CACHE = ".cache"
"""No model's name begins with a dot."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """made.json: where a candidate comes from."""

    recipe: Recipe
    maker: str
    made: Made
    source_sha256: str
    """Of the artifact that the model had; another one makes the candidate worthless."""
    sha256: str
    """Of the candidate's artifact."""
    began_sha256: str = ""
    """Of the candidate's artifact that it was made from; empty for the model's own. Made anew where it has changed."""
    options_sha256: str = ""
    """Of the maker's own table `[plugins.<name>]`; made anew where it has changed."""
    date: str
    """UTC, ISO 8601."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """choice.json: which candidate serves in place of the model's own artifact."""

    candidate: str
    """Empty: none was better, the original serves."""
    source_sha256: str
    why: str
    date: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate on the shelf."""

    name: str
    folder: Path
    record: Record

    @property
    def artifact(self) -> Path:
        return self.folder / self.record.made.artifact

    @property
    def bytes(self) -> int:
        """Of the artifact with its data files. Raises OSError where one is gone."""
        return sum(path.stat().st_size for path in artifact_files(self.folder).values())


class Shelf:
    """The candidates of one node."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, model: str, version: int, target: str) -> Path:
        """The folder of a model version's candidates for a target."""
        return self.root / model / str(version) / target

    def original(self, model: str, version: int) -> Path:
        """The folder of the proof of a version's own artifact, beside those of targets; whether it is there or not."""
        return self.place(model, version, ORIGINAL)

    def unwritable(self, error: OSError) -> ModelError:
        """What to say where the shelf cannot be written."""
        return ModelError(
            f"the shelf '{self.root}' cannot be written: {error}",
            hint="run as the user that runs the agent, make room, or set [models] built_dir to another folder",
        )

    def candidates(self, model: str, version: int, target: str) -> list[Candidate]:
        """What is there, by name; a folder without a readable record is passed over."""
        place = self.place(model, version, target)
        found = []
        for path in sorted(place.glob(f"*/{RECORD}")):
            if path.parent.name.startswith(_STAGING):
                continue
            with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
                record = msgspec.json.decode(path.read_bytes(), type=Record)
                found.append(Candidate(name=path.parent.name, folder=path.parent, record=record))
        return found

    def find(self, model: str, version: int, target: str, name: str) -> Candidate:
        """Raises ModelError naming what is there."""
        candidates = self.candidates(model, version, target)
        for candidate in candidates:
            if candidate.name == name:
                return candidate
        names = ", ".join(candidate.name for candidate in candidates) or "none"
        raise ModelError(
            f"model '{model}' version {version} has no candidate '{name}' for {target}",
            hint=f"there are: {names}; 'millhand model build {model}' makes them",
        )

    def subject(self, model: str, version: int, target: str, candidate: Candidate) -> Subject:
        """The candidate as its proof must speak of it."""
        record = candidate.record
        return Subject(
            model=model,
            version=version,
            folder=candidate.folder,
            artifact=record.made.artifact,
            candidate=candidate.name,
            target=target,
            backend=record.made.backend,
            made={"options": record.made.options, "key": record.made.key, "source_sha256": record.source_sha256},
        )

    @contextlib.contextmanager
    def staged(self, model: str, version: int, target: str, name: str) -> Iterator[Path]:
        """An empty folder to fill; at the end of the block it takes the candidate's place, after an error it goes."""
        place = self.place(model, version, target)
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{name}-", dir=place))
        try:
            yield folder
            _replace(folder, place / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self, model: str, version: int, target: str) -> Iterator[Path]:
        """An empty folder for a build's own files, which goes at the end of the block."""
        place = self.place(model, version, target)
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{_STAGING}rows-", dir=place, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def cache(self, target: str) -> Path:
        """A folder for what makers keep between jobs, one for each target."""
        folder = self.root / _CACHE / target
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def claimed(self, model: str) -> Iterator[None]:
        """Hold a model's part of the shelf, and clear it of what a killed process has left half made.

        The kernel lets go of it with the process. Raises ModelError where another process holds it.
        """
        place = self.root / model
        place.mkdir(parents=True, exist_ok=True)
        with (place / _LOCK).open("a+", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ModelError(
                    f"model '{model}' is being built already, by process {lock.read().strip() or 'unknown'}",
                    hint="wait until it has ended, or end it",
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            for folder in place.glob(f"*/*/{_STAGING}*"):
                shutil.rmtree(folder, ignore_errors=True)
            yield

    def choice(self, model: str, version: int, target: str) -> Choice | None:
        """What was chosen; None where nothing was, or it cannot be read."""
        path = self.place(model, version, target) / CHOICE
        try:
            return msgspec.json.decode(path.read_bytes(), type=Choice)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def choose(self, model: str, version: int, target: str, choice: Choice) -> None:
        """Write the choice durably."""
        place = self.place(model, version, target)
        place.mkdir(parents=True, exist_ok=True)
        write_durably(place / CHOICE, msgspec.json.format(msgspec.json.encode(choice), indent=2))


def open_shelf(config: Config) -> Shelf:
    """The node's shelf."""
    return Shelf(config.models.built_dir or config.node.data_dir / BUILT)


def _replace(folder: Path, place: Path) -> None:
    """Put a folder in the place of another. Between two renames nothing is there, never half of something."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    folder.chmod(0o755)
    sync_folder(folder)
    if place.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{_STAGING}old-", dir=place.parent))
        place.replace(old)
        folder.replace(place)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.replace(place)
    sync_folder(place.parent)
