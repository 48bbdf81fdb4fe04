"""What the workshop's processes do, one job each (see supervisor.py): list recipes, give rows, make, judge, weigh.

A job is one JSON argument; its lines on standard output are JSON too: `{"share": 0.4, "step": "calibrating"}` as it
goes on, and as the last one `{"done": ...}` or `{"error": {code, message, hint}}`. Arrays lie as .npz in the job's
folder. Python 3.10; heavy libraries are imported by the makers and backends alone.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before any backend: a node never phones home

import contextlib
import importlib
import inspect
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Union

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import MillhandError, ModelError, PluginError
from millhand.proof.document import Latency
from millhand.serving.lanes import LoadedModel, LoadRequest
from millhand.serving.tensors import Tensors
from millhand.workshop.judge import (
    ENERGY_S,
    PluginRef,
    answers,
    candidate_request,
    latency,
    latency_alone,
    opened,
    run_for,
)
from millhand.workshop.metric import Measured, Metric, measure, measure_alone
from millhand.workshop.recipe import Job, Judgement, Made, Recipe, Target

TRUTH = "truth"
INPUT, CALIBRATION = "input:", "calibration:"
"""What the names of inputs begin with in a job's .npz, so that none is taken for the truth."""
VERSIONED = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
MAKING_NICENESS = 10
"""What is made may take longer; requests to the node's models may not."""


class RecipesJob(msgspec.Struct, frozen=True, kw_only=True, tag="recipes"):
    """Answers RecipesAnswer."""

    plugin: PluginRef
    target: Target


class RecipesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the makers of one plugin can make, and the versions of what jobs run with."""

    makers: dict[str, tuple[Recipe, ...]]
    versions: dict[str, str]


class ExamplesJob(msgspec.Struct, frozen=True, kw_only=True, tag="examples"):
    """Writes `rows` and answers ExamplesAnswer. Runs in the agent's own interpreter, as the plugin does."""

    plugin: PluginRef
    model: str
    data: str | None
    rows: str


class ExamplesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    metric: str
    source: str


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate is measured by."""

    original: LoadRequest
    backends: dict[str, PluginRef]
    """Backend -> what brings it."""
    metric: Metric
    rows: str
    """.npz: the inputs, and `truth` but for agreement."""
    limit_percent: float


class MakeJob(msgspec.Struct, frozen=True, kw_only=True, tag="make"):
    """Answers Made."""

    plugin: PluginRef
    maker: str
    recipe: Recipe
    model: str
    folder: str
    target: Target
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    calibration: str
    """.npz; empty where the recipe needs none."""
    max_batch: int
    typical_batch: int
    cache: str
    trial: Trial | None


class JudgeJob(msgspec.Struct, frozen=True, kw_only=True, tag="judge"):
    """Answers JudgeAnswer."""

    trial: Trial
    artifact: str
    backend: str
    options: dict[str, Any]
    batches: tuple[int, ...]
    latency_s: float
    energy: bool
    """Whether to run for ENERGY_S alone, between two lines `{"energy": ...}`, while the caller reads the meter."""


class JudgeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    measured: Measured
    rows: int
    latency: tuple[Latency, ...]
    versions: dict[str, str]


class MeasureJob(msgspec.Struct, frozen=True, kw_only=True, tag="measure"):
    """Measures the trial's original alone. Answers MeasureAnswer."""

    trial: Trial
    batches: tuple[int, ...]
    latency_s: float
    energy: bool
    """As JudgeJob has it."""


class MeasureAnswer(msgspec.Struct, frozen=True, kw_only=True):
    value: float | None
    """Of the metric; None where no truth is known."""
    rows: int
    latency: tuple[Latency, ...]
    versions: dict[str, str]


class WeighJob(msgspec.Struct, frozen=True, kw_only=True, tag="weigh"):
    """Answers the bytes of memory that a load adds to a fresh process, or to the device."""

    request: LoadRequest


AnyJob = Union[RecipesJob, ExamplesJob, MakeJob, JudgeJob, MeasureJob, WeighJob]  # noqa: UP007 (evaluated on Python 3.10 too)
Say = Callable[..., None]


