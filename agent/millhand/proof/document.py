"""proof.json. Lies beside the artifact that it speaks of."""

from __future__ import annotations

from typing import Any

import msgspec

PROOF = "proof.json"
PAGE = "proof.html"
FORMAT = 1


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The task's metric on data that nothing was fitted to."""

    metric: str
    """`accuracy`, `rmse`, `perplexity`, or `agreement` with the original's answers where no truth is known."""
    higher_is_better: bool
    original: float
    candidate: float
    drop_percent: float
    """How much worse, as a share of the original's value; below 0 is better."""
    limit_percent: float
    rows: int
    data: str
    """Where the rows come from, in words, with the SHA-256 of their bytes."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Paired runs with the original, one thread."""

    batch: int
    p50_ms: float
    p99_ms: float
    original_p50_ms: float
    original_p99_ms: float


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    operator: str
    precision: str
    error: float | None = None
    """Share of the layer's output power that is lost; None where it was not measured."""


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    """The SHA-256 of the public key's 32 bytes, hex, first 16 digits."""
    role: str
    """`node` or `plant`."""
    signature: str
    """Ed25519 (RFC 8032) over the proof without its signatures, base64."""


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. `sha256` is that of the artifact; a proof says nothing about any other."""

    format: int = FORMAT
    model: str
    version: int
    candidate: str = ""
    """Empty for the model's own artifact."""
    target: str
    precision: str = "fp32"
    sha256: str
    source_sha256: str = ""
    bytes: int
    source_bytes: int
    backend: str
    options: dict[str, Any] = {}
    key: dict[str, str] = {}
    executed: bool
    """False: built for hardware that is not in this machine, never run."""
    score: Score | None = None
    latency: tuple[Latency, ...] = ()
    memory_bytes: int | None = None
    original_memory_bytes: int | None = None
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
