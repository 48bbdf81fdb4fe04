"""What a bundle brings beside packages, laid into its places: libraries, models, engines, language models.

Each of them takes its place whole, one after another; a kill leaves each old or new, and the next run ends it. Nothing
of the data folder is touched but the versions, candidates and language models that the bundle holds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from millhand.bundle.exchange import put, remove
from millhand.bundle.libraries import LOCAL, Libraries
from millhand.bundle.manifest import NAME, File, Manifest, decode
from millhand.errors import BundleError

DEPTHS = {"models": 2, "built": 4, "language": 1}
"""Folder of the data folder -> how deep below it that lies which is exchanged as one: `models/NAME/VERSION`,
`built/NAME/VERSION/TARGET/CANDIDATE`, `language/NAME`."""
STAGING = ".laying"


@dataclass(frozen=True)
class Piece:
    """What takes its place as one: a folder or a file, below the data folder."""

    path: PurePosixPath
    files: tuple[File, ...]


def staged_manifest(staged: Path) -> Manifest:
    """The manifest of an unpacked bundle. Raises BundleError."""
    try:
        return decode((staged / NAME).read_bytes())
    except OSError as error:
        raise BundleError(
            f"'{staged}' is no unpacked bundle: {error.strerror}", hint="millhand bundle install FILE"
        ) from error


def lay_libraries(staged: Path, local: Path = LOCAL) -> list[str]:
    """Lay the wheels of an unpacked, verified bundle. What changed, in words. Raises BundleError."""
    wheels = [file for file in staged_manifest(staged).files if file.path.startswith("wheels/")]
    try:
        changed = Libraries(local).lay(staged, wheels)
    except OSError as error:
        raise _stuck(error) from error
    return [f"{len(wheels)} libraries in {local}"] if changed else []


def lay_data(staged: Path, data_dir: Path) -> list[str]:
    """Lay models and what was made of them; what is there already is left alone. What changed, in words.

    Call it as the user that the data folder belongs to: as root it would follow what that user has put there. Raises
    BundleError.
    """
    changes = []
    try:
        remove(data_dir / STAGING)
        for piece in list(_pieces(staged_manifest(staged))):
            if not _is_there(piece, data_dir):
                _lay_piece(piece, staged, data_dir)
                changes.append(str(piece.path))
        remove(data_dir / STAGING)
    except OSError as error:
        raise _stuck(error) from error
    return changes


def _stuck(error: OSError) -> BundleError:
    return BundleError(
        f"the bundle cannot be laid: {error.strerror}: '{error.filename}'",
        hint="mend the disk or its permissions, and install again: what is done already is left as it is",
    )


def _pieces(manifest: Manifest) -> Iterator[Piece]:
    """Single files last: a model.toml is seen when its version is there. Raises BundleError for any other place."""
    found: dict[PurePosixPath, list[File]] = {}
    for file in manifest.files:
        if not file.path.startswith("data/"):
            continue
        parts = PurePosixPath(file.path).parts[1:]
        depth = DEPTHS.get(parts[0], 0)
        if not depth or len(parts) <= depth:
            raise BundleError(f"'{file.path}' has no place in a data folder", hint="build the bundle anew")
        found.setdefault(PurePosixPath(*parts[: depth + 1]), []).append(file)
    for path, files in sorted(found.items(), key=lambda item: (len(item[1]) == 1, item[0])):
        yield Piece(path, tuple(files))


def _is_there(piece: Piece, data_dir: Path) -> bool:
    place = data_dir / piece.path
    here = sum(len(names) for _, _, names in os.walk(place)) if place.is_dir() else int(place.is_file())
    paths = [data_dir / PurePosixPath(file.path).relative_to("data") for file in piece.files]
    return here == len(paths) and all(map(_is_same, paths, piece.files))


def _is_same(path: Path, file: File) -> bool:
    try:
        if path.stat().st_size != file.bytes:
            return False
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest() == file.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lay_piece(piece: Piece, staged: Path, data_dir: Path) -> None:
    staging = data_dir / STAGING
    remove(staging)
    for file in piece.files:
        target = staging / PurePosixPath(file.path).relative_to("data" / piece.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(staged / file.path, target)
    put(staging, data_dir / piece.path)
