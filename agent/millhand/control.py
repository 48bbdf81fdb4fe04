"""The local API on a Unix socket that the CLI and the page speak; the daemon alone opens the store.

One request is a frame: 4 bytes little-endian length, then JSON `{"call": "alert.list", "args": {...}}`. The answer is
one frame `{"result": ...}` or `{"error": {code, message, hint, retriable}}`; a call that streams answers many
`{"item": ...}` frames and ends with `{"end": true}`. Connections may carry many requests, one after the other.
Who may connect is a matter of the socket's file mode (0660) and of SO_PEERCRED, which the daemon logs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from millhand import errors

log = logging.getLogger("millhand.control")

FRAME = struct.Struct("<I")
FRAME_BYTES_CAP = 64 * 1024 * 1024
SOCKET_PATH_BYTES_CAP = 107  # sun_path on Linux, less its terminating zero
SOCKET_NAME_BYTES_CAP = 24
"""Names of sockets in a run_dir are no longer: `control.sock`, `worker-<number>-<generation>.sock`."""

Handler = Callable[..., Awaitable[Any] | AsyncIterator[Any]]


def check_socket_path(path: Path) -> Path:
    """Return `path` if the kernel can bind it, else raise ControlError with the remedy."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_CAP:
        raise errors.ControlError(
            f"socket path '{path}' is longer than {SOCKET_PATH_BYTES_CAP} bytes",
            hint="set [node] run_dir to a shorter folder, for example /run/millhand",
        )
    return path


def no_daemon(path: Path) -> errors.ControlError:
    """Where nobody answers on the socket of a daemon."""
    hint = "start it: 'systemctl start millhand', or 'millhand run' as the agent's user; or pass its --config"
    return errors.ControlError(f"no daemon answers on '{path}'", hint=hint)


def error_from_dict(data: dict[str, Any]) -> errors.MillhandError:
    """Rebuild the exception that the daemon raised."""
    known = errors.MillhandError.__subclasses__()
    # Other modules have errors of their own, which are made otherwise and may share a code.
    classes = {cls.code: cls for cls in known if cls.__module__ == errors.__name__}
    cls = classes.get(str(data.get("code")), errors.ControlError)
    return cls(str(data.get("message", "")), hint=str(data.get("hint", "")), retriable=bool(data.get("retriable")))


class ControlServer:
    """Serves named handlers: coroutines answer once, async generators stream."""

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self._path = check_socket_path(path)
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if _answers(self._path):
                raise errors.ControlError(
                    f"another millhand daemon answers on '{self._path}'",
                    hint="stop it first, or give this one another [node] run_dir",
                )
            self._path.unlink()  # left behind by a killed daemon
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        self._path.chmod(0o660)

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._path.unlink(missing_ok=True)
        self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the daemon stops
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            (size,) = FRAME.unpack(await reader.readexactly(FRAME.size))
            if size > FRAME_BYTES_CAP:
                error = errors.ControlError(f"a request of {size} bytes is too large", hint="send less at once")
                await _send(writer, {"error": error.to_dict()})
                return
            body = await reader.readexactly(size)
            async for frame in self._answer(body):
                await _send(writer, frame)

    async def _answer(self, body: bytes) -> AsyncIterator[dict[str, Any]]:
        try:
            request = json.loads(body)
            name, arguments = request["call"], request.get("args", {})
            handler = self._handlers.get(name)
            if handler is None:
                known = errors.suggestion(name, self._handlers)
                raise errors.ControlError(f"call '{name}' is not known{known}", hint="update the CLI or the daemon")
            outcome = handler(**arguments)
            if isinstance(outcome, AsyncIterator):
                async for item in outcome:
                    yield {"item": item}
                yield {"end": True}
            else:
                yield {"result": await outcome}
        except errors.MillhandError as error:
            yield {"error": error.to_dict()}
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            yield {"error": errors.ControlError(f"the request is not valid: {error}").to_dict()}
        except Exception as error:
            log.exception("a control call failed")
            yield {"error": errors.ControlError(f"internal error: {type(error).__name__}: {error}").to_dict()}


async def _send(writer: asyncio.StreamWriter, frame: dict[str, Any]) -> None:
    body = json.dumps(frame, separators=(",", ":")).encode()
    writer.write(FRAME.pack(len(body)) + body)
    await writer.drain()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True


class ControlClient:
    """Blocking client, light enough for the CLI: standard library only."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._path = check_socket_path(path)
        self._timeout_s = timeout_s

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Call once. Raises ControlError where no daemon answers, else what the daemon raised."""
        with self._connect() as connection:
            _write(connection, name, arguments)
            return _unpack(_read(connection))["result"]

    def stream(self, name: str, /, **arguments: Any) -> Iterator[Any]:
        """Yield the items of a streaming call."""
        with self._connect() as connection:
            _write(connection, name, arguments)
            while True:
                frame = _unpack(_read(connection))
                if frame.get("end"):
                    return
                yield frame["item"]

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(os.fspath(self._path))
        except PermissionError as error:
            connection.close()
            raise errors.ControlError(
                f"no permission to open '{self._path}'", hint="join the group that owns the socket, or use sudo"
            ) from error
        except OSError as error:
            connection.close()
            raise no_daemon(self._path) from error
        return connection


def _write(connection: socket.socket, name: str, arguments: dict[str, Any]) -> None:
    body = json.dumps({"call": name, "args": arguments}, separators=(",", ":")).encode()
    if len(body) > FRAME_BYTES_CAP:
        raise errors.ControlError(f"a request of {len(body)} bytes is too large", hint="send less at once")
    try:
        connection.sendall(FRAME.pack(len(body)) + body)
    except TimeoutError as error:
        raise _overdue() from error
    except OSError as error:
        raise _closed() from error


def _overdue() -> errors.ControlError:
    return errors.ControlError(
        "the daemon did not answer in time", hint="look at its log; is it overloaded?", retriable=True
    )


def _closed() -> errors.ControlError:
    return errors.ControlError("the daemon closed the connection", hint="look at its log", retriable=True)


def _read(connection: socket.socket) -> dict[str, Any]:
    (size,) = FRAME.unpack(_read_exactly(connection, FRAME.size))
    frame: dict[str, Any] = json.loads(_read_exactly(connection, size))
    return frame


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(min(size - len(parts), 1 << 20))
        except TimeoutError as error:
            raise _overdue() from error
        except OSError as error:
            raise _closed() from error
        if not part:
            raise _closed()
        parts += part
    return bytes(parts)


def _unpack(frame: dict[str, Any]) -> dict[str, Any]:
    if "error" in frame:
        raise error_from_dict(frame["error"])
    return frame
