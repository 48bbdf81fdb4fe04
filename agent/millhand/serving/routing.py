"""Where models live, as another process than the daemon knows it: told by the daemon, reached at the workers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from millhand.control import FRAME, error_from_dict, no_daemon
from millhand.errors import ControlError, MillhandError, ModelError, WorkerError, suggestion
from millhand.serving.client import Answer, WorkerClient, deadline_ns
from millhand.serving.tensors import Tensors

log = logging.getLogger("millhand.http")

REROUTE_WAIT_S = 1.0
COMES_BY_ITSELF = ("loading", "restarting")
"""States of models that will answer without anybody's doing."""


class UnknownModel(ModelError):
    """The model or the version does not exist here."""


class NotServing(ModelError):
    """The model is here and does not answer, until somebody loads it."""

    retriable = True


async def control_stream(path: Path, call: str, **arguments: Any) -> AsyncIterator[Any]:
    """Make one call on the daemon's control socket and yield its result or its items.

    Raises ControlError where the daemon is gone, else what it raised.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise no_daemon(path) from error
    try:
        body = json.dumps({"call": call, "args": arguments}).encode()
        writer.write(FRAME.pack(len(body)) + body)
        while True:
            (size,) = FRAME.unpack(await reader.readexactly(FRAME.size))
            answer = json.loads(await reader.readexactly(size))
            if "error" in answer:
                raise error_from_dict(answer["error"])
            if "result" in answer:
                yield answer["result"]
                return
            if "item" not in answer:
                return
            yield answer["item"]
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise ControlError("the daemon closed the connection", hint="look at its log", retriable=True) from error
    finally:
        writer.close()


async def control_call(path: Path, call: str, **arguments: Any) -> Any:
    """The one result of a call, or the first item of a stream; errors as `control_stream`."""
    async for result in control_stream(path, call, **arguments):
        return result
    raise ControlError(f"call '{call}' gave no result")


class Routes:
    """Models and the connections to their workers; follows the daemon until it is gone."""

    def __init__(self, control_path: Path, busy_poll_us: int = 0) -> None:
        """`busy_poll_us`: how long connections to workers may wait awake for an answer (busy_poll.py)."""
        self._control_path = control_path
        self._busy_poll_us = busy_poll_us
        self._models: dict[str, Any] = {}
        self.deadline_ms = 0.0
        """Of a request that names none."""
        self._clients: dict[str, asyncio.Task[WorkerClient]] = {}
        self._changed = asyncio.Event()
        self._generation = 0
        self.known = False
        """True once the daemon has told of its models."""

    async def follow(self) -> None:
        """Take every change; returns when the daemon is gone."""
        try:
            async for routes in control_stream(self._control_path, "model.routes"):
                self._take(routes)
        except ControlError as error:
            log.info("%s", error.message)

    async def change(self, call: str, **arguments: Any) -> Any:
        """Make a call that loads or unloads a model, and return once this process has heard of its effect.

        Raises UnknownModel where the repository has no such model, else what the daemon raised.
        """
        try:
            result = await control_call(self._control_path, call, **arguments)
        except ModelError as error:
            names = [model["name"] for model in await control_call(self._control_path, "model.list")]
            if arguments["model"] in names:
                raise
            raise UnknownModel(error.message, hint=error.hint) from error
        self._take(await control_call(self._control_path, "model.routes"))
        return result

    def _take(self, routes: dict[str, Any]) -> None:
        if routes["generation"] < self._generation:
            return
        self._generation = routes["generation"]
        self._models = routes["models"]
        self.deadline_ms = routes["deadline_ms"]
        self.known = True
        self._forget_workers()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def told(self) -> None:
        """Wait until the daemon has told of its models; before, none is known."""
        while not self.known:
            await self._changed.wait()

    def close(self) -> None:
        for path in list(self._clients):
            self._forget(path)

    def model(self, name: str, version: str = "") -> dict[str, Any]:
        """What the daemon told of a model. Raises UnknownModel with a suggestion."""
        if not self.known:
            raise ModelError("the node is starting", hint="send the request again", retriable=True)
        if name not in self._models:
            raise UnknownModel(
                f"model '{name}' is not served{suggestion(name, self._models)}",
                hint=f"served: {', '.join(sorted(self._models)) or 'none'}",
            )
        model: dict[str, Any] = self._models[name]
        if version and version not in model["sockets"]:
            raise UnknownModel(
                f"model '{name}' has no version '{version}'",
                hint=f"ready versions: {', '.join(model['sockets']) or 'none'}",
            )
        return model

    @property
    def models(self) -> Mapping[str, Any]:
        """Model -> what the daemon told of it."""
        return self._models

    def ready(self) -> bool:
        """Whether every model that should be served answers."""
        return self.known and not self.waiting()

    def comes(self, names: Iterable[str]) -> bool:
        """Whether one of these models will answer without anybody's doing."""
        return any(self._models[name]["state"] in COMES_BY_ITSELF for name in names)

    def waiting(self) -> list[str]:
        """The models that should be served and do not answer."""
        return sorted(
            name for name, model in self._models.items() if not model["sockets"] and model["state"] != "unloaded"
        )

    async def infer(
        self,
        name: str,
        version: str,
        tensors: Tensors,
        *,
        deadline_ms: float | None = None,
        deadline: int = 0,
        priority: int = 0,
        wanted: tuple[str, ...] = (),
    ) -> Answer:
        """Run one request at the worker that has the version (the highest for ""). Errors as `WorkerClient.infer`.

        `deadline_ms` counts from now; `deadline`, CLOCK_MONOTONIC nanoseconds, goes before it.
        """
        deadline = deadline or deadline_ns(deadline_ms or self.deadline_ms)
        for attempt in range(2):
            client, chosen = await self._reach(name, version)
            changed = self._changed
            try:
                return await client.infer(
                    name, tensors, version=chosen, deadline=deadline, priority=priority, wanted=wanted
                )
            except ModelError as error:
                if attempt or not error.retriable:
                    raise
            await _wait_for(changed)  # the version was unloaded between the daemon's word and our request
        raise AssertionError("unreachable")

    def reached(self, name: str, version: str) -> tuple[WorkerClient, int] | None:
        """The least busy connected worker and the version; None where `infer` would have to wait for one."""
        sockets = self._models[name]["sockets"]
        if not sockets:
            return None
        chosen = version or max(sockets, key=int)
        best: WorkerClient | None = None
        for path in sockets[chosen]:
            task = self._clients.get(path)
            if task is None or not task.done() or task.cancelled() or task.exception() is not None:
                return None
            client = task.result()
            if client.closed:
                return None
            if best is None or client.in_flight < best.in_flight:
                best = client
        return None if best is None else (best, int(chosen))

    async def _reach(self, name: str, version: str) -> tuple[WorkerClient, int]:
        model = self.model(name, version)
        if not model["sockets"]:
            if model["state"] == "restarting":
                raise WorkerError(f"the worker of model '{name}' is being restarted", hint="send the request again")
            raise not_ready(name, model)
        chosen = version or max(model["sockets"], key=int)
        return await self._least_busy(model["sockets"][chosen]), int(chosen)

    async def _least_busy(self, paths: list[str]) -> WorkerClient:
        """Of a model's workers that answer. Raises what the last of them raised where none does."""
        clients = await asyncio.gather(*map(self._client, paths), return_exceptions=True)
        living = [client for client in clients if isinstance(client, WorkerClient)]
        for failure in clients:
            if isinstance(failure, BaseException) and not living:
                raise failure
        return min(living, key=lambda client: client.in_flight)

    async def _client(self, path: str) -> WorkerClient:
        task = self._clients.get(path)
        if task is None:
            connecting = WorkerClient.connect(Path(path), Path(path).stem, busy_poll_us=self._busy_poll_us)
            task = self._clients[path] = asyncio.create_task(connecting)
        try:
            client = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # the caller left
            raise WorkerError("the worker is being restarted", hint="send the request again") from None
        except MillhandError:
            self._clients.pop(path, None)
            raise
        if client.closed:
            self._clients.pop(path, None)
            raise WorkerError("the worker is being restarted", hint="send the request again")
        return client

    def _forget_workers(self) -> None:
        living = {path for model in self._models.values() for paths in model["sockets"].values() for path in paths}
        for path in [path for path in self._clients if path not in living]:
            self._forget(path)

    def _forget(self, path: str) -> None:
        task = self._clients.pop(path)
        if task.done() and not task.cancelled() and task.exception() is None:
            client = task.result()
            if client.in_flight == 0:
                client.close()
        else:
            task.cancel()


def not_ready(name: str, model: Mapping[str, Any]) -> ModelError:
    """The error of a model without a version that answers; `model` is as the daemon tells of it."""
    text = f"model '{name}' is {model['state']}: {model['reason'] or 'not loaded'}"
    comes = model["state"] in COMES_BY_ITSELF
    return ModelError(text, hint=model["hint"], retriable=True) if comes else NotServing(text, hint=model["hint"])


async def _wait_for(changed: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(REROUTE_WAIT_S):
            await changed.wait()
    except TimeoutError:
        return
