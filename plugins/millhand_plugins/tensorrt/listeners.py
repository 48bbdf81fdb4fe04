"""What the library calls back: its log, its errors, its progress. Python 3.10.

Its base classes are known only once the library is loaded, so these classes are made then. TensorRT holds each of them
by a bare pointer: whoever makes one keeps it for longer than what it was given to.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from millhand_plugins.tensorrt.library import Library

log = logging.getLogger("millhand.tensorrt")

KEPT = 50
"""Lines that are kept for the message of a failure."""
WARNING_CHARACTERS = 300


def make_logger(library: Library) -> Any:
    """An `ILogger` with an attribute `said`: the newest lines of errors. Warnings go to the log's debug level."""
    return _logger_class(library)()


def make_recorder(library: Library) -> Any:
    """An `IErrorRecorder` with an attribute `errors`: names of codes, and texts, the newest of them."""
    return _recorder_class(library)()


def make_monitor(library: Library, tell: Callable[[float, str], None]) -> Any:
    """An `IProgressMonitor` that tells share and phase. Its attribute `ended` is the exception that `tell` raised: the
    build then ends at its next step, since no exception may pass through the library.
    """
    return _monitor_class(library)(tell)


class Phases:
    """Turns TensorRT's tree of phases into one share from 0 to 1 that never falls."""

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str, int]] = {}
        self._done: dict[str, int] = {}
        self._share = 0.0

    def start(self, name: str, parent: str, steps: int) -> None:
        self._phases[name] = (parent if parent in self._phases else "", max(1, steps))
        self._done[name] = 0

    def step(self, name: str, step: int) -> None:
        if name in self._phases:
            self._done[name] = step + 1

    def finish(self, name: str) -> None:
        self._phases.pop(name, None)
        self._done.pop(name, None)

    @property
    def share(self) -> float:
        roots = [name for name, (parent, _) in self._phases.items() if not parent]
        now = max((self._part(name) for name in roots), default=self._share)
        self._share = max(self._share, min(1.0, now))
        return self._share

    def _part(self, name: str) -> float:
        steps = self._phases[name][1]
        below = max((self._part(child) for child, (parent, _) in self._phases.items() if parent == name), default=0.0)
        return min(1.0, (self._done[name] + below) / steps)


@functools.cache
def _logger_class(library: Library) -> Any:
    base: Any = library.trt.ILogger
    severity = base.Severity

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.said: deque[str] = deque(maxlen=KEPT)

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.said.append(text)
            elif level == severity.WARNING:
                log.debug("%s: %s", library.traits.title, text[:WARNING_CHARACTERS])

    return Logger


@functools.cache
def _recorder_class(library: Library) -> Any:
    base: Any = library.trt.IErrorRecorder

    class Recorder(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: deque[tuple[str, str]] = deque(maxlen=KEPT)
            self._codes: deque[Any] = deque(maxlen=KEPT)
            self._reported = 0
            self._lock = threading.Lock()

        def report_error(self, code: Any, text: str) -> bool:
            with self._lock:
                self._reported += 1
                self._codes.append(code)
                self.errors.append((str(getattr(code, "name", code)), text))
            return False

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, number: int) -> Any:
            return self._codes[number]

        def get_error_desc(self, number: int) -> str:
            return self.errors[number][1]

        def has_overflowed(self) -> bool:
            return self._reported > KEPT

        def clear(self) -> None:
            with self._lock:
                self.errors.clear()
                self._codes.clear()
                self._reported = 0

    return Recorder


@functools.cache
def _monitor_class(library: Library) -> Any:
    base: Any = library.trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self, tell: Callable[[float, str], None]) -> None:
            base.__init__(self)
            self._tell = tell
            self.ended: BaseException | None = None
            self._phases = Phases()
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, parent_phase or "", num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if self.ended is None:
                    self._phases.step(phase_name, step)
                    try:
                        self._tell(self._phases.share, phase_name)
                    except BaseException as error:
                        self.ended = error
            return self.ended is None

    return Monitor
