"""Models from a hub that speaks the Hugging Face Hub's file API: `hf:ORG/NAME[:FILE][@REVISION]`.

The package `huggingface_hub` (extra `hub`) asks and fetches, so that HF_ENDPOINT, HF_TOKEN and proxies are honoured as
everywhere. Its own download begins anew in every process (2.4); here a part that was fetched stays, and is continued.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from millhand.errors import InputError, MillhandError, ModelError
from millhand.language.inspection import Form
from millhand.language.sources import GGUF, KEPT, READ_BYTES, Survey, Told

REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
PARTS = ".partial"
"""Files that are not whole yet, named by their content."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit."""

    name: str
    bytes: int
    sha256: str
    """Of large files; empty for those that git keeps itself."""
    git_sha1: str
    """Of git's own blob."""


class HubSource:
    """One repository at one commit, and the files of it that make a model."""

    resumes = True

    def __init__(self, text: str, precision: str) -> None:
        """Raises InputError for what is no repository, ModelError where `huggingface_hub` is missing."""
        found = REPOSITORY.fullmatch(text)
        if found is None:
            raise InputError(f"'hf:{text}' names no repository", hint="give hf:ORG/NAME, or hf:ORG/NAME:FILE.gguf")
        self.text = f"hf:{text}"
        self._repo, self._file, self._revision = found["repo"], found["file"] or "", found["revision"]
        self._precision = precision
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise ModelError(
                "the package 'huggingface_hub' is not installed", hint="pip install 'millhand[hub]'"
            ) from error

    def survey(self) -> Survey:
        files = self._wanted
        form: Form = "gguf" if files[0].name.endswith(GGUF) else "huggingface"
        card = getattr(self._info, "card_data", None)
        licence = str((card.get("license_name") or card.get("license") or "") if card else "")
        return Survey(form=form, bytes=sum(file.bytes for file in files), licence=licence)

    def fetch(self, folder: Path, bytes_cap: int, told: Told) -> Path:
        parts = folder / PARTS
        parts.mkdir(exist_ok=True)
        for file in self._wanted:
            target = folder / PurePosixPath(file.name).name
            if not target.exists():
                self._fetch(file, parts, told).replace(target)
        if any(parts.iterdir()):
            raise ModelError(f"'{folder}' holds parts of another model", hint="remove it and try again")
        parts.rmdir()
        first = self._wanted[0].name
        return folder / PurePosixPath(first).name if first.endswith(GGUF) else folder

    @cached_property
    def _info(self) -> Any:
        """Raises ModelError where the hub does not answer, or does not know the repository."""
        try:
            return self._hub.HfApi(endpoint=self._endpoint).model_info(
                self._repo, revision=self._revision, files_metadata=True
            )
        except Exception as error:  # its own tree of errors, and those of its HTTP library
            raise self._trouble(error) from error

    @cached_property
    def _wanted(self) -> list[HubFile]:
        """The files of the model, weights first. Raises ModelError where they are not to be told."""
        files = [_file(entry) for entry in self._info.siblings or ()]
        models = [file for file in files if file.name.endswith(GGUF)]
        if self._file:
            models = [file for file in models if file.name == self._file]
            if not models:
                raise self._none(f"has no GGUF file '{self._file}'", files)
        elif self._precision and models:
            spelt = re.compile(rf"(?:^|[-._]){re.escape(self._precision)}(?:[-._]|$)", re.IGNORECASE)
            models = [file for file in models if spelt.search(PurePosixPath(file.name).stem)]
            if not models:
                raise self._none(f"has no GGUF file in {self._precision}", files)
        if len(models) > 1:
            raise self._none("has several GGUF files", files)
        if models:
            return models
        kept = [file for file in files if "/" not in file.name and any(fnmatchcase(file.name, like) for like in KEPT)]
        if not any(file.name.endswith(".safetensors") for file in kept):
            raise self._none("has neither a GGUF file nor weights in safetensors", files)
        return sorted(kept, key=lambda file: (not file.name.endswith(".safetensors"), file.name))

    def _fetch(self, file: HubFile, parts: Path, told: Told) -> Path:
        """Fetch what is missing of a file; returns it whole, its hash checked."""
        part = parts / (file.sha256 or file.git_sha1)
        have = part.stat().st_size if part.exists() else 0
        if have > file.bytes:
            part.unlink()
            have = 0
        told(f"fetching {file.name}", have, file.bytes)
        try:
            self._download(file, part, have, told)
        except MillhandError:
            raise
        except Exception as error:  # as above
            raise self._trouble(error) from error
        _check(file, part)
        return part

    def _download(self, file: HubFile, part: Path, have: int, told: Told) -> None:
        download: Any = importlib.import_module("huggingface_hub.file_download")
        tools: Any = importlib.import_module("huggingface_hub.utils")
        tools.disable_progress_bars()
        url = self._hub.hf_hub_url(self._repo, file.name, revision=self._info.sha, endpoint=self._endpoint)
        where = download.get_hf_file_metadata(url).location
        headers = tools.build_hf_headers()
        if urlsplit(where).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # a token is for the hub alone, not for where it keeps its files
        with part.open("r+b" if have else "wb") as written:
            written.seek(have)
            counting = _Counting(written, told, file)
            download.http_get(where, counting, resume_size=have, headers=headers, expected_size=file.bytes)

    def _none(self, why: str, files: list[HubFile]) -> ModelError:
        names = ", ".join(file.name for file in files if file.name.endswith(GGUF))
        hint = f"give one: hf:{self._repo}:FILE, of {names}" if names else f"look at what '{self._repo}' holds"
        return ModelError(f"'{self._repo}' {why}", hint=hint)

    def _trouble(self, error: Exception) -> ModelError:
        """A hub's or a network's error in words."""
        endpoint = self._endpoint or self._hub.constants.ENDPOINT
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if status in (401, 403):
            hint = "accept the model's licence on the hub, and give your token in HF_TOKEN"
        elif status == 404:
            hint = "check the name; a private model needs a token in HF_TOKEN"
        else:
            hint = "check the network and HF_ENDPOINT, and give the same command again: what was fetched is kept"
        return ModelError(f"'{self.text}' at {endpoint}: {why}", hint=hint)


