"""`millhand model add`: a model from its source into the library, whole or not at all.

It is put together in a folder that is never read as a model (`.adding-NAME`), synced, then renamed. What is killed
leaves the model that was there before, or none; the next `add` from a hub goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from millhand.durable import sync_folder
from millhand.errors import InputError, ModelError
from millhand.language.conversion import OUT_TYPES, convert, require_converter
from millhand.language.fitting import Room, gib
from millhand.language.inspection import Facts, inspect
from millhand.language.library import MANIFEST, LanguageManifest, LanguageModel, Library
from millhand.language.requantise import PRECISIONS, requantise
from millhand.language.sources import GGUF, Source, Survey, Told, find_source, free_bytes
from millhand.language.wheel import wheel_licence
from millhand.serving.manifest import NAME

STAGING = ".adding-"
OLD = ".old-"
SOURCE = ".source"
"""In a staging folder: whose files it holds."""
RESERVE_BYTES = 256 << 20
"""Left free on the disk: the store lives there too, and must never find it full."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What the owner wants added."""

    name: str
    source: str
    precision: str = ""
    """Empty keeps what the source has."""
    as_gguf: bool = False
    """Whether a folder of Hugging Face's form is made a GGUF file."""
    replace: bool = False
    force: bool = False
    """Add what does not fit this node's memory, too."""
    told_source: str = ""
    """What the manifest says it came from, where that is not `source`: a path counts on one machine alone."""


def add(library: Library, addition: Addition, room: Room, told: Told) -> tuple[LanguageModel, Facts]:
    """Add a model. Raises MillhandError: InputError for what cannot be meant, ModelError for what is wrong with it."""
    _check(library, addition)
    source = find_source(addition.source, addition.precision)
    survey = source.survey()
    if _is_made(survey, addition):
        _check_precision(addition)
        require_converter()
    library.own.mkdir(parents=True, exist_ok=True)
    _check_disk(library.own, survey, addition)
    if not addition.force:
        room.check(addition.name, _served_bytes(survey, addition))
    try:
        with _staged(library.own, addition, source) as folder:
            facts = _fill(folder, addition, source, survey, told)
            if not addition.force:
                room.check(addition.name, facts.bytes, facts)
            _write_manifest(folder, addition, facts)
            told("writing to disk", 0, 0)
            _sync(folder)
            _take_place(folder, library.own / addition.name)
    except OSError as error:
        raise ModelError(
            f"'{library.own}' cannot be written: {error.strerror}", hint="make room, or mend its permissions"
        ) from error
    return library.model(addition.name), facts


def remove(library: Library, name: str) -> LanguageModel:
    """Remove a model that was added. Raises ModelError where it is not here, or lies in a folder of the owner's."""
    model = library.model(name)
    if model.folder.parent != library.own:
        raise ModelError(
            f"language model '{name}' lies in '{model.folder}', where millhand did not put it",
            hint="remove the folder yourself",
        )
    gone = library.own / f"{OLD}{name}"
    try:
        shutil.rmtree(gone, ignore_errors=True)
        model.folder.replace(gone)
        sync_folder(library.own)
        shutil.rmtree(gone)
    except OSError as error:
        raise ModelError(f"'{model.folder}' cannot be removed: {error}", hint="mend its permissions") from error
    return model


def _check(library: Library, addition: Addition) -> None:
    """Raises InputError, ModelError before anything is looked at."""
    if not re.fullmatch(NAME, addition.name):
        raise InputError(
            f"'{addition.name}' cannot be a model's name", hint="use letters, digits, '_', '.' and '-', no path"
        )
    if not addition.source.startswith("hf:"):  # a hub may have it as it is
        _check_precision(addition)
    if addition.name in library.names() and not addition.replace:
        raise ModelError(f"language model '{addition.name}' is here already", hint="give another name, or --replace")


def _check_precision(addition: Addition) -> None:
    """Raises InputError for a precision that nothing here can make."""
    known = sorted({*OUT_TYPES, *PRECISIONS} - {""})
    if addition.precision and addition.precision not in known:
        raise InputError(f"precision '{addition.precision}' cannot be made here", hint=f"give {', '.join(known)}")


