"""A worker: loads model versions, batches requests and answers them. `python -m millhand.serving.worker '<JSON>'`.

Its threads take turns (turns.py): the one that reads a request runs it, and no more than `runners` run models at once.
Each load or unload has a thread of its own while it lasts. Python 3.10, and light:
msgspec, NumPy and the backend only.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before any backend: a node never phones home

import contextlib
import ctypes
import logging
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from millhand.errors import AcceleratorError, DeadlineError, InputError, MillhandError, ModelError, OverloadError
from millhand.serving import protocol
from millhand.serving.batcher import Batch, Batcher, Request
from millhand.serving.blackbox import LOAD, RUN, RUNNERS_CAP, Blackbox
from millhand.serving.connection import Connection, Origin, Plan
from millhand.serving.lanes import LoadedModel, LoadRequest
from millhand.serving.sessions import Sessions
from millhand.serving.tensors import unknown_output
from millhand.serving.turns import Turns

log = logging.getLogger("millhand.worker")

PR_SET_PDEATHSIG = 1
NOTHING: dict[int, LoadedModel] = {}
CONNECTIONS_CAP = 256
ACCELERATOR_LOST = 3  # exit status; the daemon starts a new process, or moves the models to another accelerator


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON."""

    name: str
    control_fd: int
    """A connected stream socket; when its other end closes, the worker exits."""
    blackbox_fd: int
    listen_fd: int
    """A listening Unix socket for further clients; they may infer and ask, not load."""
    cpus: tuple[int, ...] = ()
    runners: int = 1
    """Batches that may run at once."""


