"""The control socket: answers, errors, streams, and bad clients."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from millhand.control import ControlClient, ControlServer, check_socket_path
from millhand.errors import ControlError, InputError


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder:
        yield Path(folder) / "control.sock"


async def add(left: int, right: int) -> int:
    return left + right


async def refuse() -> None:
    raise InputError("tensor 'x' has shape [2]", hint="send [3]")


async def count(to: int) -> AsyncIterator[Any]:
    for number in range(to):
        yield number


async def explode() -> None:
    raise RuntimeError("a defect")


HANDLERS = {"add": add, "refuse": refuse, "count": count, "explode": explode}


@pytest.fixture
async def server(socket_path: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(socket_path, HANDLERS)  # type: ignore[arg-type]
    await server.start()
    yield server
    await server.stop()


async def test_call_answers(server: ControlServer, socket_path: Path) -> None:
    client = ControlClient(socket_path)
    assert await asyncio.to_thread(client.call, "add", left=2, right=3) == 5


async def test_stream_yields_all_items(server: ControlServer, socket_path: Path) -> None:
    client = ControlClient(socket_path)
    assert await asyncio.to_thread(lambda: list(client.stream("count", to=1000))) == list(range(1000))


async def test_error_keeps_class_message_and_hint(server: ControlServer, socket_path: Path) -> None:
    client = ControlClient(socket_path)
    with pytest.raises(InputError) as caught:
        await asyncio.to_thread(client.call, "refuse")
    assert (caught.value.message, caught.value.hint) == ("tensor 'x' has shape [2]", "send [3]")


async def test_unknown_call_gets_a_suggestion(server: ControlServer, socket_path: Path) -> None:
    client = ControlClient(socket_path)
    with pytest.raises(ControlError, match="did you mean 'count'"):
        await asyncio.to_thread(client.call, "coutn")


async def test_wrong_argument_and_a_defect_are_errors_not_hangs(server: ControlServer, socket_path: Path) -> None:
    client = ControlClient(socket_path)
    with pytest.raises(ControlError, match="not valid"):
        await asyncio.to_thread(client.call, "add", left=2)
    with pytest.raises(ControlError, match="internal error: RuntimeError: a defect"):
        await asyncio.to_thread(client.call, "explode")


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b'{"args":{}}', b"\xff\xfe", b'{"call":1}'])
async def test_garbage_is_answered_and_the_server_goes_on(
    server: ControlServer, socket_path: Path, body: bytes
) -> None:
    def send() -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path))
            connection.sendall(struct.pack("<I", len(body)) + body)
            size = struct.unpack("<I", connection.recv(4))[0]
            answer: dict[str, Any] = json.loads(connection.recv(size))
            return answer

    assert "error" in await asyncio.to_thread(send)
    assert await asyncio.to_thread(ControlClient(socket_path).call, "add", left=1, right=1) == 2


async def test_a_huge_frame_is_refused(server: ControlServer, socket_path: Path) -> None:
    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path))
            connection.sendall(struct.pack("<I", 0xFFFFFFFF))
            return connection.recv(4096)

    assert b"too large" in await asyncio.to_thread(send)


async def test_second_daemon_is_refused_but_a_stale_socket_is_not(server: ControlServer, socket_path: Path) -> None:
    with pytest.raises(ControlError, match="another millhand daemon"):
        await ControlServer(socket_path, {}).start()
    await server.stop()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path))
    stale.close()
    again = ControlServer(socket_path, {})
    await again.start()
    await again.stop()


def test_no_daemon_is_said_plainly(socket_path: Path) -> None:
    with pytest.raises(ControlError) as caught:
        ControlClient(socket_path).call("state")
    assert "no daemon answers" in caught.value.message
    assert "millhand run" in caught.value.hint


def test_a_path_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(ControlError, match="longer than 107 bytes"):
        check_socket_path(Path("/" + "x" * 120))


def test_errors_of_other_modules_with_the_same_code_do_not_hide_the_agents() -> None:
    import millhand.serving.grpc.status  # noqa: F401 - has an error of its own with the code `refused`
    from millhand.control import error_from_dict
    from millhand.errors import RefusedError

    error = error_from_dict({"code": "refused", "message": "no", "hint": "ask otherwise", "retriable": False})
    assert type(error) is RefusedError and (error.message, error.hint) == ("no", "ask otherwise")
