"""The proof of a model's own artifact, an ensemble's too: it is measured alone on this node, and signed.

It lies on the shelf, not beside the artifact: shipped models lie in a package that must not be written to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from millhand import __version__
from millhand.errors import ConfigError, InputError, MillhandError
from millhand.proof.document import PROOF, Proof, Score
from millhand.proof.file import read_proof, write_proof
from millhand.proof.keys import PrivateKey, node_key
from millhand.proof.signature import check, sign
from millhand.proof.verification import SHOWN_DIGITS
from millhand.workshop.gathering import gather
from millhand.workshop.jobs import MeasureAnswer, MeasureJob, WeighJob
from millhand.workshop.listener import Listener
from millhand.workshop.proving import JUDGED, batches, metered
from millhand.workshop.recipe import Target
from millhand.workshop.rows import Rows
from millhand.workshop.site import Site
from millhand.workshop.work import Progress, Work, describe_work, now, told


@dataclass(frozen=True)
class OriginalProver:
    """Proves the own artifact of one model's version."""

    work: Work
    rows: Rows
    scratch: Path
    key: PrivateKey

    @property
    def folder(self) -> Path:
        """Where the proof lies."""
        return self.work.site.shelf.original(self.work.name, self.work.version)

    def prove(self, deadline_s: float, progress: Progress) -> Proof:
        """Measure and sign. Raises MillhandError where the model cannot run, or gives numbers that are not finite."""
        proof = sign(self._measured(deadline_s, progress), self.key, "node")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_proof(self.folder, proof)
        return proof

    def holds(self, versions: dict[str, str]) -> Proof | None:
        """The proof that is there, where measuring again with these versions would say the same; else None."""
        try:
            proof = read_proof(self.folder / PROOF)
        except (MillhandError, FileNotFoundError):
            return None
        public = self.key.public
        fits = (
            check(proof, {public.id: public}).trusted
            and proof.sha256 == self.work.source_sha256
            and proof.node == self.work.site.facts(self.work.target)
            and proof.versions == _versions(versions)
            and (proof.score.data == self.rows.source if proof.score else _told_rows(self.rows) in proof.notes)
            and tuple(latency.batch for latency in proof.latency) == batches(self.work)
        )
        return proof if fits else None

    def _measured(self, deadline_s: float, progress: Progress) -> Proof:
        work, rows = self.work, self.rows
        trial = work.trial(rows, self.scratch, held=True)
        runner = work.site.runner(work.target, 1, deadline_s)

        def job(energy: bool) -> MeasureJob:
            latency_s = work.site.config.workshop.latency_s
            return MeasureJob(trial=trial, batches=batches(work), latency_s=latency_s, energy=energy)

        answer, energy_mj = metered(work, runner, job, MeasureAnswer, progress)
        progress(JUDGED, "weighing")
        memory_bytes = runner.run(WeighJob(request=trial.original), int)
        subject = work.folder.subject(work.version)
        size = sum(path.stat().st_size for path in subject.files().values())
        return Proof(
            model=work.name,
            version=work.version,
            target=work.target.name,
            precision="",
            artifact=subject.artifact,
            sha256=work.source_sha256,
            bytes=size,
            source_bytes=size,
            backend=subject.backend,
            executed=True,
            score=_score(rows, answer, trial.limit_percent),
            latency=answer.latency,
            memory_bytes=memory_bytes,
            original_memory_bytes=memory_bytes,
            energy_mj=energy_mj,
            passed=True,
            reasons=(_reason(rows, answer),),
            notes=(*(() if answer.value is not None else (_told_rows(rows),)), *_parts(work)),
            node=work.site.facts(work.target),
            versions=_versions(answer.versions),
            date=now(),
        )


def prove_model(
    site: Site,
    name: str,
    target: Target,
    listener: Listener,
    version: int | None = None,
    data: Path | None = None,
    typical_batch: int = 1,
) -> Proof:
    """Prove a model as it is, and before it what is not proved of the models that an ensemble uses.

    data: the owner's rows for the model itself. Raises MillhandError where there is nothing to measure it by, or it
    fails.
    """
    if not target.runs_here:
        raise ConfigError(f"target '{target.name}' is not in this machine", hint="prove it on a node that has it")
    work = describe_work(site, name, version, target, typical_batch)
    for part, number in reversed(site.repository.parts(work.folder, work.version)[1:]):
        if site.repository.verdict(part, number).state != "proved":
            _prove_part(describe_work(site, part.name, number, target, typical_batch), name, listener)
    return _prove(work, data, listener)


def _prove(work: Work, data: Path | None, listener: Listener) -> Proof:
    site = work.site

    def progress(share: float, step: str) -> None:
        listener.progress(work.name, share, step)

    try:
        with site.shelf.claimed(work.name), site.shelf.scratch(work.name, work.version, work.target.name) as scratch:
            rows = gather(site, work.folder.manifest, data, scratch, told(progress))
            prover = OriginalProver(work, rows, scratch, node_key(site.config.node.data_dir))
            return prover.prove(site.config.workshop.deadline_s, progress)
    except OSError as error:
        raise site.shelf.unwritable(error) from error


def _prove_part(work: Work, user: str, listener: Listener) -> None:
    """Prove a model that an ensemble uses, by the rows that there are of its own inputs."""
    try:
        _prove(work, None, listener)
    except InputError as error:
        raise InputError(
            f"model '{work.name}', which '{user}' uses, is not proved: {error.message}",
            hint=f"first millhand model prove {work.name} --data FILE",
        ) from error


def _score(rows: Rows, answer: MeasureAnswer, limit_percent: float) -> Score | None:
    """None without a truth: an agreement with itself would say nothing."""
    if answer.value is None:
        return None
    return Score(
        metric=rows.metric.name,
        higher_is_better=rows.metric.higher_is_better,
        original=answer.value,
        candidate=answer.value,
        drop_percent=0.0,
        limit_percent=limit_percent,
        rows=answer.rows,
        data=rows.source,
    )


def _reason(rows: Rows, answer: MeasureAnswer) -> str:
    if answer.value is None:
        return f"It ran on {answer.rows} rows and gave finite numbers; how right they are is not known without a truth."
    metric = "RMSE" if rows.metric.name == "rmse" else rows.metric.name
    return f"It ran on {answer.rows} rows and gave finite numbers; its {metric} is {answer.value:.4g}."


def _told_rows(rows: Rows) -> str:
    return f"Measured on rows of: {rows.source}"


def _parts(work: Work) -> tuple[str, ...]:
    """The models that an ensemble was measured with."""
    parts = work.site.repository.parts(work.folder, work.version)[1:]
    named = ", ".join(f"{part.name} version {number}, {part.digest(number)[:SHOWN_DIGITS]}…" for part, number in parts)
    return (f"Measured with the own artifacts of: {named}",) if named else ()


def _versions(versions: dict[str, str]) -> dict[str, str]:
    return {"millhand": __version__, **versions}