def work(argument: str, lines: IO[bytes]) -> int:
    """Do the job and say how it ended; returns the process's exit status."""

    def say(**line: Any) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")

    try:
        job = msgspec.json.decode(argument, type=AnyJob)
        say(done=_WORK[type(job)](job, say))
    except MillhandError as error:
        say(error=error.to_dict())
        return 1
    except InterruptedError:
        say(error=ModelError("it was told to end").to_dict())
        return 1
    except MemoryError:
        say(error=ModelError("it ran out of memory", hint="give it more memory, or a smaller max_batch").to_dict())
        return 1
    except Exception as error:
        traceback.print_exc()
        hint = "report this to the author of the plugin; -v shows more"
        say(error=ModelError(f"{type(error).__name__}: {error}", hint=hint).to_dict())
        return 1
    return 0


def _list_recipes(job: RecipesJob, say: Say) -> RecipesAnswer:
    makers = {maker.name: tuple(maker.recipes(job.target)) for maker in _items(job.plugin, "millhand_makers")}
    return RecipesAnswer(makers=makers, versions=versions())


def _give_examples(job: ExamplesJob, say: Say) -> ExamplesAnswer:
    evaluation = _named(job.plugin, "millhand_evaluations", "model", job.model)
    say(share=0.0, step="reading rows")
    examples = evaluation.examples(None if job.data is None else Path(job.data))
    arrays: dict[str, Any] = {f"{CALIBRATION}{name}": array for name, array in examples.calibration.items()}
    arrays |= {f"{INPUT}{name}": array for name, array in examples.held.items()}
    arrays[TRUTH] = np.asarray(examples.truth)
    np.savez(job.rows, **arrays)
    return ExamplesAnswer(metric=evaluation.metric, source=examples.source)


def _make(job: MakeJob, say: Say) -> Made:
    maker = _named(job.plugin, "millhand_makers", "name", job.maker)
    os.nice(MAKING_NICENESS)
    ended = _Ended()

    def progress(share: float, step: str) -> None:
        if ended:
            raise InterruptedError
        say(share=min(1.0, max(0.0, float(share))), step=str(step))

    judge = None if job.trial is None else _Judge(job.trial, Path(job.folder))
    made = maker.make(
        job.recipe,
        Job(
            model=Path(job.model),
            folder=Path(job.folder),
            target=job.target,
            inputs=job.inputs,
            calibration=load_rows(job.calibration)[0] if job.calibration else {},
            max_batch=job.max_batch,
            typical_batch=job.typical_batch,
            options=job.plugin.options,
            cache=Path(job.cache),
            progress=progress,
            judge=judge,
        ),
    )
    return checked_made(made, Path(job.folder))


def _judge(job: JudgeJob, say: Say) -> JudgeAnswer:
    trial = job.trial
    request = candidate_request(trial.original, job.artifact, job.backend, job.options, trial.backends)
    rows, truth = load_rows(trial.rows)
    batch = trial.original.max_batch
    with opened(trial.original) as original, opened(request) as candidate:
        before = answers(original, rows, batch, lambda share: say(share=0.3 * share, step="running the original"))
        after = answers(candidate, rows, batch, lambda share: say(share=0.3 + 0.3 * share, step="running it"))
        measured = measure(trial.metric, before, after, truth)
        times = _timed(job, say, lambda size: latency(original, candidate, rows, size, job.latency_s))
        _metered(job, say, candidate, rows)
    return JudgeAnswer(measured=measured, rows=_count(rows), latency=times, versions=versions())


def _measure(job: MeasureJob, say: Say) -> MeasureAnswer:
    rows, truth = load_rows(job.trial.rows)
    with opened(job.trial.original) as model:
        batch = job.trial.original.max_batch
        outputs = answers(model, rows, batch, lambda share: say(share=0.6 * share, step="running it"))
        value = measure_alone(job.trial.metric, outputs, truth)
        times = _timed(job, say, lambda size: latency_alone(model, rows, size, job.latency_s))
        _metered(job, say, model, rows)
    return MeasureAnswer(value=value, rows=_count(rows), latency=times, versions=versions())


def _timed(job: JudgeJob | MeasureJob, say: Say, time_batch: Callable[[int], Latency]) -> tuple[Latency, ...]:
    times = []
    for number, size in enumerate(job.batches):
        say(share=0.6 + 0.3 * number / len(job.batches), step=f"timing batches of {size}")
        times.append(time_batch(size))
    return tuple(times)


