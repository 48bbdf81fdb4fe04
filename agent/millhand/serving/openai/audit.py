"""What guards decided, one JSON line each: who asked which model, which rule spoke and why; of the text its hash."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from millhand.language.guarding import GuardContext, Stage, Verdict

log = logging.getLogger("millhand.gateway")

FILE = Path("audit") / "guards.jsonl"
"""Below [node] data_dir."""
Extent = Literal["findings", "all", "none"]


class Audit:
    """Appends to the file; several processes may. It never grows beyond its cap, the one before it included."""

    def __init__(self, path: Path, bytes_cap: int, extent: Extent) -> None:
        self._path = path
        self._half_cap = bytes_cap // 2
        self._extent = extent
        self._failing = False

    def write(self, guard: str, stage: Stage, verdict: Verdict, text: str, context: GuardContext, caller: str) -> None:
        """Keep one decision. A disk that does not take it is told once in the log, and stops no request."""
        if self._extent == "none" or (self._extent == "findings" and verdict.action == "pass"):
            return
        line = {
            "time": round(time.time(), 3),
            "guard": guard,
            "stage": stage,
            "action": verdict.action,
            "rule": verdict.rule,
            "reason": verdict.reason,
            "model": context.model,
            "source": context.source,
            "role": context.role,
            "caller": caller,
            "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "characters": len(text),
        }
        try:
            self._append(msgspec.json.encode(line) + b"\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("the audit '%s' cannot be written: %s", self._path, error)
            self._failing = True

    def _append(self, line: bytes) -> None:
        """One write to a file opened for appending: lines of several processes never mix."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
            if os.fstat(descriptor).st_size >= self._half_cap:
                self._turn_over(descriptor)
        finally:
            os.close(descriptor)

    def _turn_over(self, descriptor: int) -> None:
        """Keep the full file as the one before; whoever comes second finds it done."""
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            current = self._path.stat()
        except FileNotFoundError:
            return
        if current.st_ino == os.fstat(descriptor).st_ino:
            self._path.replace(previous(self._path))


def previous(path: Path) -> Path:
    """The file before the current one."""
    return path.with_name(f"{path.name}.1")


def decisions(path: Path) -> Iterator[dict[str, Any]]:
    """What is kept, oldest first; a line that a power cut has torn is left out."""
    for file in (previous(path), path):
        if not file.exists():
            continue
        for line in file.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                continue