def _check_disk(folder: Path, survey: Survey, addition: Addition) -> None:
    """Raises ModelError where the model does not fit, while both forms of it lie there."""
    wanted = survey.bytes * (2 if _is_made(survey, addition) else 1)
    free = free_bytes(folder) - RESERVE_BYTES
    if wanted > free or free <= 0:
        raise ModelError(
            f"model '{addition.name}' takes {gib(wanted)} on disk; '{folder}' has {gib(max(0, free))} free beside a "
            f"reserve of {gib(RESERVE_BYTES)}",
            hint="make room, take a smaller model or precision, or set [node] data_dir to a larger disk",
        )


def _is_made(survey: Survey, addition: Addition) -> bool:
    """Whether a second file is made from what the source brings."""
    return survey.form == "huggingface" and (addition.as_gguf or bool(addition.precision))


def _served_bytes(survey: Survey, addition: Addition) -> int:
    """Of the weights as they will be served, as far as that is known; sources have 16 bits where they say nothing."""
    if not addition.precision or addition.precision not in PRECISIONS:
        return survey.bytes
    return int(survey.bytes * PRECISIONS[addition.precision].bits / 16) if survey.form == "huggingface" else 0


def _fill(folder: Path, addition: Addition, source: Source, survey: Survey, told: Told) -> Facts:
    """Fetch, make the form that was asked for, and look at what came of it."""
    fetched = folder / "fetched"
    fetched.mkdir(exist_ok=True)
    path = source.fetch(fetched, free_bytes(folder) - RESERVE_BYTES, told)
    told("looking at it", 0, 0)
    facts = inspect(path)
    licence = survey.licence or facts.licence or wheel_licence(fetched)
    made = folder / f"{addition.name}-{addition.precision or 'kept'}{GGUF}"
    if facts.form == "huggingface" and (addition.as_gguf or addition.precision):
        first = addition.precision if addition.precision in OUT_TYPES else "F16"
        convert(path, made, first, told)
        path = made
    if path.suffix == GGUF and addition.precision in PRECISIONS and inspect(path).precision != addition.precision:
        second = folder / f"{addition.name}-{addition.precision}.new"
        requantise(path, second, addition.precision, told)
        second.replace(made)
        path = made
    if path == made:
        path = made.replace(folder / f"{addition.name}-{inspect(made).precision}{GGUF}")
        _keep_notices(fetched, folder)
    else:
        for file in list(fetched.iterdir()):
            file.replace(folder / file.name)
        path = folder if path == fetched else folder / path.name
    shutil.rmtree(fetched)
    return replace(inspect(path), licence=licence)


def _keep_notices(fetched: Path, folder: Path) -> None:
    """What a licence asks to be kept goes along with a file that was made."""
    for file in fetched.iterdir():
        if file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "README", "WHEEL-METADATA")):
            file.replace(folder / file.name)


def _write_manifest(folder: Path, addition: Addition, facts: Facts) -> None:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = LanguageManifest(
        format=facts.form,
        file=Path(facts.file),
        architecture=facts.architecture,
        parameters=facts.parameters,
        precision=facts.precision,
        context_tokens=facts.context_tokens,
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        reasoning=facts.reasoning,
        embeddings=facts.embeddings,
        licence=facts.licence,
        source=addition.told_source or addition.source,
        sha256={name: file_sha256(path) for name, path in files.items() if not name.startswith(".")},
    )
    (folder / MANIFEST).write_text(f"# Written by millhand model add.\n{manifest.toml()}\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _staged(own: Path, addition: Addition, source: Source) -> Iterator[Path]:
    """A folder to fill, this process's alone. After an error it stays where the source can go on from it."""
    folder = own / f"{STAGING}{addition.name}"
    with (own / f"{STAGING}{addition.name}.lock").open("a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ModelError(
                f"language model '{addition.name}' is being added already", hint="wait until that has ended, or end it"
            ) from error
        whose = folder / SOURCE
        wanted = f"{addition.source}\n{addition.precision}\n"
        if not (source.resumes and whose.is_file() and whose.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            whose.write_text(wanted)
        for path in folder.iterdir():  # what a kill has left beside what was fetched
            if path.name not in ("fetched", SOURCE):
                path.unlink()
        try:
            yield folder
        except BaseException:
            if not source.resumes:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have everything on the disk before it takes its name."""
    (folder / SOURCE).unlink()
    for path in folder.rglob("*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _take_place(folder: Path, place: Path) -> None:
    """Between two renames nothing is there, never half of something."""
    old = place.parent / f"{OLD}{place.name}"
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.replace(old)
    folder.replace(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
