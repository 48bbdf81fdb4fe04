"""Whether an artifact may be believed: proved, unproved, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from millhand.errors import ModelError
from millhand.proof.digest import artifact_files, digest
from millhand.proof.document import PROOF, Proof
from millhand.proof.file import read_proof
from millhand.proof.signature import Keyring, Trust, check

State = Literal["proved", "unproved", "refused"]
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Subject:
    """An artifact, as whoever wants to serve it knows it."""

    model: str
    version: int
    folder: Path
    """Where the artifact and its data files lie, and proof.json beside them."""
    artifact: str
    """The file that is loaded, relative to the folder."""
    candidate: str = ""
    """Empty for the model's own artifact."""
    target: str = ""
    """A candidate's; an own artifact serves wherever it was proved."""
    backend: str = ""
    """That will serve it; empty where the artifact itself says so."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """What a candidate's record says of it and its proof must say too: `options`, `key`, `source_sha256`."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """Files outside the folder that belong to the artifact: name relative to the folder -> path."""
    shelved: Path | None = None
    """Of an own artifact: a second folder where proof.json may lie, which this node can write to."""

    def __str__(self) -> str:
        own = f"model '{self.model}' version {self.version}"
        return f"{own}, candidate '{self.candidate}' for {self.target}" if self.candidate else own

    def files(self) -> dict[str, Path]:
        """Everything that makes the artifact what it is: name relative to the folder -> path.

        Raises ModelError for what cannot be part of an artifact, or cannot be read.
        """
        try:
            return {**artifact_files(self.folder), **self.beside}
        except OSError as error:
            raise self._unreadable(error) from error

    def digest(self) -> str:
        """SHA-256 of `files`; see proof/digest.py. Raises ModelError where it cannot be told."""
        return self.digest_of(self.files())

    def digest_of(self, files: Mapping[str, Path]) -> str:
        """The same of `files` that were listed already. Raises ModelError."""
        try:
            return digest(files)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(
            f"the files of {self} cannot be read: {error}", hint="restore them, or mend their permissions"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact may be believed, and why not."""

    state: State
    reason: str = ""
    hint: str = ""
    proof: Proof | None = None
    """As it was read, believed or not."""
    folder: Path | None = None
    """Where the proof lies; None where there is none."""
    signers: tuple[str, ...] = ()
    """Ids of the trusted keys that signed."""
    failed_gate: bool = False
    """Refused, and only because the proof says so itself: nothing was tampered with."""


def verify(subject: Subject, keyring: Keyring) -> Verdict:
    """Hold an artifact against its proof.

    `refused`: the proof cannot be read, was changed, speaks of something else, or says that its gate failed; never
    serve it. `unproved`: there is no proof, or none that a trusted key has signed. Where what lies beside
    the artifact is not enough, the proof on the shelf counts.
    """
    found = _verify_in(subject.folder, subject, keyring)
    if found.state != "unproved" or subject.shelved is None:
        return found
    shelved = _verify_in(subject.shelved, subject, keyring)
    return found if shelved.folder is None else shelved


def _verify_in(folder: Path, subject: Subject, keyring: Keyring) -> Verdict:
    """What the proof in a folder is worth."""
    path = folder / PROOF
    try:
        verdict = _weigh(path, read_proof(path), subject, keyring)
    except FileNotFoundError:
        return Verdict("unproved", f"there is no {PROOF}", _prove(subject))
    except ModelError as error:
        verdict = Verdict("refused", error.message, error.hint)
    return replace(verdict, folder=folder)


def _weigh(path: Path, proof: Proof, subject: Subject, keyring: Keyring) -> Verdict:
    """What a proof that can be read is worth."""
    keys, faults = keyring.read() if proof.signatures else ({}, [])
    trust = check(proof, keys)
    refusal = _changed(path, trust) or _misplaced(path, proof, subject) or _replaced(path, proof, subject)
    if refusal is not None:
        return Verdict("refused", refusal.message, refusal.hint, proof)
    if not (proof.passed and proof.executed):
        return _failed(path, proof)
    if not trust.trusted:
        return _untrusted(proof, faults, subject)
    if subject.backend and proof.backend != subject.backend:
        reason = f"'{path}' is of backend '{proof.backend}'; it is to be served by '{subject.backend}'"
        return Verdict("unproved", reason, _prove(subject), proof)
    return Verdict("proved", proof=proof, signers=tuple(key.id for key in trust.trusted))


def _changed(path: Path, trust: Trust) -> ModelError | None:
    """A signature by a known key that does not fit."""
    if not trust.false:
        return None
    return ModelError(
        f"'{path}': the signature by key {trust.false[0].key} does not fit; the proof was changed after it was signed",
        hint="take proof and artifact from where they were proved, or prove the artifact anew",
    )


def _misplaced(path: Path, proof: Proof, subject: Subject) -> ModelError | None:
    """A proof that lies with something else than it speaks of."""
    here: dict[str, Any] = {
        "model": subject.model,
        "version": subject.version,
        "candidate": subject.candidate,
        "artifact": subject.artifact,
    }
    if subject.candidate:
        here |= {"target": subject.target, "backend": subject.backend, **subject.made}
    for key, value in here.items():
        if getattr(proof, key) != value:
            text = f"'{path}' is of {key} {getattr(proof, key)!r}; it lies with {value!r}"
            return ModelError(text, hint=_remedy(path, subject))
    return None


def _replaced(path: Path, proof: Proof, subject: Subject) -> ModelError | None:
    """An artifact that is not the one that was proved."""
    try:
        files = subject.files()
        found = subject.digest_of(files)
    except ModelError as error:
        return error
    artifact = subject.folder / subject.artifact
    if subject.artifact not in files:
        return ModelError(f"'{artifact}' is not there, or not in its folder", hint=f"restore it beside '{path}'")
    if found == proof.sha256:
        return None
    more = f" with {len(files) - 1} more files" if len(files) > 1 else ""
    return ModelError(
        f"'{artifact}'{more} is not what was proved: its SHA-256 is {found[:SHOWN_DIGITS]}…, "
        f"'{path}' says {proof.sha256[:SHOWN_DIGITS]}…",
        hint=_remedy(path, subject),
    )


def _prove(subject: Subject) -> str:
    """How an artifact comes to a proof by this node."""
    if subject.candidate:
        return f"millhand model build {subject.model} makes candidates and proves them on this node"
    return f"millhand model prove {subject.model} measures it on this node and signs"


def _remedy(path: Path, subject: Subject) -> str:
    if subject.candidate:
        return f"millhand model build {subject.model} makes the candidate anew"
    if path.parent == subject.shelved:
        return f"restore it; where the change was meant, millhand model prove {subject.model}"
    return f"restore it from where it was proved; where the change was meant, remove {PROOF}"


def _failed(path: Path, proof: Proof) -> Verdict:
    """A proof that speaks against its artifact."""
    what = "the gate failed" if proof.executed else "it was never run"
    why = "; ".join(proof.reasons)
    hint = "serve another candidate or version, or mend this one"
    return Verdict("refused", f"'{path}': {what}" + (f": {why}" if why else ""), hint, proof, failed_gate=True)


def _untrusted(proof: Proof, faults: list[ModelError], subject: Subject) -> Verdict:
    """A proof that speaks for its artifact, and that nobody vouches for."""
    if not proof.signatures:
        return Verdict("unproved", f"its {PROOF} is not signed", _prove(subject), proof)
    keys = ", ".join(f"{signature.key} ({signature.role})" for signature in proof.signatures)
    reason = f"its {PROOF} is signed only by keys that this node does not trust: {keys}"
    reason += "".join(f"; {fault.message}" for fault in faults)
    hint = f"name the key's public file in [models] trusted_keys; or {_prove(subject)}"
    return Verdict("unproved", reason, faults[0].hint if faults else hint, proof)
