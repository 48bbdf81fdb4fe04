"""Weights of a few bits in an ONNX file: MatMulNBits of ONNX Runtime, and DequantizeLinear by blocks of ONNX itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from millhand_plugins.quantize.graph import Graph, Layer
from millhand_plugins.quantize.grid import Grid

BITS = 4
MIDDLE = 1 << (BITS - 1)
COMPUTE = {"float32": 1, "int8": 4}
"""`accuracy_level` of MatMulNBits: what the products are computed in on the CPU."""


def write_matmul_nbits(graph: Graph, layer: Layer, grid: Grid, integers: NDArray[Any], compute: str) -> None:
    """Gemm and MatMul become MatMulNBits, and an Add where there is a bias. Levels are 0 to 15.

    Written to the operator's schema (com.microsoft, version 1): B is [outputs, blocks, bytes], the lower half of a byte
    first; zero points are packed by output.
    """
    inputs = integers.shape[1]
    names = [_input(graph, layer), graph.add(f"{layer.name}/levels", _packed(_blocked(integers, grid.block, MIDDLE)))]
    names.append(graph.add(f"{layer.name}/scales", np.asarray(grid.scale, np.float32).reshape(-1)))
    zeros = grid.zero_points
    if (zeros != MIDDLE).any():
        zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
        names.append(graph.add(f"{layer.name}/zeros", _packed(zeros).reshape(-1)))
    product = layer.output if not layer.bias else f"{layer.output}/product"
    graph.needs("com.microsoft", 1)
    node = helper.make_node(
        "MatMulNBits", names, [product], layer.name, domain="com.microsoft", K=inputs, N=layer.outputs, bits=BITS,
        block_size=grid.block, accuracy_level=COMPUTE[compute],
    )  # fmt: skip
    graph.replace(layer.name, [node, *_bias(layer, product)])


def write_dequantized(graph: Graph, layer: Layer, grid: Grid, integers: NDArray[Any]) -> None:
    """int4 weights [inputs, outputs] with scales [blocks, outputs], dequantised before a MatMul.

    The graph has ONNX opset 21 at least.

    The block lies along the inputs, there is no zero point, and the inputs fill whole blocks: what TensorRT takes.
    A layer whose inputs do not is filled up with zeros, at run time too.
    """
    levels = _blocked(integers - MIDDLE, grid.block, 0).reshape(layer.outputs, -1).T
    packed = _packed(np.bitwise_and(levels.astype(np.int8), 15).reshape(-1)).tobytes()
    weights = helper.make_tensor("levels", TensorProto.INT4, levels.shape, packed, raw=True)
    scales = np.ascontiguousarray(np.asarray(grid.scale, np.float32).T)
    names = [graph.add(f"{layer.name}/levels", weights), graph.add(f"{layer.name}/scales", scales)]
    matrix, product = f"{layer.name}/restored", layer.output if not layer.bias else f"{layer.output}/product"
    data, filled = _input(graph, layer), []
    missing = levels.shape[0] - integers.shape[1]
    if missing:
        data = f"{layer.name}/filled"
        pads = graph.add(f"{layer.name}/pads", np.array([0, missing], np.int64))
        axes = graph.add(f"{layer.name}/axes", np.array([-1], np.int64))
        filled = [helper.make_node("Pad", [_input(graph, layer), pads, "", axes], [data], f"{layer.name}/fill")]
    nodes = [
        *filled,
        helper.make_node(
            "DequantizeLinear", names, [matrix], f"{layer.name}/dequantise", axis=0, block_size=grid.block
        ),
        helper.make_node("MatMul", [data, matrix], [product], layer.name),
        *_bias(layer, product),
    ]
    graph.replace(layer.name, nodes)


def store_half(graph: Graph, layer: Layer) -> None:
    """Keep a layer's weights as float16 and cast them to float32, which ONNX Runtime does once, at the load."""
    half = graph.add(f"{layer.name}/half", graph.weights(layer).astype(np.float16))
    weights = f"{layer.name}/restored"
    node = graph.node(layer.name)
    cast = helper.make_node("Cast", [half], [weights], f"{layer.name}/cast", to=TensorProto.FLOAT)
    node.input[1] = weights
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    graph.replace(layer.name, [cast, copied])


def _input(graph: Graph, layer: Layer) -> str:
    """What the layer reads now: int8 neighbours may have put another tensor there."""
    return str(graph.node(layer.name).input[0])


def _bias(layer: Layer, product: str) -> list[onnx.NodeProto]:
    if not layer.bias:
        return []
    return [helper.make_node("Add", [product, layer.bias], [layer.output], f"{layer.name}/bias")]


def _blocked(levels: NDArray[Any], block: int, fill: int) -> NDArray[Any]:
    """[outputs, blocks, block]; what fills the last block meets no input."""
    missing = -levels.shape[1] % block
    return np.pad(levels, ((0, 0), (0, missing)), constant_values=fill).reshape(len(levels), -1, block)


def _packed(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Two to a byte, the first in the lower half."""
    whole = levels.astype(np.uint8)
    return np.bitwise_or(whole[..., 0::2], whole[..., 1::2] * 16, dtype=np.uint8)
