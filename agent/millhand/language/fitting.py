"""Whether a language model fits this node's memory, and how fast it could be at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from millhand.errors import ModelError

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.profiles import Profile

CONTEXT_TOKENS = 4096
"""One conversation of a technician: an alert, some passages and an answer."""
SERVER_BYTES = 200 << 20
"""What llama.cpp's server takes beside weights and KV cache: 370 MB RSS with SmolLM2's 98 MB, less its cache."""
GIB = 1 << 30


class KvCache(Protocol):
    """What knows how large its KV cache is: a manifest, facts, an entry of the catalogue."""

    @property
    def context_tokens(self) -> int:
        """What the model was trained for; 0 where it is not known."""

    def kv_bytes(self, tokens: int, bits: int = 16) -> int:
        """Of so many tokens."""


@dataclass(frozen=True)
class Room:
    """The memory of this node that a language model may take."""

    budget_bytes: int | None
    """None where it is not known."""
    place: str
    """`this node`, `2 GPUs`: whose memory that is."""
    profile: Profile

    def fits(self, weights_bytes: int, kv: KvCache | None = None) -> bool | None:
        """None where the memory is not known."""
        return None if self.budget_bytes is None else needed_bytes(weights_bytes, kv) <= self.budget_bytes

    def check(self, name: str, weights_bytes: int, kv: KvCache | None = None) -> None:
        """Raises ModelError where a model does not fit."""
        if self.fits(weights_bytes, kv) is False:
            assert self.budget_bytes is not None
            raise ModelError(
                f"model '{name}' needs {gib(needed_bytes(weights_bytes, kv))} of memory with {CONTEXT_TOKENS} tokens "
                f"of context; profile '{self.profile.name}' leaves {gib(self.budget_bytes)} of {self.place} for models",
                hint="take a smaller model or precision (millhand model catalog says what fits), or --force",
            )

    def tokens_per_s(self, weights_bytes: int) -> float | None:
        """An upper bound for one user, from the profile's memory bandwidth; None where that is not known."""
        return self.profile.tokens_per_s(weights_bytes)


def needed_bytes(weights_bytes: int, kv: KvCache | None) -> int:
    """Weights, KV cache of one conversation, and the server itself."""
    tokens = 0 if kv is None else min(CONTEXT_TOKENS, kv.context_tokens or CONTEXT_TOKENS)
    return weights_bytes + (kv.kv_bytes(tokens) if kv else 0) + SERVER_BYTES


def node_room(config: Config) -> Room:
    """Of this node: its GPUs where the profile has workers there, else its main memory. Raises MillhandError."""
    from millhand.hardware.visible import find_device
    from millhand.profiles import match_node

    hardware, match = match_node(config)
    device = find_device(hardware, match.worker.accelerator)
    budget = match.profile.budget_bytes(hardware, device)
    if device is None or budget is None:
        return Room(budget, "main memory", match.profile)
    count = match.tensor_parallel
    return Room(budget * count, f"{count} GPUs" if count > 1 else "the GPU", match.profile)


def gib(size_bytes: float) -> str:
    """`4.7 GiB`, `94 MiB`."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):.0f} MiB"
