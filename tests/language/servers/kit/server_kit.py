"""A stand-in for a language server, and what tests ask of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from millhand.language.launch import Ability, Command, Launch, ServerFigures
from millhand.language.samples import read_samples

PROGRAM = Path(__file__).parent / "standin.py"


class StandIn:
    """Implements `LanguageServer` around standin.py; `ways` are read anew at each start from a file in `folder`."""

    name = "standin"
    formats: Sequence[str] = ("gguf",)
    abilities: frozenset[Ability] = frozenset({"chat", "embeddings", "json_schema", "usage"})

    def __init__(self, ways: str, folder: Path) -> None:
        self._file = folder / "ways.txt"
        self.behave(ways)

    def behave(self, ways: str) -> None:
        self._file.write_text(ways)

    def missing(self) -> str:
        return ""

    def command(self, launch: Launch) -> Command:
        argv = (sys.executable, os.fspath(PROGRAM), os.fspath(self._file), str(launch.port))
        return Command(argv, {"STANDIN_KEY": launch.api_key})

    def figures(self, metrics: str) -> ServerFigures:
        found = read_samples(metrics)
        return ServerFigures(running=found.get("running"), steps=found.get("steps"))


def server_of(keeper: int) -> psutil.Process:
    """The server's own process, below its keeper."""
    (child,) = psutil.Process(keeper).children()
    return child


def session_of(leader: int) -> list[psutil.Process]:
    """Every living process of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; one that waits to be reaped has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
