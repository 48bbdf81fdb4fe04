"""`millhand model build` of a language model: other precisions of its GGUF file, each proved beside it on this node.

Speed is measured in turn, one request to the original, one to the candidate, so that a load of the machine meanwhile
falls on both. In a proof a batch of 1 is one token written, a batch of more a prompt of so many tokens read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from millhand import __version__
from millhand.errors import InputError, MillhandError, ModelError
from millhand.language.fitting import gib
from millhand.language.library import VERSION, LanguageModel
from millhand.language.measuring import Text, held_text, open_bench
from millhand.language.requantise import PRECISIONS, requantise
from millhand.language.sources import free_bytes
from millhand.language.way_proof import prove_way
from millhand.proof.digest import artifact_files, digest
from millhand.proof.document import PROOF, RECORD, Latency, Proof, Score
from millhand.proof.file import read_proof, write_proof
from millhand.proof.keys import PrivateKey, node_key
from millhand.proof.signature import check, sign
from millhand.workshop.gate import choose, verdict
from millhand.workshop.listener import Listener
from millhand.workshop.metric import PERPLEXITY
from millhand.workshop.recipe import CPU, Made, Recipe, Target
from millhand.workshop.report import BuildReport, Outcome, write_report
from millhand.workshop.shelf import Candidate, Choice, Record
from millhand.workshop.site import Site
from millhand.workshop.work import now

MAKER = "gguf"
RESERVE_BYTES = 256 << 20
PACKAGES = ("gguf", "numpy", "xllamacpp")


def build_precisions(
    site: Site,
    model: LanguageModel,
    listener: Listener,
    *,
    only: Sequence[str] = (),
    data: Path | None = None,
    fresh: bool = False,
) -> BuildReport:
    """Make and prove what was asked for (all, where nothing was), and choose what serves.

    Raises MillhandError where nothing can be built: another form than GGUF, no server, no text, another build of it.
    """
    _check(model, only)
    target = own_target(site)
    try:
        with (
            site.shelf.claimed(model.name),
            site.shelf.scratch(model.name, VERSION, target.name) as scratch,
        ):
            return _Build(site, model, target, held_text(data), scratch, listener, fresh).run(only)
    except OSError as error:
        raise site.shelf.unwritable(error) from error


def _check(model: LanguageModel, only: Sequence[str]) -> None:
    """Raises ModelError, InputError where nothing can be made."""
    if model.manifest.format != "gguf" or model.manifest.embeddings:
        what = "embeds" if model.manifest.embeddings else f"is in the form '{model.manifest.format}'"
        raise ModelError(
            f"language model '{model.name}' {what}: precisions are made of GGUF files of models that answer",
            hint=f"millhand model add {model.name} SOURCE --precision F16 --replace",
        )
    unknown = [name for name in only if name not in PRECISIONS]
    if unknown:
        raise InputError(f"precision '{unknown[0]}' cannot be made", hint=f"give one of {', '.join(PRECISIONS)}")


def own_target(site: Site) -> Target:
    """Where a language model serves on this node."""
    return site.targets.get(site.match.worker.accelerator) or site.targets[CPU]


def source_digest(model: LanguageModel) -> str:
    """SHA-256 of the model's file. Raises ModelError where it is not the one that was added."""
    name = model.manifest.file.as_posix()
    found = digest({name: model.path})
    wanted = model.manifest.sha256.get(name, found)
    if found != wanted:
        raise ModelError(
            f"'{model.path}' is not what was added: its SHA-256 is {found[:12]}…, language.toml says {wanted[:12]}…",
            hint=f"millhand model add {model.name} {model.manifest.source} --replace",
        )
    return found