class Worker:
    """The process's one object."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._runners = max(1, min(settings.runners, RUNNERS_CAP))
        self._blackbox = Blackbox(settings.blackbox_fd)
        self._blackbox.catch_crash()
        self._batcher = Batcher(self._runners, self._call_another)
        self._turns = Turns(self._batcher, self._read_clients, self._run, self._runners)
        self._models: dict[str, dict[int, LoadedModel]] = {}
        self._sessions = Sessions()
        self._load_lock = threading.Lock()
        self._epoll = select.epoll()
        self._listener = socket.socket(fileno=settings.listen_fd)
        self._listener.setblocking(False)
        self._connections: dict[int, Connection] = {}
        self._started = time.monotonic()
        self._calls: dict[str, Any] = {"ping": self._ping, "stats": self._stats, "metadata": self._metadata}
        self._slow_calls: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "unload": self._unload,
            "shutdown": self._shutdown,
        }

    def serve(self) -> None:
        """Run until the control connection closes; then the process ends from whichever thread sees it."""
        self._epoll.register(self._listener, select.EPOLLIN)
        self._watch(socket.socket(fileno=self._settings.control_fd), control=True)
        self._turns.serve()

    def _call_another(self) -> None:
        self._turns.call()

    # ---- sockets ----------------------------------------------------------------------------------------------------

    def _read_clients(self, timeout_s: float | None) -> None:
        """Wait for what clients send, and take it; one thread at a time."""
        for fd, events in self._epoll.poll(timeout_s):
            connection = self._connections.get(fd)
            if connection is not None:
                self._read(connection, events)
            elif fd == self._listener.fileno():
                self._accept()

    def _watch(self, accepted: socket.socket, control: bool = False) -> None:
        connection = Connection(accepted, self._arm, control=control)
        self._connections[accepted.fileno()] = connection
        self._epoll.register(accepted, select.EPOLLIN)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # the client left already, or no descriptor is free
        if len(self._connections) > CONNECTIONS_CAP:
            accepted.close()
            return
        self._watch(accepted)

    def _arm(self, connection: Connection) -> None:
        """Wait for room in a connection where something is unsent, else only for more from it."""
        try:
            self._epoll.modify(connection.fd, select.EPOLLIN | (select.EPOLLOUT if connection.blocked else 0))
        except (OSError, ValueError):
            return  # it is being closed

    def _read(self, connection: Connection, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                connection.flush()
                self._arm(connection)
            if events & ~select.EPOLLOUT:
                for frame in connection.read():
                    self._take(connection, frame)
        except BlockingIOError:
            pass
        except protocol.ProtocolError as error:
            log.warning("a client is sent away: %s", error.message)
            connection.send(protocol.frame(protocol.ERROR, 0, protocol.fault_of(error)))
            self._drop(connection)
        except (EOFError, OSError):
            self._drop(connection)
        except Exception:  # whatever one client sends, the others' requests go on
            log.exception("a client's connection is closed")
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        """Forget a connection; its waiting requests never run, its ring goes with the last batch that uses it."""
        if connection.control:
            os._exit(0)  # not even a runner that hangs in native code may hold the process
        self._connections.pop(connection.socket.fileno(), None)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(connection.socket)
        connection.close()
        for request in list(connection.pending.values()):
            model = request.origin.model
            if self._batcher.cancel(model.lane, request):
                model.count(cancelled=1)
        connection.pending.clear()

    # ---- frames -----------------------------------------------------------------------------------------------------

    def _take(self, connection: Connection, frame: protocol.Frame) -> None:
        try:
            if frame.kind == protocol.INFER and connection.greeted:
                self._take_infer(connection, frame)
            elif not connection.greeted:
                connection.greet(frame)
            elif frame.kind == protocol.CANCEL:
                self._take_cancel(connection, frame.request)
            elif frame.kind == protocol.CALL:
                self._take_call(connection, frame)
            else:
                raise protocol.ProtocolError(f"a client may not send frames of kind {frame.kind}")
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is no UTF-8
            raise protocol.ProtocolError(f"a frame's body is not valid: {error}") from error

    def _take_infer(self, connection: Connection, frame: protocol.Frame) -> None:
        if frame.request in connection.pending:
            raise protocol.ProtocolError(f"request id {frame.request} is still in use")
        deadline_ns, number, asked = protocol.split_infer(frame.body)
        plan = connection.plans.get((asked, number))
        if plan is not None and self._models.get(plan.name, NOTHING).get(plan.version) is not plan.model:
            plan = None
        infer = protocol.decode_infer(asked) if plan is None else None
        model: LoadedModel | None = None
        try:
            if infer is not None:
                plan = self._plan(connection, frame.payload, infer, number)
                if plan.lasts:
                    connection.keep(asked, number, plan)
            assert plan is not None
            model = plan.model
            if plan.inspected:
                model.check(plan.inputs)
            request = Request(plan.inputs, plan.rows, deadline_ns, plan.priority, None, plan.kind)
            request.origin = Origin(connection, frame.request, plan.slot, plan.wanted, model)
            connection.pending[frame.request] = request
            try:
                self._batcher.submit(model.lane, request)
            except ModelError:  # it is being unloaded; another may have come in its place
                del connection.pending[frame.request]
                if self._model(plan.name, plan.version) is model:
                    raise
                self._take_infer(connection, frame)
        except (MillhandError, ValueError, TypeError, OverflowError) as error:
            if isinstance(error, OverloadError) and model is not None:
                model.count(rejected=1)
            connection.pending.pop(frame.request, None)
            connection.send(protocol.frame(protocol.ERROR, frame.request, protocol.fault_of(error)))

    def _plan(self, connection: Connection, payload: memoryview, infer: protocol.Infer, number: int) -> Plan:
        """What a request comes to. Raises InputError or ModelError."""
        model = self._model(infer.model, infer.version)
        slot = None if number < 0 else connection.slot(number)
        memory = payload if infer.inline or slot is None else slot
        inputs = protocol.fetch(infer.tensors, memory)
        for name in infer.outputs:
            if name not in model.outputs:
                raise unknown_output(infer.model, name, model.outputs)
        views = not any(array.flags.owndata or array.dtype == object for array in inputs.values())
        return Plan(
            model=model,
            name=infer.model,
            version=infer.version,
            inputs=inputs,
            rows=model.check(inputs),
            priority=infer.priority,
            kind=model.kind(inputs),
            slot=slot,
            wanted=infer.outputs,
            inspected=model.inspects_values,
            lasts=infer.version > 0 and memory is slot and views,
        )

    def _take_cancel(self, connection: Connection, request_id: int) -> None:
        request = connection.pending.get(request_id)
        if request is None:
            return  # answered already
        if self._batcher.cancel(request.origin.model.lane, request):
            # A client calls off what it has waited for until the deadline: that has expired.
            expired = 0 < request.deadline_ns <= time.monotonic_ns()
            request.origin.model.count(**{"expired" if expired else "cancelled": 1})
            connection.answer(
                request_id, protocol.ERROR, protocol.Fault("cancelled", "cancelled by the client", "", True)
            )

    def _take_call(self, connection: Connection, frame: protocol.Frame) -> None:
        call = protocol.decode_call(frame.body)
        if call.name in self._slow_calls and connection.control:
            arguments = (connection, frame.request, self._slow_calls[call.name], call.args)
            threading.Thread(target=self._answer_call, args=arguments, name=call.name, daemon=True).start()
        else:
            self._answer_call(connection, frame.request, self._calls.get(call.name), call.args)

    def _answer_call(self, connection: Connection, request_id: int, call: Any, arguments: dict[str, Any]) -> None:
        try:
            if call is None:
                raise InputError("this connection may not make that call", hint="calls are ping, stats and metadata")
            reply = protocol.frame(protocol.REPLY, request_id, call(**arguments))
        except Exception as error:
            reply = protocol.frame(protocol.ERROR, request_id, protocol.fault_of(error))
        connection.send(reply)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _ping(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "uptime_s": time.monotonic() - self._started}

    def _stats(self) -> list[dict[str, Any]]:
        """One entry a loaded version; see `LoadedModel.counted`."""
        return [model.counted() for versions in list(self._models.values()) for model in list(versions.values())]

    def _metadata(self, model: str, version: int = 0) -> dict[str, Any]:
        return self._model(model, version).metadata()

    def _load(self, **arguments: Any) -> dict[str, Any]:
        request = msgspec.convert(arguments, LoadRequest)
        with self._load_lock:
            self._blackbox.begin(LOAD, request.model, request.version)
            try:
                model = LoadedModel(request, self._sessions, self._runners)
            finally:
                self._blackbox.end(LOAD)
            self._batcher.add(model.lane)
            versions = self._models.setdefault(request.model, {})
            replaced = versions.get(request.version)
            versions[request.version] = model
            if replaced is None:
                return model.metadata()
            self._batcher.remove(replaced.lane)
            if replaced.session is model.session:
                model.memory_bytes += replaced.memory_bytes
            counted = replaced.counted()
            replaced.close()
            return {**model.metadata(), "replaced": counted}

    def _unload(self, model: str, version: int) -> dict[str, Any]:
        with self._load_lock:
            loaded = self._model(model, version)
            self._batcher.remove(loaded.lane)
            stats = self._stats()
            del self._models[model][version]
            if not self._models[model]:
                del self._models[model]
            for connection in list(self._connections.values()):
                connection.plans.clear()
            loaded.close()
            return {"models_left": sum(len(versions) for versions in self._models.values()), "stats": stats}

    def _shutdown(self) -> dict[str, Any]:
        """Run what waits, then exit (the caller closes the control connection)."""
        with self._load_lock:
            for versions in self._models.values():
                for model in versions.values():
                    self._batcher.remove(model.lane)
        return {"stats": self._stats()}

    def _model(self, name: str, version: int) -> LoadedModel:
        versions = self._models.get(name)
        if not versions:
            raise _moved(f"model '{name}' is not loaded in this worker")
        model = versions.get(version or max(versions))
        if model is None:
            raise _moved(f"model '{name}' has no version {version} loaded")
        return model

    # ---- running ----------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch) -> None:
        model: LoadedModel = batch.lane.owner
        for request in batch.expired:
            model.count(expired=1)
            error = DeadlineError(
                f"the deadline of a request to model '{model.name}' passed while it waited",
                hint="give it more time, or send fewer requests at once",
            )
            request.origin.fail(error)
        if batch.requests:
            self._run_requests(model, batch)
        self._batcher.finish(batch)

    def _run_requests(self, model: LoadedModel, batch: Batch) -> None:
        """Run and answer; what is counted is counted after the answers, which somebody waits for."""
        record = RUN + batch.runner
        self._blackbox.begin(record, model.name, model.version)
        inferences = model.run(batch.requests)
        for inference in inferences:
            if isinstance(inference.outcome, Exception):
                for request in inference.requests:
                    request.origin.fail(inference.outcome)
                if isinstance(inference.outcome, AcceleratorError):
                    log.critical("%s: the worker ends", inference.outcome.message)
                    os._exit(ACCELERATOR_LOST)  # while the black box says whose run it was
                continue
            started_ns, compute_ns = inference.started_ns, inference.ended_ns - inference.started_ns
            rows = sum([request.rows for request in inference.requests])
            answers: dict[Connection, list[Any]] = {}  # one send a client, which then wakes up once
            for request, outputs in inference.parts():
                origin = request.origin
                parts = origin.take_result(outputs, started_ns - request.arrival_ns, compute_ns, rows)
                answers.setdefault(origin.connection, []).extend(parts)
            for connection, parts in answers.items():
                if parts:
                    connection.send(parts)
        self._blackbox.end(record)
        for inference in inferences:
            model.count_inference(inference)


def _moved(message: str) -> ModelError:
    """Retriable: a client whose route is stale asks the daemon and comes again."""
    return ModelError(message, hint="look at 'millhand model list'", retriable=True)


def main() -> None:
    """Entry point of the process."""
    settings = msgspec.json.decode(sys.argv[1], type=WorkerSettings)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # besides the control socket: whichever comes first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's to handle
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if settings.cpus:
        os.sched_setaffinity(0, settings.cpus)
    # A runner that comes back from native code waits so long for the interpreter while another thread computes.
    sys.setswitchinterval(0.0005)
    Worker(settings).serve()


if __name__ == "__main__":
    main()
