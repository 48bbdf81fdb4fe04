"""A server that speaks Open Inference Protocol v2 on a raw socket, honestly until a test says otherwise."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand_plugins.remote.backend import RemoteBackend, RemoteSession
from millhand_plugins.remote.settings import RemoteSettings

SPECS = {"x": ("float32", (-1, 2))}, {"y": ("float32", (-1, 2))}


class Request:
    """One request as the server read it."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body
        size = int(headers.get("inference-header-content-length", len(body)))
        self.json: Any = json.loads(body[:size]) if size else None
        self.binary = "inference-header-content-length" in headers
        self.tail = body[size:]

    def x(self) -> Any:
        tensor = self.json["inputs"][0]
        flat = np.frombuffer(self.tail, "<f4") if self.binary else np.array(tensor["data"], np.float32)
        return flat.reshape(tensor["shape"])


def http(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; a header with the value "" is left out."""
    fields = {"content_length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode() + body


def twice(request: Request, **changes: Any) -> bytes:
    """The honest answer y = 2 x, in the form that was asked for."""
    y = (2 * request.x()).astype("<f4")
    output: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": list(y.shape)}
    output |= {"parameters": {"binary_data_size": y.nbytes}} if request.binary else {"data": y.ravel().tolist()}
    answer = {"model_name": "press", "model_version": "1", "id": request.json["id"], "outputs": [output], **changes}
    head = json.dumps(answer).encode()
    if request.binary:
        return http(head + y.tobytes(), Inference_Header_Content_Length=str(len(head)))
    return http(head)


Answer = Callable[[socket.socket, Request], "bytes | None"]


class Server:
    """`infer`, `metadata` and `server` answer; None closes the connection. Keeps what it `got`."""

    http = staticmethod(http)
    twice = staticmethod(twice)

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.got: list[Request] = []
        self.connections = 0
        self.extensions = ["binary_tensor_data"]
        tensors = {"inputs": self.tensor("x"), "outputs": self.tensor("y")}
        self.described: dict[str, Any] = {"name": "press", "versions": ["1"], "platform": "test", **tensors}
        self.infer: Answer = lambda _, request: twice(request)
        self.metadata: Answer = lambda *_: http(json.dumps(self.described).encode())
        self.server: Answer = lambda *_: http(json.dumps({"name": "s", "extensions": self.extensions}).encode())
        self._context = context
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @staticmethod
    def tensor(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (-1, 2)) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": list(shape)}]

    @property
    def serving(self) -> bool:
        """Whether a connection is open."""
        return any(thread.is_alive() for thread in self._threads[1:])

    @property
    def inferred(self) -> list[Request]:
        return [request for request in self.got if request.path.endswith("/infer")]

    def stop(self) -> None:
        """Close the port and every connection, as a crash would."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def drop(self) -> None:
        """Close every connection."""
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            with connection, connection.makefile("rb") as reader:
                while (request := _read(reader)) is not None:
                    self.got.append(request)
                    answer = self._answer(connection, request)
                    if answer is None:
                        return
                    connection.sendall(answer)
        except OSError:
            connection.close()

    def _answer(self, connection: socket.socket, request: Request) -> bytes | None:
        if request.path.endswith("/infer"):
            return self.infer(connection, request)
        return (self.server if request.path == "/v2" else self.metadata)(connection, request)


def _read(reader: Any) -> Request | None:
    first = reader.readline()
    if not first:
        return None
    method, path, _ = first.decode().split(" ")
    headers = {}
    while (line := reader.readline().decode().strip()) != "":
        name, value = line.split(":", 1)
        headers[name.lower()] = value.strip()
    return Request(method, path, headers, reader.read(int(headers.get("content-length", 0))))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def second_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def scale(path: Path, factor: float) -> None:
    """An ONNX model y = factor * x."""
    weight = numpy_helper.from_array(np.float32(factor).reshape(1), "w")
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [weight])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)


@pytest.fixture
def onnx_scale() -> Callable[[Path, float], None]:
    return scale


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RemoteSession]]:
    """Load a session: URLs, `fallback` for a local y = 3 x, lines and model for upstream.toml, options as keywords."""
    sessions: list[RemoteSession] = []

    def load(
        *urls: str,
        fallback: bool = False,
        model: str = "press",
        lines: str = "",
        specs: Any = SPECS,
        **options: Any,
    ) -> RemoteSession:
        artifact = tmp_path / "upstream.toml"
        text = f"urls = {json.dumps(urls)}\nmodel = '{model}'\n{lines}\n"
        if fallback:
            scale(tmp_path / "model.onnx", 3)
            text += '[fallback]\nbackend = "onnxruntime"\nartifact = "model.onnx"\n'
        artifact.write_text(text)
        hosts = tuple(options.pop("hosts", ("127.0.0.1", "localhost")))
        settings = RemoteSettings(hosts=hosts, **options).model_dump(mode="json")
        session = RemoteBackend(hosts).load_declared(artifact, "cpu", {**settings, "threads": 1}, *specs)
        sessions.append(session)
        return session

    yield load
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA of our own (ca.pem) and a server's certificate for 127.0.0.1 from it (server.pem, server.key)."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("tls")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    for arguments in (
        ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Plant CA"],
        ["-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=plant", *signed],
    ):
        subprocess.run(
            ["openssl", "req", "-x509", *new_key, *arguments], cwd=folder, check=True, capture_output=True, timeout=30
        )
    return folder