@dataclass
class _Build:
    """One build. Original and candidate run side by side, each alone when it is asked."""

    site: Site
    model: LanguageModel
    target: Target
    text: Text
    scratch: Path
    listener: Listener
    fresh: bool
    outcomes: list[Outcome] = field(default_factory=list)
    proofs: dict[str, Proof] = field(default_factory=dict)
    _original: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        self.bench = open_bench(self.site, self.target, self.scratch)
        self.source_sha256 = source_digest(self.model)
        self.source_bytes = self.model.weights_bytes
        self.key: PrivateKey = node_key(self.site.config.node.data_dir)
        self.where = self.model.name, VERSION, self.target.name

    def run(self, only: Sequence[str]) -> BuildReport:
        names = [name for name in PRECISIONS if name != self.model.manifest.precision and (not only or name in only)]
        self.listener.planned(names)
        for name in names:
            self._try(name)
        settings = self.site.config.workshop
        chosen, why = choose(self.proofs, self.source_bytes, 1, settings)
        why = why.replace("at batches of 1", "at writing a token")
        shelf = self.site.shelf
        shelf.choose(*self.where, Choice(candidate=chosen, source_sha256=self.source_sha256, why=why, date=now()))
        report = BuildReport(
            model=self.model.name,
            version=VERSION,
            target=self.target.name,
            executed=True,
            source_sha256=self.source_sha256,
            source_bytes=self.source_bytes,
            typical_batch=1,
            data=self.text.source,
            outcomes=tuple(self.outcomes),
            chosen=chosen,
            why=why,
            ways=self._ways(),
            date=now(),
        )
        write_report(shelf.place(*self.where), report)
        return report

    def _ways(self) -> tuple[str, ...]:
        """How what serves now is served best, and what else was tried."""
        site, listener = self.site, self.listener
        try:
            return prove_way(
                site,
                self.model,
                self.target,
                self.bench,
                self.text.text,
                self.fresh,
                lambda way: listener.progress("way", 0.0, way),
            )
        except MillhandError as error:
            return (f"How it is served best was not found out: {error.message}.",)

    def _try(self, name: str) -> None:
        """Make and prove one; what goes wrong is its outcome."""
        started_s = time.monotonic()
        made = False
        try:
            if refusal := self._no_room(name):
                self._tell(Outcome(name=name, precision=name, state="not tried", why=refusal))
                return
            candidate = None if self.fresh else self._on_shelf(name)
            if candidate is None:
                made, candidate = True, self._make(name)
            proof = self._holds(candidate) or self._prove(candidate)
        except MillhandError as error:
            minutes = (time.monotonic() - started_s) / 60
            why = {"why": error.message, "hint": error.hint}
            self._tell(Outcome(name=name, precision=name, state="failed", made=made, minutes=minutes, **why))
            return
        self.proofs[name] = proof
        self._tell(
            Outcome(
                name=name,
                precision=name,
                state="passed" if proof.passed else "refused",
                why=proof.reasons[0],
                made=made,
                minutes=(time.monotonic() - started_s) / 60,
            )
        )

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.listener.outcome(outcome)

    def _no_room(self, name: str) -> str:
        """Why a precision cannot be tried here; empty where it can."""
        size = int(self.model.manifest.parameters * PRECISIONS[name].bits / 8)
        free = free_bytes(self.scratch) - RESERVE_BYTES
        if size > free:
            return f"it would take {gib(size)} on disk, {gib(max(0, free))} are free"
        if self.target.memory_bytes and size + self.source_bytes > self.target.memory_bytes:
            both, there = gib(size + self.source_bytes), gib(self.target.memory_bytes)
            return f"beside the original it would take {both} of memory, of {there}"
        return ""

    def _on_shelf(self, name: str) -> Candidate | None:
        for candidate in self.site.shelf.candidates(*self.where):
            record = candidate.record
            if (candidate.name, record.maker, record.source_sha256) == (name, MAKER, self.source_sha256):
                whole = digest(artifact_files(candidate.folder)) == record.sha256
                return candidate if whole else None
        return None

    def _make(self, name: str) -> Candidate:
        with self.site.shelf.staged(*self.where, name) as folder:
            artifact = f"{self.model.name}-{name}.gguf"
            change = requantise(
                self.model.path,
                folder / artifact,
                name,
                lambda step, done, total: self.listener.progress(name, 0.3 * done / max(1, total), step),
            )
            made = Made(artifact=artifact, backend=self.bench.server.name, notes=(change.note,))
            record = Record(
                recipe=Recipe(name=name, precision=name, description=f"The weights in {name}."),
                maker=MAKER,
                made=made,
                source_sha256=self.source_sha256,
                sha256=digest(artifact_files(folder)),
                date=now(),
            )
            (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        return self.site.shelf.find(*self.where, name)

    def _holds(self, candidate: Candidate) -> Proof | None:
        """The proof that is there, where measuring again would say the same."""
        with contextlib.suppress(MillhandError, FileNotFoundError):
            proof = read_proof(candidate.folder / PROOF)
            public = self.key.public
            fits = (
                check(proof, {public.id: public}).trusted
                and proof.sha256 == candidate.record.sha256
                and proof.node == self.site.facts(self.target)
                and proof.versions == package_versions()
                and proof.score is not None
                and proof.score.data == self.text.source
                and proof.score.limit_percent == self.site.config.workshop.drop_percent_cap
            )
            return proof if fits else None
        return None

    def _prove(self, candidate: Candidate) -> Proof:
        tell = self.listener.progress
        tell(candidate.name, 0.3, "measuring speed")
        latency, memory = self.bench.speed(self.model.path, candidate.artifact, self.text.text)
        if self._original is None:
            tell(candidate.name, 0.5, "perplexity of the original")
            self._original = self.bench.perplexity(
                self.model.path, self.text.text, lambda share: tell(candidate.name, 0.5 + 0.24 * share, "perplexity")
            )
        tell(candidate.name, 0.75, "perplexity")
        value, _ = self.bench.perplexity(
            candidate.artifact, self.text.text, lambda share: tell(candidate.name, 0.75 + 0.24 * share, "perplexity")
        )
        original, tokens = self._original
        score = Score(
            metric=PERPLEXITY,
            higher_is_better=False,
            original=original,
            candidate=value,
            drop_percent=100.0 * (value - original) / original,
            limit_percent=self.site.config.workshop.drop_percent_cap,
            rows=tokens,
            data=self.text.source,
        )
        passed, reasons = verdict(score)
        record = candidate.record
        proof = Proof(
            model=self.model.name,
            version=VERSION,
            candidate=candidate.name,
            target=self.target.name,
            precision=record.recipe.precision,
            artifact=record.made.artifact,
            sha256=record.sha256,
            source_sha256=self.source_sha256,
            bytes=candidate.bytes,
            source_bytes=self.source_bytes,
            backend=record.made.backend,
            executed=True,
            score=score,
            latency=latency,
            memory_bytes=memory[1],
            original_memory_bytes=memory[0],
            notes=(*record.made.notes, f"The original is in {self.model.manifest.precision}.", _speed_note(latency)),
            passed=passed,
            reasons=reasons,
            node=self.site.facts(self.target),
            versions=package_versions(),
            date=now(),
        )
        signed = sign(proof, self.key, "node")
        write_proof(candidate.folder, signed)
        return signed


def _speed_note(latency: Sequence[Latency]) -> str:
    """Times as people speak of them."""
    one, many = latency
    return (
        f"{1e3 / one.p50_ms:.3g} tokens/s written and {1e3 * many.batch / many.p50_ms:.3g} read, the original "
        f"{1e3 / one.original_p50_ms:.3g} and {1e3 * many.batch / many.original_p50_ms:.3g}: a batch of 1 is a token "
        f"that is written, one of {many.batch} a prompt that is read."
    )


def package_versions() -> dict[str, str]:
    """Of what measures; another one makes a proof worth making again."""
    found = {"millhand": __version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
