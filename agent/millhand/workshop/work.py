"""One model version and one target: what a build works on, and how a maker is set to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from millhand.errors import InputError, ModelError
from millhand.proof.digest import artifact_files, digest
from millhand.proof.document import RECORD
from millhand.serving.lanes import LoadRequest
from millhand.serving.repository import ModelFolder
from millhand.workshop.jobs import MakeJob, Trial, save_rows
from millhand.workshop.plan import Offer
from millhand.workshop.process import Line
from millhand.workshop.recipe import Made, Target
from millhand.workshop.rows import Rows
from millhand.workshop.shelf import Candidate, Record
from millhand.workshop.site import Site

ONNX = ".onnx"
Progress = Callable[[float, str], None]
"""Told a share of 0 to 1, and the step's name."""


@dataclass(frozen=True)
class Work:
    """What is built. Make one with `open_work`."""

    site: Site
    folder: ModelFolder
    version: int
    target: Target
    request: LoadRequest
    """The load of the model's own artifact."""
    source_sha256: str
    source_bytes: int
    typical_batch: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def place(self) -> Path:
        """Where the candidates lie."""
        return self.site.shelf.place(self.name, self.version, self.target.name)

    def trial(self, rows: Rows, scratch: Path, held: bool) -> Trial:
        """What candidates are measured by: on the held rows, or on those that makers may try their work on."""
        path = scratch / ("held.npz" if held else "trial.npz")
        if not path.exists():
            save_rows(path, *((rows.held, rows.truth) if held else (rows.trial, rows.trial_truth)))
        return Trial(
            original=self.request,
            backends=self.site.backends(),
            metric=rows.metric,
            rows=str(path),
            limit_percent=self.site.config.workshop.drop_percent_cap,
        )

    def make(
        self,
        offer: Offer,
        source: Candidate | None,
        rows: Rows | None,
        scratch: Path,
        folder: Path,
        deadline_s: float,
        progress: Progress,
    ) -> Record:
        """Have a maker write a candidate into an empty folder, and its record beside it. Raises MillhandError."""
        calibration = ""
        if offer.recipe.calibrated:
            if rows is None:
                raise InputError("it needs rows to calibrate with, and there are none", hint="give them with --data")
            calibration = str(scratch / "calibration.npz")
            if not Path(calibration).exists():
                save_rows(Path(calibration), rows.calibration)
        job = MakeJob(
            plugin=offer.plugin,
            maker=offer.maker,
            recipe=offer.recipe,
            model=str(source.artifact if source else self.folder.artifact(self.version)),
            folder=str(folder),
            target=self.target,
            inputs=self.request.inputs,
            calibration=calibration,
            max_batch=self.request.max_batch,
            typical_batch=self.typical_batch,
            cache=str(self.site.shelf.cache(self.target.name)),
            trial=self.trial(rows, scratch, held=False) if rows and self.target.runs_here else None,
        )
        runner = self.site.runner(self.target, len(os.sched_getaffinity(0)), deadline_s)
        made = runner.run(job, Made, on_line=told(progress))
        record = Record(
            recipe=offer.recipe,
            maker=offer.maker,
            made=made,
            source_sha256=self.source_sha256,
            sha256=digest(artifact_files(folder)),
            began_sha256=source.record.sha256 if source else "",
            options_sha256=offer.options_sha256,
            date=now(),
        )
        (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        return record


def open_work(site: Site, name: str, version: int | None, target: Target, typical_batch: int) -> Work:
    """As `describe_work`; raises ModelError too where the model is none that makers can begin from."""
    folder = site.repository.find(name)
    if folder.manifest.steps:
        steps = ", ".join(step.model for step in folder.manifest.steps if step.model) or "its steps' nets"
        raise ModelError(
            f"model '{name}' is an ensemble: it has no artifact of its own to build from", hint=f"build {steps}"
        )
    if Path(folder.manifest.artifact).suffix != ONNX:
        raise ModelError(
            f"model '{name}': makers begin from {ONNX} files, not from '{folder.manifest.artifact}'",
            hint="export the model to ONNX and name it as `artifact` in model.toml",
        )
    return describe_work(site, name, version, target, typical_batch)


def describe_work(site: Site, name: str, version: int | None, target: Target, typical_batch: int) -> Work:
    """One version of any model, an ensemble's too; None takes the newest that its policy serves. Raises ModelError
    where it is not there."""
    folder = site.repository.find(name)
    number = folder.chosen()[-1] if version is None else version
    if number not in folder.versions:
        known = ", ".join(map(str, folder.versions))
        raise ModelError(f"model '{name}' has no version {number}", hint=f"its folder holds {known}")
    request = site.request(folder, number, target)
    return Work(
        site=site,
        folder=folder,
        version=number,
        target=target,
        request=request,
        source_sha256=folder.digest(number),
        source_bytes=folder.size_bytes(number),
        typical_batch=max(1, min(typical_batch, request.max_batch)),
    )


def told(progress: Progress, first: float = 0.0, last: float = 1.0) -> Callable[[Line], None]:
    """Pass a job's progress on, as a part of a whole."""

    def take(line: Line) -> None:
        if "share" in line:
            progress(first + (last - first) * float(line["share"]), str(line.get("step", "")))

    return take


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
