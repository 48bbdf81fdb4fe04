"""What the serving tests share: models made on the fly, and waiting for a condition."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millhand.registry import Registry
from millhand.serving.blackbox import Blackbox
from millhand.serving.blocking_client import BlockingWorkerClient

KIT = Path(__file__).parent
KIT_PATH = os.pathsep.join(filter(None, [os.fspath(KIT), os.environ.get("PYTHONPATH", "")]))
"""What a worker of the tests imports from: the caller's own places stay."""


def backends() -> Registry:
    """The onnxruntime plugin and the test's own, which no entry point names."""
    registry = Registry()
    registry._points["faulty"] = EntryPoint("faulty", "millhand_faulty", "millhand")
    registry.load({"onnxruntime": {}, "faulty": {}})
    return registry


class Worker:
    """A worker process without a pool around it."""

    def __init__(self, folder: Path, audit: str = "") -> None:
        near, far = socket.socketpair()
        self.path = folder / "worker.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self.path))
        listener.listen(64)
        self.blackbox, fd = Blackbox.create()
        names = {"control_fd": far.fileno(), "blackbox_fd": fd, "listen_fd": listener.fileno()}
        start = [audit] if audit else ["from millhand.serving.worker import main; main()"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", *start, json.dumps({"name": "test", **names})],
            pass_fds=list(names.values()),
            env={**os.environ, "PYTHONPATH": KIT_PATH, "HOME": os.fspath(folder)},
        )
        far.close()
        listener.close()
        os.close(fd)
        self.control = BlockingWorkerClient(near, "test")

    def load(self, name: str, backend: str, artifact: Path, **options: Any) -> Any:
        module = "millhand_plugins.onnxruntime" if backend == "onnxruntime" else "millhand_faulty"
        x = {"x": ["float32", [-1, 2]]}
        y = options.pop("outputs", {"y": ["float32", [-1, 2]]})
        base = {"model": name, "version": 1, "artifact": str(artifact), "backend": backend, "module": module}
        return self.control.call("load", **{**base, "inputs": x, "outputs": y, "max_batch": 8, **options})

    def stop(self) -> None:
        self.control.close()
        self.process.wait(60)
        self.blackbox.close()


def save_onnx(path: Path, nodes: list[Any], inputs: Any, outputs: Any, weights: list[Any] | None = None) -> None:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def identity(path: Path, columns: int | None = 2, kind: int = TensorProto.FLOAT) -> None:
    shape = ["n", columns]
    save_onnx(path, [helper.make_node("Identity", ["x"], ["y"])], [value("x", shape, kind)], [value("y", shape, kind)])


def scale(path: Path, factor: float) -> None:
    """y = x @ (factor * I), 2 columns: tells versions apart."""
    weight = numpy_helper.from_array(np.eye(2, dtype=np.float32) * np.float32(factor), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    save_onnx(path, nodes, [value("x", ["n", 2])], [value("y", ["n", 2])], [weight])


def write_model(
    root: Path,
    name: str,
    *,
    backend: str = "onnxruntime",
    datatype: str = "FP32",
    columns: int = 2,
    outputs: dict[str, tuple[str, int]] | None = None,
    extra: str = "",
) -> Path:
    """Write model.toml (x -> y, `columns` wide) and return the model's folder."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    artifact = "model.onnx" if backend == "onnxruntime" else "model.json"
    lines = [
        f'name = "{name}"',
        'description = "made by a test"',
        'licence = "Apache-2.0"',
        f'backend = "{backend}"',
        f'artifact = "{artifact}"',
        extra,
        f'[[inputs]]\nname = "x"\ndatatype = "{datatype}"\nshape = [-1, {columns}]',
    ]
    for output, (kind, width) in (outputs or {"y": (datatype, columns)}).items():
        lines.append(f'[[outputs]]\nname = "{output}"\ndatatype = "{kind}"\nshape = [-1, {width}]')
    (folder / "model.toml").write_text("\n".join(lines) + "\n")
    return folder


def write_faulty(root: Path, name: str, *, extra: str = "", versions: dict[int, str] | None = None) -> Path:
    """A model of the faulty backend; `versions`: number -> what its load does ("", die, hang, raise, hold <MiB>)."""
    folder = write_model(root, name, backend="faulty", extra=extra)
    for number, load in (versions or {1: ""}).items():
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "model.json").write_text(json.dumps({"load": load}))
    return folder


def action(number: float, rows: int = 1) -> dict[str, Any]:
    """An input that makes the faulty backend do something."""
    return {"x": np.full((rows, 2), number, dtype=np.float32)}


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Wait for a condition with a deadline."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true in time")
