"""ONNX files: small nets, nets that must be refused, and the shipped models with int8 and int4 weights.

The quantised ones have the form that engines need; nothing is said about their accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millhand.serving.tensors import Specs
from millhand.workshop.recipe import Target

SM80 = Target(name="sm80", accelerator="", compute_capability="8.0", precisions=("fp16", "int8", "bf16", "fp32"))
ORIN = Target(name="sm87", accelerator="GPU-1", compute_capability="8.7", precisions=("fp16", "int8", "fp32"))
FEATURES: Specs = {"x": ("float32", (-1, 44))}
PLUGINS = Path(__file__).parents[3]
SHIPPED = sorted(PLUGINS.glob("*/models/*/*/*.onnx"))
"""Every model that the project ships."""
BLOCK = 32
RANDOM = np.random.default_rng(5)


def model_name(path: Path) -> str:
    return path.parts[-3]


def specs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A file's inputs as model.toml would declare them."""
    found = {}
    for info in onnx.load(path).graph.input:
        kind = info.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        found[info.name] = (dtype, tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim))
    return found


def save(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[Any] = ("batch", 44),
    out: Sequence[Any] = ("batch", 64),
    *,
    weights: dict[str, Any] | None = None,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Write a net with input `x` and output `y`."""
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in (weights or {}).items()
    ]
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", kind, out)
    graph = helper.make_graph(list(nodes), "net", [x], [y], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, **keys)
    return path


def matmul(path: Path, **keys: Any) -> Path:
    """y = x w, `x` [batch, 44]."""
    weights = {"w": RANDOM.standard_normal((44, 64)).astype(np.float32)}
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], weights=weights, **keys)


def convolution(path: Path) -> Path:
    """`x` [batch, 2, frames], free in both."""
    weights = {"k": RANDOM.standard_normal((4, 2, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "k"], ["y"], name="conv", pads=[1, 1])
    return save(path, [node], ("batch", 2, "frames"), ("batch", 4, "frames"), weights=weights)


def half(source: Path, path: Path) -> Path:
    """The whole model in half precision, with casts at its inputs and outputs."""
    model = onnx.load(source)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    inner = {info.name: f"{info.name}_half" for info in (*graph.input, *graph.output)}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    for info in graph.input:
        graph.node.insert(
            0, helper.make_node("Cast", [info.name], [inner[info.name]], name="to_half", to=TensorProto.FLOAT16)
        )
    for info in graph.output:
        graph.node.append(
            helper.make_node("Cast", [inner[info.name]], [info.name], name="from_half", to=TensorProto.FLOAT)
        )
    del graph.value_info[:]
    onnx.save(model, path)
    return path


def quantised(source: Path, path: Path, bits: int) -> Path:
    """The model with each Gemm's weights in int8 per channel and its input too, or with weights in blocks of int4."""
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights:
            array = numpy_helper.to_array(weights[node.input[1]])
            transposed = any(item.name == "transB" and item.i for item in node.attribute)
            added = _int8(node, array, transposed) if bits == 8 else _int4(node, array, transposed)
            if added is not None:
                nodes += added[0]
                model.graph.initializer.extend(added[1])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 21))
    model.ir_version = 10
    onnx.save(model, path)
    return path


def _int8(node: Any, array: np.ndarray, transposed: bool) -> tuple[list[Any], list[Any]]:
    axis = 0 if transposed else 1
    scale = (np.abs(array).max(axis=1 - axis) / 127 + 1e-8).astype(np.float32)
    codes = np.clip(np.round(array / np.expand_dims(scale, 1 - axis)), -127, 127).astype(np.int8)
    prefix, x = node.output[0], node.input[0]
    tensors = [
        numpy_helper.from_array(codes, f"{prefix}_codes"),
        numpy_helper.from_array(scale, f"{prefix}_scale"),
        numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{prefix}_zero"),
        numpy_helper.from_array(np.float32(0.05), f"{prefix}_in_scale"),
        numpy_helper.from_array(np.int8(0), f"{prefix}_in_zero"),
    ]
    weight = [tensor.name for tensor in tensors[:3]]
    entry = [tensor.name for tensor in tensors[3:]]
    added = [
        helper.make_node("QuantizeLinear", [x, *entry], [f"{prefix}_q"], name=f"{prefix}_quantise"),
        helper.make_node("DequantizeLinear", [f"{prefix}_q", *entry], [f"{prefix}_x"], name=f"{prefix}_dequantise"),
        helper.make_node("DequantizeLinear", weight, [f"{prefix}_w"], name=f"{prefix}_weights", axis=axis),
    ]
    node.input[0], node.input[1] = f"{prefix}_x", f"{prefix}_w"
    return added, tensors


def _int4(node: Any, array: np.ndarray, transposed: bool) -> tuple[list[Any], list[Any]] | None:
    axis = 1 if transposed else 0
    rows = array.shape[axis]
    size = next((size for size in range(min(BLOCK, rows // 2), 1, -1) if rows % size == 0), 0)
    if not size:
        return None
    blocks = np.moveaxis(array, axis, 0).reshape(rows // size, size, -1)
    scale = (np.abs(blocks).max(axis=1) / 7 + 1e-8).astype(np.float32)
    codes = np.clip(np.round(blocks / scale[:, None]), -8, 7).reshape(rows, -1)
    codes, scale = np.moveaxis(codes, 0, axis), np.moveaxis(scale, 0, axis)
    prefix = node.output[0]
    tensors = [
        helper.make_tensor(f"{prefix}_codes", TensorProto.INT4, codes.shape, codes.astype(int).ravel().tolist()),
        numpy_helper.from_array(np.ascontiguousarray(scale), f"{prefix}_scale"),
    ]
    names = [tensor.name for tensor in tensors]
    made = helper.make_node(
        "DequantizeLinear", names, [f"{prefix}_w"], name=f"{prefix}_weights", axis=axis, block_size=size
    )
    node.input[1] = f"{prefix}_w"
    return [made], tensors
