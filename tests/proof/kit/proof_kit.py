"""Proofs of small artifacts, filled in as the workshop would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from millhand.proof.document import Latency, Layer, Proof, Score
from millhand.proof.file import write_proof
from millhand.proof.keys import node_key
from millhand.proof.signature import sign
from millhand.proof.verification import Subject


def proof_of(subject: Subject, **changes: Any) -> Proof:
    """An unsigned proof that fits the artifact; `changes` win."""
    size = sum(path.stat().st_size for path in subject.files().values())
    proof = Proof(
        model=subject.model,
        version=subject.version,
        candidate=subject.candidate,
        target=subject.target or "cpu",
        artifact=subject.artifact,
        sha256=subject.digest(),
        bytes=size,
        source_bytes=4 * size,
        backend=subject.backend or "onnxruntime",
        executed=True,
        passed=True,
        score=Score(
            metric="accuracy",
            higher_is_better=True,
            original=0.987,
            candidate=0.985,
            drop_percent=0.2,
            limit_percent=1.2,
            rows=640,
            data="40 machines that nothing was fitted to, SHA-256 5e884898",
        ),
        latency=(Latency(batch=1, p50_ms=0.11, p99_ms=0.19, original_p50_ms=0.4, original_p99_ms=0.52),),
        memory_bytes=3 << 20,
        original_memory_bytes=9 << 20,
        layers=(Layer(name="conv/1", operator="Conv", precision="int8", error=3e-4),),
        node={"name": "press-7", "profile": "cpu"},
        versions={"millhand": "0.1", "onnxruntime": "1.32.0"},
        date="2026-11-25T10:00:00Z",
    )
    return msgspec.structs.replace(proof, **subject.made, **changes)


def prove(subject: Subject, data_dir: Path | None, **changes: Any) -> Proof:
    """Write a proof beside the artifact, signed by the node of `data_dir`; None leaves it unsigned."""
    proof = proof_of(subject, **changes)
    if data_dir is not None:
        proof = sign(proof, node_key(data_dir), "node")
    subject.folder.mkdir(exist_ok=True)
    write_proof(subject.folder, proof)
    return proof
