"""What proof.json holds, and what lies beside an artifact."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

PROOF = "proof.json"
PAGE = "proof.html"
RECORD = "made.json"
"""A candidate's: where it comes from (workshop/shelf.py)."""
ORIGINAL = "original"
"""What a model's own artifact is called among its candidates, and the folder of its proof on the shelf."""
FORMAT = 1

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Sha256OrNone = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Role = Literal["node", "plant"]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every part of a proof has in common: a key that is not known makes it unreadable."""


class Score(Part, frozen=True, kw_only=True):
    """The task's metric on data that nothing was fitted to."""

    metric: str
    """`accuracy`, `rmse`, `perplexity`, or `agreement` with the original's answers where no truth is known."""
    higher_is_better: bool
    original: float
    candidate: float
    drop_percent: float
    """How much worse, as a share of the original's value; below 0 is better."""
    limit_percent: float
    rows: Count
    data: str
    """Where the rows come from, in words, with the SHA-256 of their bytes."""


class Latency(Part, frozen=True, kw_only=True):
    """Paired runs with the original, one thread."""

    batch: Positive
    p50_ms: float
    p99_ms: float
    original_p50_ms: float
    original_p99_ms: float


class Layer(Part, frozen=True, kw_only=True):
    name: str
    operator: str
    precision: str
    error: float | None = None
    """Share of the layer's output power that is lost; None where it was not measured."""


class Signature(Part, frozen=True, kw_only=True):
    key: KeyId
    """The SHA-256 of the public key's 32 bytes, hex, first 16 digits."""
    role: Role
    """Whose key it is: this node's, or the plant's."""
    signature: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{128}\Z")]
    """Ed25519 (RFC 8032) over the role and the proof without its signatures (proof/signature.py), hex."""


class Proof(Part, frozen=True, kw_only=True):
    """What was measured. It says nothing about any artifact but the one whose digest it names."""

    format: int = FORMAT
    model: str
    version: Positive
    candidate: str = ""
    """Empty for the model's own artifact."""
    target: str
    precision: str = "fp32"
    artifact: str
    """The file that is loaded, relative to the folder in which the proof lies."""
    sha256: Sha256
    """The artifact's digest, its data files included (proof/digest.py)."""
    source_sha256: Sha256OrNone = ""
    """A candidate's: the digest of the model's own artifact that it was made from."""
    bytes: Count
    source_bytes: Count
    backend: str
    options: dict[str, Any] = {}
    key: dict[str, str] = {}
    executed: bool
    """False: built for hardware that is not in this machine, never run."""
    score: Score | None = None
    latency: tuple[Latency, ...] = ()
    memory_bytes: Count | None = None
    original_memory_bytes: Count | None = None
    energy_mj: float | None = None
    """Millijoules an inference at batch 1; None where the board does not report power."""
    layers: tuple[Layer, ...] = ()
    notes: tuple[str, ...] = ()
    passed: bool
    reasons: tuple[str, ...] = ()
    """Why the gate said so: one sentence each."""
    node: dict[str, Any] = {}
    """Name, profile, CPU with instruction sets, accelerator, driver."""
    versions: dict[str, str] = {}
    date: str
    """UTC, ISO 8601."""
    signatures: tuple[Signature, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it speaks of a model's own artifact, which has nothing beside it to be compared with."""
        return not self.candidate