def _metered(job: JudgeJob | MeasureJob, say: Say, model: LoadedModel, rows: Tensors) -> None:
    if job.energy:
        say(share=0.9, step="reading the power meter", energy="begin")
        say(energy=run_for(model, rows, ENERGY_S))


def _count(rows: Tensors) -> int:
    return len(next(iter(rows.values())))


def _weigh(job: WeighJob, say: Say) -> int:
    with opened(job.request) as model:
        return model.memory_bytes


_WORK: Mapping[type, Callable[[Any, Say], Any]] = {
    RecipesJob: _list_recipes,
    ExamplesJob: _give_examples,
    MakeJob: _make,
    JudgeJob: _judge,
    MeasureJob: _measure,
    WeighJob: _weigh,
}


class _Judge:
    """Judges what a maker has written so far, on rows that are not those of the proof."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial = trial
        self._folder = folder
        self._rows: Tensors = {}
        self._truth: NDArray[Any] | None = None
        self._before: dict[str, NDArray[Any]] = {}

    def __call__(self, made: Made) -> Judgement:
        trial = self._trial
        batch = trial.original.max_batch
        if not self._before:
            self._rows, self._truth = load_rows(trial.rows)
            with opened(trial.original) as original:
                self._before = answers(original, self._rows, batch, _silent)
        checked_made(made, self._folder)
        artifact = str(self._folder / made.artifact)
        request = candidate_request(trial.original, artifact, made.backend, made.options, trial.backends)
        with opened(request) as candidate:
            after = answers(candidate, self._rows, batch, _silent)
        measured = measure(trial.metric, self._before, after, self._truth)
        passed = measured.drop_percent <= trial.limit_percent
        return Judgement(value=measured.candidate, drop_percent=measured.drop_percent, passed=passed)


def _silent(share: float) -> None:
    return


class _Ended:
    """True from SIGTERM on, which the caller sends some time before SIGKILL."""

    def __init__(self) -> None:
        self._ended = False
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, frame: object) -> None:
        self._ended = True

    def __bool__(self) -> bool:
        return self._ended


def checked_made(made: Made, folder: Path) -> Made:
    """Raises ModelError where a maker says that it wrote what is not there."""
    if not isinstance(made, Made) or Path(made.artifact).name != made.artifact:
        raise ModelError(f"the maker gave {made!r}, which names no file of its folder", hint="report it to its author")
    if not (folder / made.artifact).is_file():
        raise ModelError(f"the maker says that it wrote '{made.artifact}', which is not there", hint="report it")
    return made


def save_rows(path: Path, rows: Tensors, truth: NDArray[Any] | None = None) -> None:
    """Write inputs, and the truth where there is one, for a job."""
    arrays: dict[str, Any] = {f"{INPUT}{name}": array for name, array in rows.items()}
    if truth is not None:
        arrays[TRUTH] = truth
    np.savez(path, **arrays)


def load_rows(path: str) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """What `save_rows` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return _beginning(file, INPUT), file[TRUTH] if TRUTH in file.files else None


def load_examples(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], NDArray[Any]]:
    """(calibration rows, held rows, truth) that an ExamplesJob wrote."""
    with np.load(path, allow_pickle=False) as file:
        return _beginning(file, CALIBRATION), _beginning(file, INPUT), file[TRUTH]


def _beginning(file: Any, prefix: str) -> dict[str, NDArray[Any]]:
    return {name[len(prefix) :]: file[name] for name in file.files if name.startswith(prefix)}


def versions() -> dict[str, str]:
    """What this interpreter has that bears on the figures."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _items(plugin: PluginRef, hook_name: str) -> Iterator[Any]:
    """What a plugin's hook returns. Raises PluginError, whatever the plugin does."""
    try:
        hook = getattr(importlib.import_module(plugin.module), hook_name)
        found: Sequence[Any] = hook(SimpleNamespace(**plugin.options)) if inspect.signature(hook).parameters else hook()
        yield from found
    except MillhandError:
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise PluginError(
            f"plugin '{plugin.module}' failed in {hook_name}: {type(error).__name__}: {error}",
            hint="install what it needs for the workers' interpreter, or report this to its author",
        ) from error


def _named(plugin: PluginRef, hook: str, attribute: str, name: str) -> Any:
    for item in _items(plugin, hook):
        if getattr(item, attribute) == name:
            return item
    raise PluginError(f"plugin '{plugin.module}' brings nothing for '{name}' in {hook}", hint="look at its version")
