"""What the processes of a server cost and hold, read from /proc by a marker in their environment.

Every server under measurement is started with its own value of MARKER; whatever it starts inherits it, so that nothing
escapes the count by leaving the process tree.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
MARKER = "BENCHMARK_FAMILY"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ROLES = (("millhand.serving.worker", "worker"), ("millhand.serving.", "front"), ("millhand", "daemon"))
"""A word of the command line -> what the process is; the first that fits counts. Others are `server`."""


@dataclass(frozen=True)
class Process:
    pid: int
    role: str
    cpu_s: float
    """User and system time since its start."""
    rss_bytes: int
    memfds: frozenset[str] = field(compare=False)
    """Inodes of the memory files it holds."""
    sockets: int = field(compare=False)


class Family:
    """All processes that carry one marker."""

    def __init__(self) -> None:
        self.marker = uuid.uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        """What the first process must be started with."""
        return {MARKER: self.marker}

    def processes(self) -> list[Process]:
        """Those that live now. One that ends meanwhile is left out."""
        wanted = f"{MARKER}={self.marker}".encode()
        found = []
        for entry in PROC.iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(_read(entry))
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by role, of the living."""
        spent: dict[str, float] = {}
        for process in self.processes():
            spent[process.role] = spent.get(process.role, 0.0) + process.cpu_s
        return spent


def _read(entry: Path) -> Process:
    stat = (entry / "stat").read_text().rpartition(")")[2].split()
    memfds, sockets = set(), 0
    for descriptor in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            sockets += target.startswith("socket:")
            if target.startswith("/memfd:"):
                memfds.add(f"{descriptor.stat().st_dev}:{descriptor.stat().st_ino}")
    return Process(
        pid=int(entry.name),
        role=_role((entry / "cmdline").read_bytes().decode(errors="replace")),
        cpu_s=(int(stat[11]) + int(stat[12])) / TICKS_PER_S,
        rss_bytes=int(stat[21]) * os.sysconf("SC_PAGE_SIZE"),
        memfds=frozenset(memfds),
        sockets=sockets,
    )


def _role(command: str) -> str:
    words = re.split(r"[\0 ]", command)
    for text, role in ROLES:
        if any(word.startswith(text) for word in words):
            return role
    return "server"


def holders(memfds: frozenset[str] | set[str]) -> list[str]:
    """Which of these memory files any process on this machine still holds, as text that names it."""
    held = []
    for entry in PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            held += [f"pid {entry.name} holds memfd {one}" for one in sorted(_read(entry).memfds & memfds)]
    return held
