"""Who makes room where memory is short: the models that nobody has asked for longest. Decides, and touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Holding:
    """What one model takes of a budget."""

    model: str
    bytes: int
    used_ns: int
    """CLOCK_MONOTONIC of its last request, or of its load where none has come since."""
    kept: bool
    """It may not go: an asset needs it, the owner pinned it, or requests are under way."""


def shown_bytes(size_bytes: int) -> str:
    """A size for people: `1000 bytes`, `4.2 MiB`."""
    return f"{size_bytes} bytes" if size_bytes < MIB // 10 else f"{size_bytes / MIB:.1f} MiB"


def room_hint(accelerator: str) -> str:
    """What to do where models together take too much of a device's memory."""
    key = "[models] memory_bytes_cap" if accelerator == "cpu" else "what [memory] of the profile allows"
    return f"unload others (millhand model list), or raise {key}"


def room_bytes(bytes_cap: int, holdings: Sequence[Holding]) -> int:
    """What a further model may take once all that may go has gone; negative where the kept ones exceed the cap."""
    return bytes_cap - sum(holding.bytes for holding in holdings if holding.kept)


def victims(bytes_cap: int, holdings: Sequence[Holding], wanted_bytes: int) -> list[str]:
    """The models to unload so that `wanted_bytes` fit, least recently used first; all that may go if they never do."""
    excess = sum(holding.bytes for holding in holdings) + wanted_bytes - bytes_cap
    chosen: list[str] = []
    for holding in sorted(holdings, key=lambda holding: holding.used_ns):
        if excess <= 0:
            break
        if not holding.kept and holding.bytes:
            chosen.append(holding.model)
            excess -= holding.bytes
    return chosen
