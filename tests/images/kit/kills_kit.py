"""Installs that die: dpkg and everything else on the node, by kill -9, at a seeded moment of a chosen phase.

Where dpkg is, it says itself (--status-fd, dpkg(1)); that it has begun to rename the new files over the old ones shows
in the folder alone.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chroot_kit import ENVIRONMENT, Chroot

PHASES = ("unpack", "rename", "unpacked", "postinst")
"""New files are laid beside the old ones; renamed over them; old ones taken away; the postinst runs."""
FIRST_FILE = "usr/lib/millhand/bin/millhand.dpkg-new"
"""The first regular file of the package, as it is called until it is renamed."""
POLL_S = 0.002


@dataclass(frozen=True)
class Kill:
    """One kill, and what lay there right after it."""

    phase: str
    after_s: float
    """Seconds into the phase."""
    alive: bool
    """Whether dpkg was still at it."""
    said: str
    """The last thing that dpkg said of the package's state before it died."""
    unrenamed: int
    """New files that still lie beside the old ones."""

    def __str__(self) -> str:
        hit = "killed" if self.alive else "had ended"
        return f"{self.phase} + {self.after_s:.3f} s, {hit} ({self.said or 'begun'}, {self.unrenamed} files to rename)"


class Install:
    """`dpkg -i` that is under way."""

    def __init__(self, node: Chroot, package: Path) -> None:
        self._node = node
        self._status = node.root / "root/status"
        self.began = time.monotonic()
        words = node.command("dpkg", "--status-fd", "{}", "-i", node.lay(package))
        with self._status.open("wb") as status:
            words[words.index("{}")] = str(status.fileno())
            self._dpkg = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT, pass_fds=[status.fileno()]
            )

    def said(self) -> str:
        """What dpkg has said of the package's states so far, one a line."""
        lines = self._status.read_text().splitlines()
        return "".join(f"{line.rpartition(': ')[2]}\n" for line in lines if line.startswith("status: millhand: "))

    def runs(self) -> bool:
        return self._dpkg.poll() is None

    def wait_for(self, phase: str) -> None:
        """Return when the phase has begun, or when dpkg has ended."""
        first = self._node.root / FIRST_FILE
        begun: dict[str, Callable[[], bool]] = {
            "unpack": lambda: "half-installed" in self.said(),
            "rename": lambda: not first.exists(),
            "unpacked": lambda: "half-installed\nunpacked\n" in self.said(),
            "postinst": lambda: "half-installed\nunpacked\nhalf-configured\n" in self.said(),
        }
        if phase == "rename":
            self._wait(lambda: first.exists() or "half-installed\nunpacked\n" in self.said())
        self._wait(begun[phase])

    def kill(self, phase: str, after_s: float) -> Kill:
        """kill -9 of all that runs on the node, so long after the phase has begun."""
        self.wait_for(phase)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._dpkg.wait(after_s)
        alive = self.runs()
        self._node.kill()
        self._dpkg.wait()
        said = self.said().split()
        left = sum(1 for _ in (self._node.root / "usr/lib/millhand").rglob("*.dpkg-new"))
        return Kill(phase, after_s, alive, said[-1] if said else "", left)

    def durations_s(self) -> dict[str, float]:
        """Let it end; how long each phase took."""
        begins = []
        for phase in PHASES:
            self.wait_for(phase)
            begins.append(time.monotonic())
        code = self._dpkg.wait()
        assert code == 0, code
        ends = [*begins[1:], time.monotonic()]
        return {phase: end - begin for phase, begin, end in zip(PHASES, begins, ends, strict=True)}

    def _wait(self, condition: Callable[[], bool]) -> None:
        while self.runs() and not condition():
            time.sleep(POLL_S)


def moments(count: int, durations_s: dict[str, float], seed: int) -> list[tuple[str, float]]:
    """Phase and seconds into it of each kill: all phases in turn, at a random moment of each."""
    chance = random.Random(seed)
    phases = [PHASES[number % len(PHASES)] for number in range(count)]
    return [(phase, chance.uniform(0, durations_s[phase])) for phase in phases]