class _Counting:
    """A file that tells how much it has."""

    def __init__(self, file: Any, told: Told, of: HubFile) -> None:
        self._file, self._told, self._of = file, told, of

    def write(self, data: bytes) -> int:
        count: int = self._file.write(data)
        done = self._file.tell()
        if done > self._of.bytes:
            raise ModelError(
                f"the hub sends more of '{self._of.name}' than the {self._of.bytes:,} bytes it speaks of",
                hint="try again; if it stays so, take another source",
            )
        self._told(f"fetching {self._of.name}", done, self._of.bytes)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _file(entry: Any) -> HubFile:
    name = str(entry.rfilename)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ModelError(
            f"the hub names a file {name!r}, which leads out of the model's folder", hint="do not trust it"
        )
    lfs = entry.lfs or {}
    sha256 = str((lfs.get("sha256") if isinstance(lfs, dict) else lfs.sha256) or "")
    git_sha1 = str(entry.blob_id or "")
    if not (re.fullmatch(r"[0-9a-f]{64}", sha256) or (not sha256 and re.fullmatch(r"[0-9a-f]{40}", git_sha1))):
        raise ModelError(f"the hub tells no hash of '{name}'", hint="take another source")
    if not isinstance(entry.size, int) or entry.size < 0:
        raise ModelError(f"the hub tells no size of '{name}'", hint="take another source")
    return HubFile(name, entry.size, sha256, git_sha1)


def _check(file: HubFile, path: Path) -> None:
    """Raises ModelError, and removes the file, where it is not what the hub speaks of."""
    found = hashlib.sha256()
    if not file.sha256:  # git's blobs are hashed with their length before them
        found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as read:
        while chunk := read.read(READ_BYTES):
            found.update(chunk)
    wanted = file.sha256 or file.git_sha1
    if found.hexdigest() != wanted:
        path.unlink()
        raise ModelError(
            f"'{file.name}' is not what the hub speaks of: its hash is {found.hexdigest()[:12]}…, not {wanted[:12]}…",
            hint="it was removed; try again, or take another source",
        )
