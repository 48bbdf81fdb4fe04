"""An ensemble inside a worker: the sessions of its steps, run one after another on one batch that never leaves memory.

Imported by workers: Python 3.10.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import DeadlineError, InputError, MillhandError, ModelError
from millhand.hookspecs import DeadlineSession
from millhand.serving.graph import ModelPart, Node, Part, TransformPart, Wiring, connect
from millhand.serving.sessions import Sessions
from millhand.serving.tensors import Specs, Tensors, check_session, fits
from millhand.serving.transforms import Transform, read_transform

if TYPE_CHECKING:
    from millhand.hookspecs import Session
    from millhand.serving.lanes import LoadRequest, Step

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Tensors, int], Arrays]
"""(inputs, deadline_ns) -> outputs."""


def open_session(request: LoadRequest, sessions: Sessions) -> Session:
    """Load an artifact, or every step of an ensemble. Raises what backends do, and ModelError for a bad ensemble."""
    return EnsembleSession(request, sessions) if request.steps else sessions.open(request)


class EnsembleSession:
    """`Session` and `DeadlineSession` of an ensemble."""

    def __init__(self, request: LoadRequest, sessions: Sessions) -> None:
        """Load every step and connect them. Raises as `open_session`; then no step stays loaded."""
        self.inputs: Specs = request.inputs
        self.outputs: Specs = request.outputs
        self.steps_ns: dict[str, int] = {step.label: 0 for step in request.steps}
        """Step -> time that it took, ns, over all batches."""
        self._name = request.model
        self._sessions = sessions
        self._opened: list[Session] = []
        self._count_lock = threading.Lock()
        try:
            parts = [self._part(step) for step in request.steps]
            nodes = [
                Node(step.label, part, step.inputs, step.outputs)
                for step, (part, _) in zip(request.steps, parts)  # noqa: B905 (Python 3.10; one a step)
            ]
            # The artifact of an ensemble is its model.toml.
            wirings, self._last = connect(f"model '{request.artifact}'", self.inputs, self.outputs, nodes)
        except BaseException:
            self.close()
            raise
        self._steps = [
            _Stage(step.label, wiring, run)
            for step, wiring, (_, run) in zip(request.steps, wirings, parts)  # noqa: B905
        ]

    @property
    def concurrent(self) -> bool:
        """Whether several batches may run at once: where every step bears it."""
        return all(getattr(session, "concurrent", False) for session in self._opened)

    def run(self, inputs: Tensors) -> Arrays:
        """Run one batch through all steps. Raises the first failing step's error, which names it."""
        return self.run_until(inputs, 0)

    def run_until(self, inputs: Tensors, deadline_ns: int) -> Arrays:
        """As `run`; no step begins after `deadline_ns` (CLOCK_MONOTONIC; 0 for none). Raises DeadlineError then."""
        tensors: Arrays = dict(inputs)
        spent: list[tuple[str, int]] = []
        started_ns = time.monotonic_ns()
        with np.errstate(all="ignore"):  # not finite in, not finite out: no line on stderr for it
            for step in self._steps:
                if deadline_ns and started_ns > deadline_ns:
                    raise DeadlineError(
                        f"the deadline passed before {self._where(step.label)}", hint="give it more time"
                    )
                self._run_step(step, tensors, deadline_ns)
                ended_ns = time.monotonic_ns()
                spent.append((step.label, ended_ns - started_ns))
                started_ns = ended_ns
        self._check(f"ensemble '{self._name}': an output", self._last, tensors)
        with self._count_lock:
            for label, took_ns in spent:
                self.steps_ns[label] += took_ns
        return {name: tensors[name] for name in self.outputs}

    def forget_times(self) -> None:
        """Begin to count anew, after the warm-up."""
        self.steps_ns.update(dict.fromkeys(self.steps_ns, 0))

    def close(self) -> None:
        """Let go of the steps' sessions."""
        while self._opened:
            self._sessions.close(self._opened.pop())

    def _part(self, step: Step) -> tuple[Part, Run]:
        """What the step is to its neighbours, and how it runs."""
        if step.load is None:
            transform = read_transform(step.transform, step.options)
            return TransformPart(transform), _run_transform(transform)
        load = step.load
        try:
            session = open_session(load, self._sessions)
            self._opened.append(session)
            if not load.inputs:  # a net of the ensemble's own: it says itself what it takes and gives
                return ModelPart(session.inputs, session.outputs), _run_session(session)
            check_session(load.model, "input", load.inputs, session.inputs)
            check_session(load.model, "output", load.outputs, session.outputs)
        except MillhandError as error:
            raise _located(self._where(step.label), error) from error
        return ModelPart(load.inputs, load.outputs), _run_session(session)

    def _run_step(self, step: _Stage, tensors: Arrays, deadline_ns: int) -> None:
        where = self._where(step.label)
        self._check(where, step.wiring, tensors)
        given = {name: tensors[tensor] for name, tensor in step.wiring.inputs}
        rows = next(iter(given.values())).shape[0]
        try:
            made = step.run(given, deadline_ns)
        except MillhandError as error:
            raise _located(where, error) from error
        except Exception as error:
            raise ModelError(
                f"{where} failed: {type(error).__name__}: {error}",
                hint="report this to the author of the model or of its backend",
            ) from error
        for name, tensor in step.wiring.outputs:
            array = made[name]
            if not array.ndim or array.shape[0] != rows:
                raise ModelError(
                    f"{where}: output '{name}' has shape {list(array.shape)} for a batch of {rows}",
                    hint="export the model with a free first dimension on every input and output",
                )
            tensors[tensor] = array

    def _check(self, where: str, wiring: Wiring, tensors: Arrays) -> None:
        """Check those shapes that could not be checked at load."""
        for tensor, shape in wiring.checks:
            if not fits(tensors[tensor].shape, shape):
                raise InputError(
                    f"{where}: tensor '{tensor}' has shape {list(tensors[tensor].shape)}, expected {list(shape)}",
                    hint="check the request's free dimensions",
                )

    def _where(self, label: str) -> str:
        return f"ensemble '{self._name}', step {label}"


@dataclass(frozen=True)
class _Stage:
    """One step, ready to run."""

    label: str
    wiring: Wiring
    run: Run


def _run_transform(transform: Transform) -> Run:
    def run(inputs: Tensors, deadline_ns: int) -> Arrays:
        try:
            return transform.run(inputs)
        except ValueError as error:
            raise InputError(str(error), hint="check the request's values and free dimensions") from error

    return run


def _run_session(session: Session) -> Run:
    if isinstance(session, DeadlineSession):
        return session.run_until

    def run(inputs: Tensors, deadline_ns: int) -> Arrays:
        return session.run(inputs)

    return run


def _located(where: str, error: MillhandError) -> MillhandError:
    """The same error, saying where it happened."""
    return type(error)(f"{where}: {error.message}", hint=error.hint, retriable=error.retriable)
