"""The local artifact that answers while no upstream does."""

from __future__ import annotations

import importlib.metadata
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from millhand.errors import DeadlineError, MillhandError, ModelError
from millhand.serving.lanes import LoadRequest
from millhand.serving.sessions import Sessions
from millhand.serving.tensors import Specs, Tensors, check_session, zeros
from millhand_plugins.remote.options import Fallback

GROUP = "millhand"
FORGET = 0.9
"""How much of the slowest run is remembered at each further one."""


class LocalModel:
    """A session of another backend, loaded at the first need. Thread-safe."""

    def __init__(
        self, fallback: Fallback, folder: Path, accelerator: str, threads: int, declared: tuple[Specs, Specs]
    ) -> None:
        self._artifact = folder / fallback.artifact
        self.name = self._artifact.name
        self._inputs, self._outputs = declared
        self._request = LoadRequest(
            model=self._artifact.name,
            version=0,
            artifact=str(self._artifact),
            backend=fallback.backend,
            module=fallback.plugin or _module_of(fallback.backend),
            plugin_options={"threads": threads, **fallback.options},
            accelerator=accelerator,
            inputs=dict(self._inputs),
            outputs=dict(self._outputs),
            max_batch=1,
        )
        self._sessions = Sessions()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._loading: Future[Any] | None = None
        self._slowest_ns = 0.0

    @property
    def slowest_ns(self) -> float:
        """What an answer of late has taken at most; 0 before the load."""
        return self._slowest_ns

    def load(self, deadline_ns: int = 0) -> Any:
        """Return the session, loaded and warm. Raises ModelError, PluginError, or DeadlineError: then it goes on."""
        with self._lock:
            loading = self._loading
            if loading is None:
                loading = self._loading = Future()
                # A thread of its own: a request that needs the artifact waits for it no longer than it may.
                threading.Thread(target=self._load, args=(loading,), name="fallback", daemon=True).start()
        try:
            return loading.result(_left_s(deadline_ns, "is still being loaded"))
        except FutureTimeout as error:
            raise _late("is still being loaded") from error

    def run(self, tensors: Tensors, deadline_ns: int) -> dict[str, NDArray[Any]]:
        """One batch. Raises DeadlineError where it could not begin in time, else as the backend's session."""
        session = self.load(deadline_ns)
        alone = not getattr(session, "concurrent", False)
        left_s = _left_s(deadline_ns, "was not asked")
        if alone and not self._turn.acquire(timeout=-1 if left_s is None else left_s):
            raise _late("is busy with other requests")
        started_ns = time.monotonic_ns()
        try:
            outputs = _run(session, tensors, deadline_ns)
        except MillhandError:
            raise
        except Exception as error:
            raise self._failure(error, "failed") from error
        finally:
            if alone:
                self._turn.release()
        self._slowest_ns = max(time.monotonic_ns() - started_ns, self._slowest_ns * FORGET)
        return {name: outputs[name] for name in self._outputs}

    def close(self) -> None:
        with self._lock:
            loading, self._loading = self._loading, None
        if loading is not None and loading.done() and loading.exception() is None:
            self._sessions.close(loading.result())

    def _load(self, loading: Future[Any]) -> None:
        try:
            session = self._loaded()
        except BaseException as error:
            with self._lock:
                self._loading = None  # the next request tries again
            loading.set_exception(error)
            return
        with self._lock:
            wanted = self._loading is loading
            loading.set_result(session)
        if not wanted:
            self._sessions.close(session)

    def _loaded(self) -> Any:
        session = None
        try:
            session = self._sessions.open(self._request)
            check_session(self._artifact.name, "input", self._inputs, session.inputs)
            check_session(self._artifact.name, "output", self._outputs, session.outputs)
            _run(session, zeros(self._inputs, 1), 0)
            started_ns = time.monotonic_ns()
            _run(session, zeros(self._inputs, 1), 0)
            self._slowest_ns = time.monotonic_ns() - started_ns
        except BaseException as error:
            if session is not None:
                self._sessions.close(session)
            if isinstance(error, Exception) and not isinstance(error, MillhandError):
                raise self._failure(error, "cannot be loaded") from error
            raise
        return session

    def _failure(self, error: Exception, what: str) -> ModelError:
        return ModelError(
            f"the fallback '{self._artifact}' {what}: {type(error).__name__}: {error}",
            hint="report this to the author of its backend",
        )


def _run(session: Any, tensors: Tensors, deadline_ns: int) -> dict[str, NDArray[Any]]:
    run_until = getattr(session, "run_until", None)
    outputs: dict[str, NDArray[Any]] = run_until(tensors, deadline_ns) if run_until else session.run(tensors)
    return outputs


def _module_of(backend: str) -> str:
    """The plugin of the backend's name: by its entry point, or ours (a foreign interpreter knows no entry points)."""
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name == backend:
            return point.module
    return f"millhand_plugins.{backend}"


def _left_s(deadline_ns: int, what: str) -> float | None:
    if not deadline_ns:
        return None
    left_ns = deadline_ns - time.monotonic_ns()
    if left_ns <= 0:
        raise _late(what)
    return left_ns / 1e9


def _late(what: str) -> DeadlineError:
    return DeadlineError(f"the deadline passed: the fallback {what}", hint="give it more time")
