"""What the serving tests share: models made on the fly, and waiting for a condition."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millhand.registry import Registry

KIT = Path(__file__).parent


def backends() -> Registry:
    """The onnxruntime plugin and the test's own, which no entry point names."""
    registry = Registry()
    registry._points["faulty"] = EntryPoint("faulty", "millhand_faulty", "millhand")
    registry.load({"onnxruntime": {}, "faulty": {}})
    return registry


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
    """A model of the faulty backend; `versions`: number -> what its load does ("", die, hang, raise)."""
    folder = write_model(root, name, backend="faulty", extra=extra)
    for number, load in (versions or {1: ""}).items():
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "model.json").write_text(json.dumps({"load": load}))
    return folder


def action(number: float, rows: int = 1) -> dict[str, Any]:
    """An input that makes the faulty backend do something."""
    return {"x": np.full((rows, 2), number, dtype=np.float32)}


async def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
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
