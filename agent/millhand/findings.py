"""What `millhand check` says: a finding is ok, a warning or an error, with a remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from millhand.errors import MillhandError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of `check`."""

    name: str
    level: Level
    message: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def of_error(name: str, error: MillhandError) -> Finding:
    """What an error says, under the name of what was looked at."""
    return Finding(name, "error", error.message, error.hint)


def mib(size_bytes: int) -> str:
    """A size in MiB as text, with two digits where it is small."""
    size = size_bytes / 2**20
    return f"{size:.0f} MiB" if size >= 10 or size.is_integer() else f"{size:.2g} MiB"
