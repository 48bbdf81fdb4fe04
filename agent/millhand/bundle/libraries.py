"""Wheels of a bundle, unpacked into a folder that stands before the package's own libraries on Python's path."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from millhand.bundle.exchange import put, put_aside, remove
from millhand.bundle.manifest import File
from millhand.errors import BundleError

LOCAL = Path("/usr/local/lib/millhand")
FOLDER = "site-packages"
MARK = ".bundle"
"""In the folder: whose wheels it holds. A folder without it is the owner's own."""
STAGING = ".laying"


class Libraries:
    """The folder of further libraries of one node."""

    def __init__(self, local: Path = LOCAL) -> None:
        self._place = local / FOLDER
        self._staging = local / STAGING

    def lay(self, staged: Path, wheels: Sequence[File]) -> bool:
        """Unpack the wheels in place of those that an earlier bundle brought; none takes those away.

        Whether anything changed. A folder of the owner's own stays where there is nothing to lay. Raises BundleError
        where there is, or a wheel is none; OSError.
        """
        remove(self._staging)
        remove(self._staging.with_name(f"{STAGING}.old"))
        if self._place.exists() and not (self._place / MARK).exists():
            if not wheels:
                return False
            raise BundleError(
                f"'{self._place}' was not laid by a bundle", hint="move it away; bundles exchange it as a whole"
            )
        mark = _digest(wheels)
        if not wheels:
            return self._clear()
        if self._place.exists() and (self._place / MARK).read_text(encoding="ascii") == mark:
            return False
        self._staging.mkdir(parents=True)
        for wheel in wheels:
            unpack(staged / wheel.path, self._staging)
        link_names(self._staging)
        (self._staging / MARK).write_text(mark, encoding="ascii")
        put(self._staging, self._place)
        return True

    def _clear(self) -> bool:
        if not self._place.exists():
            return False
        put_aside(self._place, self._staging)
        remove(self._staging)
        return True


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel's libraries (PEP 427), without its scripts and headers. Raises BundleError, OSError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                relative = _relative(PurePosixPath(entry.filename))
                if entry.is_dir() or relative is None:
                    continue
                path = folder / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                executable = entry.external_attr >> 16 & stat.S_IXUSR
                path.chmod(0o755 if executable else 0o644)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise BundleError(f"'{wheel.name}' is no wheel: {error}", hint="build the bundle anew") from error


def link_names(folder: Path) -> None:
    """Let shared libraries be found by their shorter names too: `libx.so.1` and `libx.so` lead to `libx.so.1.2`.

    Wheels cannot hold links; packages make them when root first imports them, and the agent's user cannot. Raises
    OSError.
    """
    for path in sorted(folder.rglob("lib*.so.*")):
        found = re.fullmatch(r"(lib.+\.so)(\.\d+)\..+", path.name)
        for name in (found[1] + found[2], found[1]) if found else ():
            link = path.with_name(name)
            if not link.exists():
                link.symlink_to(path.name)


def _relative(name: PurePosixPath) -> PurePosixPath | None:
    """Where a member goes; None where it is not laid. Raises ValueError for a name that leads out."""
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"'{name}' leads out of it")
    if not name.parts[0].endswith(".data"):
        return name
    kind, rest = name.parts[1:2], name.parts[2:]
    return PurePosixPath(*rest) if kind in (("purelib",), ("platlib",)) and rest else None


def _digest(wheels: Sequence[File]) -> str:
    lines = sorted(f"{wheel.sha256}  {wheel.path}\n" for wheel in wheels)
    return hashlib.sha256("".join(lines).encode()).hexdigest() + "\n"
