"""What a library keeps from one use to the next (timing cache, runtime cache), in a file that says who wrote it.

The file is one line of JSON with the writer's identity and the SHA-256 of the rest, then the rest. A file of another
library, driver or GPU, or a damaged one, is renamed and begun anew: a cache only saves time. Python 3.10.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from millhand.durable import write_durably

log = logging.getLogger("millhand.tensorrt")

ASIDE = ".aside"
HEAD_BYTES_CAP = 4096


class Head(msgspec.Struct, frozen=True):
    """The first line."""

    writer: dict[str, str]
    sha256: str


class CacheFile:
    """One cache of one library on one GPU."""

    def __init__(self, path: Path, writer: Mapping[str, str]) -> None:
        """writer: what must be equal for the content to be of use, such as library, driver and GPU."""
        self.path = path
        self._writer = dict(writer)
        self._read = b""

    def read(self) -> bytes:
        """The content; empty where there is none, or none of use."""
        try:
            first, _, content = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return b""
        except OSError as error:
            log.warning("cache '%s' cannot be read: %s", self.path, error.strerror)
            return b""
        why = self._unfit(first, content)
        if why:
            self.set_aside(why)
            return b""
        self._read = content
        return content

    def write(self, content: bytes) -> None:
        """Keep the content, where it is not what was read. A full disk costs the cache, not the caller."""
        if content == self._read or not content:
            return
        head = Head(self._writer, hashlib.sha256(content).hexdigest())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, msgspec.json.encode(head) + b"\n" + content)
        except OSError as error:
            log.warning("cache '%s' is not kept: %s", self.path, error.strerror)
            return
        self._read = content

    def set_aside(self, why: str) -> None:
        """Rename the file, so that it is neither used nor lost."""
        aside = self.path.with_name(self.path.name + ASIDE)
        log.warning("cache '%s' is set aside as '%s': %s", self.path, aside.name, why)
        self._read = b""
        with contextlib.suppress(OSError):
            self.path.replace(aside)

    def _unfit(self, first: bytes, content: bytes) -> str:
        try:
            head = msgspec.json.decode(first[:HEAD_BYTES_CAP], type=Head)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return "it is damaged"
        for name in sorted({*head.writer, *self._writer}):
            was, now = head.writer.get(name, "none"), self._writer.get(name, "none")
            if was != now:
                return f"its {name} was {was}, now it is {now}"
        return "" if hashlib.sha256(content).hexdigest() == head.sha256 else "it is damaged"
