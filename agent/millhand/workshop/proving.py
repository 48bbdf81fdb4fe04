"""From a candidate on the shelf to its signed proof: judged, weighed, held against the gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from millhand import __version__
from millhand.errors import MillhandError, ModelError
from millhand.hardware.telemetry import Sampler
from millhand.proof.document import PROOF, Layer, Proof, Score
from millhand.proof.file import read_proof, write_proof
from millhand.proof.keys import PrivateKey
from millhand.proof.signature import check, sign
from millhand.workshop.energy import Meter
from millhand.workshop.gate import verdict
from millhand.workshop.jobs import AnyJob, JudgeAnswer, JudgeJob, WeighJob
from millhand.workshop.judge import candidate_request
from millhand.workshop.process import Answer, JobRunner, Line
from millhand.workshop.rows import Rows
from millhand.workshop.shelf import Candidate
from millhand.workshop.work import Progress, Work, now, told

JUDGED = 0.9
"""Share of the work after which only the memory is measured."""


@dataclass
class Prover:
    """Proves the candidates of one build."""

    work: Work
    rows: Rows | None
    """None where the target is not in this machine."""
    scratch: Path
    key: PrivateKey
    versions: dict[str, str]
    """Of what jobs run with."""
    original_memory_bytes: int | None = field(default=None, init=False)

    def prove(self, candidate: Candidate, deadline_s: float, progress: Progress) -> Proof:
        """Judge a candidate and write its proof beside it. Raises MillhandError where it crashes, hangs or fails."""
        proof = self._judged(candidate, deadline_s, progress) if self.work.target.runs_here else self._built(candidate)
        signed = sign(proof, self.key, "node")
        write_proof(candidate.folder, signed)
        return signed

    def holds(self, candidate: Candidate, same_rows: bool = True) -> Proof | None:
        """A candidate's proof, where it says of this artifact on this node what judging it again would say; else None.

        same_rows: also those that it was judged on, the batch sizes and the gate's limit.
        """
        try:
            proof = read_proof(candidate.folder / PROOF)
        except (MillhandError, FileNotFoundError):
            return None
        public = self.key.public
        settings = self.work.site.config.workshop
        fits = (
            check(proof, {public.id: public}).trusted
            and proof.sha256 == candidate.record.sha256
            and proof.executed == self.work.target.runs_here
            and proof.node == self.work.site.facts(self.work.target)
            and proof.versions == self._versions()
        )
        if fits and same_rows and proof.executed:
            assert proof.score is not None
            fits = (
                self.rows is not None
                and proof.score.data == self.rows.source
                and proof.score.limit_percent == settings.drop_percent_cap
                and tuple(latency.batch for latency in proof.latency) == batches(self.work)
            )
        return proof if fits else None

    def _judged(self, candidate: Candidate, deadline_s: float, progress: Progress) -> Proof:
        assert self.rows is not None
        work, made = self.work, candidate.record.made
        trial = work.trial(self.rows, self.scratch, held=True)
        runner = work.site.runner(work.target, 1, deadline_s)

        def job(energy: bool) -> JudgeJob:
            return JudgeJob(
                trial=trial,
                artifact=str(candidate.artifact),
                backend=made.backend,
                options=made.options,
                batches=batches(work),
                latency_s=work.site.config.workshop.latency_s,
                energy=energy,
            )

        answer, energy_mj = metered(work, runner, job, JudgeAnswer, progress)
        progress(JUDGED, "weighing")
        if self.original_memory_bytes is None:
            self.original_memory_bytes = runner.run(WeighJob(request=trial.original), int)
        request = candidate_request(trial.original, str(candidate.artifact), made.backend, made.options, trial.backends)
        measured = answer.measured
        score = Score(
            metric=self.rows.metric.name,
            higher_is_better=self.rows.metric.higher_is_better,
            original=measured.original,
            candidate=measured.candidate,
            drop_percent=measured.drop_percent,
            limit_percent=trial.limit_percent,
            rows=answer.rows,
            data=self.rows.source,
        )
        passed, reasons = verdict(score)
        return msgspec.structs.replace(
            self._bare(candidate),
            executed=True,
            score=score,
            latency=answer.latency,
            memory_bytes=runner.run(WeighJob(request=request), int),
            original_memory_bytes=self.original_memory_bytes,
            energy_mj=energy_mj,
            passed=passed,
            reasons=reasons,
        )

    def _built(self, candidate: Candidate) -> Proof:
        """What can be said of a candidate for hardware that is not here."""
        target = self.work.target.name
        why = f"It was built for {target} and has never run: 'millhand model build' proves it on a node with that chip."
        return msgspec.structs.replace(self._bare(candidate), reasons=(why,))

    def _bare(self, candidate: Candidate) -> Proof:
        work, record = self.work, candidate.record
        try:
            layers = msgspec.convert(record.made.layers, tuple[Layer, ...])
        except msgspec.ValidationError as error:
            raise ModelError(f"maker '{record.maker}' described a layer wrongly: {error}", hint="report it") from error
        return Proof(
            model=work.name,
            version=work.version,
            candidate=candidate.name,
            target=work.target.name,
            precision=record.recipe.precision,
            artifact=record.made.artifact,
            sha256=record.sha256,
            source_sha256=record.source_sha256,
            bytes=candidate.bytes,
            source_bytes=work.source_bytes,
            backend=record.made.backend,
            options=record.made.options,
            key=record.made.key,
            executed=False,
            layers=layers,
            notes=record.made.notes,
            passed=False,
            node=work.site.facts(work.target),
            versions=self._versions(),
            date=now(),
        )

    def _versions(self) -> dict[str, str]:
        return {"millhand": __version__, **self.versions}


def batches(work: Work) -> tuple[int, ...]:
    """The sizes that are timed: one row, what traffic brings most often, and the most."""
    return tuple(sorted({1, work.typical_batch, work.request.max_batch}))


def metered(
    work: Work, runner: JobRunner, job: Callable[[bool], AnyJob], answer: type[Answer], progress: Progress
) -> tuple[Answer, float | None]:
    """Run a job that measures, while its inference's energy is read where the board has a meter.

    job: makes it, told whether there is a meter. Returns (answer, millijoules an inference or None).
    """
    sampler = Sampler()
    try:
        meter = Meter(sampler, work.target.accelerator)
        report = told(progress, 0, JUDGED)

        def take(line: Line) -> None:
            meter.take(line)
            report(line)

        found = runner.run(job(meter.reads), answer, on_line=take, on_tick=meter.tick)
        return found, meter.energy_mj
    finally:
        sampler.close()


def read_if_there(folder: Path) -> Proof | None:
    """The proof in a folder, believed or not; None where there is none that can be read."""
    with contextlib.suppress(MillhandError, FileNotFoundError):
        return read_proof(folder / PROOF)
    return None
