"""The wheels of a target, fetched for another machine than this one, and the project's own."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from millhand_images.lock import canonical, read
from millhand_images.process import BuildError, call, pip
from millhand_images.target import ROOT, Target

CACHE = ROOT / "build" / "wheels"
VERSION_FILE = Path("agent/millhand/__init__.py")
SOURCES = ("agent", "plugins", "profiles", "hub", "pyproject.toml", "README.md", "LICENSE")


def fetch(target: Target, cache: Path = CACHE) -> list[Path]:
    """The wheels of a target's lock, sorted by name; what is not cached is fetched. Raises BuildError.

    A wheel whose hash is not the lock's is refused by pip.
    """
    folder = cache / target.name
    folder.mkdir(parents=True, exist_ok=True)
    pinned: list[str | Path] = ["download", "--quiet", "--no-deps", "--require-hashes", "-r", target.lock_path]
    pip([*pinned, "--find-links", folder, "--dest", folder, *target.pip_options()])
    by_name = {(canonical(path.name.split("-")[0]), path.name.split("-")[1]): path for path in folder.glob("*.whl")}
    try:
        return sorted(by_name[pin.name, pin.version] for pin in read(target))
    except KeyError as error:
        raise BuildError(f"wheel {error} was not fetched", hint=f"delete {folder} and try again") from error


def version() -> str:
    """The project's version, from its one place."""
    text = (ROOT / VERSION_FILE).read_text(encoding="utf-8")
    return text.split('__version__ = "')[1].split('"')[0]


def build(folder: Path, as_version: str) -> Path:
    """Build the project's own wheel into `folder`, under a version that may differ from the tree's. Raises BuildError.

    SOURCE_DATE_EPOCH in the environment gives its files' time.
    """
    with tempfile.TemporaryDirectory() as copy:
        tree = Path(copy)
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        path = tree / VERSION_FILE
        path.write_text(path.read_text(encoding="utf-8").replace(f'"{version()}"', f'"{as_version}"'), encoding="utf-8")
        call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=tree)
    return next(folder.glob("millhand-*.whl"))
