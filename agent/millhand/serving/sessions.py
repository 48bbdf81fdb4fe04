"""Backends and their sessions inside a worker. Imported by workers: Python 3.10.

What is loaded from the same file in the same way is loaded once: a model and the ensembles that use it share one
session, which is closed when the last of them lets it go.
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from millhand.errors import ModelError, PluginError, suggestion
from millhand.hookspecs import (
    CountingSession,
    DeadlineSession,
    DeclaredBackend,
    PreparedBackend,
    ProvingSession,
    ThreadedBackend,
)
from millhand.serving.tensors import Specs, Tensors, check_session, zeros
from millhand.serving.threads import AUTO, Choice, choose_threads

if TYPE_CHECKING:
    from millhand.hookspecs import Session
    from millhand.serving.lanes import LoadRequest


@dataclass
class _Entry:
    session: Session
    choice: Choice | None
    users: int = 1


class Sessions:
    """The sessions of one worker. Loads and unloads come one at a time (the worker sees to it)."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}

    def prepare(self, request: LoadRequest) -> None:
        """Import what the backends need, so that it does not count as a model's memory. Raises PluginError."""
        for step in request.steps:
            if step.load is not None:
                self.prepare(step.load)
        if not request.steps:
            backend = find_backend(request.module, request.backend, request.plugin_options)
            if isinstance(backend, PreparedBackend):
                backend.prepare()

    def open(self, request: LoadRequest) -> Session:
        """Load an artifact, or take the session that another user has loaded from it. Raises what the backend does."""
        artifact = Path(request.artifact)
        options = {**request.plugin_options, **request.options}
        key = _key(request, artifact, options)
        entry = self._entries.get(key)
        if entry is not None:
            entry.users += 1
            return entry.session
        session, choice = _load_measured(request, artifact, options)
        if not getattr(session, "concurrent", False):
            if isinstance(session, DeadlineSession):
                return session  # users would wait for each other, beyond their deadlines
            session = OneAtATime(session)
        self._entries[key] = _Entry(session, choice)
        return session

    def choice(self, session: Session) -> Choice | None:
        """The session's number of threads; None where its backend has no such thing."""
        return next((entry.choice for entry in self._entries.values() if entry.session is session), None)

    def close(self, session: Session) -> None:
        """Let a session go; its last user frees it."""
        for key, entry in self._entries.items():
            if entry.session is session:
                entry.users -= 1
                if not entry.users:
                    del self._entries[key]
                    session.close()
                return
        session.close()


class OneAtATime:
    """A session that bears one inference at a time, for users that know nothing of each other."""

    concurrent = False

    def __init__(self, session: Session) -> None:
        self.inputs: Specs = session.inputs
        self.outputs: Specs = session.outputs
        if isinstance(session, CountingSession):
            self.counts = session.counts
        if isinstance(session, ProvingSession):
            self.proof = session.proof
        self._session = session
        self._turn = threading.Lock()

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        with self._turn:
            return self._session.run(inputs)

    def close(self) -> None:
        self._session.close()


def _key(request: LoadRequest, artifact: Path, options: Mapping[str, Any]) -> bytes:
    """What tells two loads apart; a file that was replaced is another one."""
    try:
        status = artifact.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size, request.fingerprint)
    except OSError:
        version = (0, 0, 0, "")  # the backend says what is wrong with it
    told = (request.module, request.backend, str(artifact), request.accelerator, request.inputs, request.outputs)
    return msgspec.msgpack.encode((told, version, sorted(options.items())))


def _load_measured(request: LoadRequest, artifact: Path, options: Mapping[str, Any]) -> tuple[Session, Choice | None]:
    """Load with the number of threads that was told, or for `auto` with the one that measures best."""
    backend = find_backend(request.module, request.backend, request.plugin_options)
    threads = options.get("threads")
    if not isinstance(backend, ThreadedBackend) or request.accelerator != "cpu":
        told = {**options, "threads": 1} if threads == AUTO else options
        return _load(backend, request, artifact, told), None
    if threads != AUTO and not isinstance(threads or 0, int):
        raise ModelError(
            f"model '{request.model}': key 'options.threads' = {threads!r} is no number of threads",
            hint="give a whole number, or 'auto'",
        )
    if threads != AUTO:
        return _load(backend, request, artifact, options), Choice(threads or 1)
    return choose_threads(
        lambda number: _load(backend, request, artifact, {**options, "threads": number}),
        lambda session: zeros(_checked_inputs(request, session), 1),
        len(os.sched_getaffinity(0)),
    )


def _checked_inputs(request: LoadRequest, session: Session) -> Specs:
    """What model.toml says that the session takes; a step's own artifact says it itself. Raises ModelError."""
    inputs = request.inputs or session.inputs
    check_session(request.model, "input", inputs, session.inputs)
    return inputs


def _load(backend: Any, request: LoadRequest, artifact: Path, options: Mapping[str, Any]) -> Session:
    if isinstance(backend, DeclaredBackend):
        return backend.load_declared(artifact, request.accelerator, options, request.inputs, request.outputs)
    session: Session = backend.load(artifact, request.accelerator, options)
    if isinstance(session, ProvingSession):
        try:
            session.prove(_checked_inputs(request, session), request.max_batch)
        except BaseException:
            session.close()
            raise
    return session


def find_backend(module_name: str, backend_name: str, options: dict[str, Any]) -> Any:
    """Import the plugin and return its backend of that name. Raises PluginError, whatever the plugin does."""
    try:
        hook = importlib.import_module(module_name).millhand_backends
        config = SimpleNamespace(**options)
        found = hook(config) if inspect.signature(hook).parameters else hook()
        backends = {backend.name: backend for backend in found}
    except Exception as error:
        raise PluginError(
            f"plugin '{module_name}' gave no backend: {type(error).__name__}: {error}",
            hint="install what it needs for the workers' interpreter, or report this to its author",
        ) from error
    if backend_name not in backends:
        raise PluginError(
            f"plugin '{module_name}' has no backend '{backend_name}'{suggestion(backend_name, backends)}",
            hint=f"it has {', '.join(backends)}",
        )
    return backends[backend_name]
