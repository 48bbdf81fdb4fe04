"""int8 in an ONNX file: QuantizeLinear and DequantizeLinear around what a backend shall compute on integers.

A pair stands only where an integer node reads, so that no float node waits for one. ONNX Runtime and TensorRT both
look for these patterns and put their integer kernels in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from millhand.errors import ModelError
from millhand_plugins.quantize.graph import Graph, Layer

SAME_SCALE = ("MaxPool", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")
"""They move numbers and compute none."""
SEVERAL = ("Add", "Concat")
FUSED = ("Relu", "Clip")
"""They become a limit of the range that the node before them writes to."""
PASSING = (*SAME_SCALE, *SEVERAL, *FUSED, "GlobalAveragePool", "AveragePool", "LeakyRelu")
"""What ONNX Runtime computes on int8 at least as fast as on float32, so that between integer layers no float is needed.
Sigmoid, Mul and the like are not among them: they are tables, or slow, there."""

BIAS_LEVELS = 1 << 30
Range = tuple[float, float]


@dataclass(frozen=True)
class Form:
    """What a backend wants int8 to look like."""

    levels: int
    """Of weights, on each side of 0: 127, or 63 where the CPU adds two products of 8 bits in 16."""
    symmetric: bool
    """Activations are int8 with 0 in the middle, else uint8."""
    chained: bool
    """Integer nodes hand integers to each other, biases are int32: ONNX Runtime. TensorRT fuses by itself."""


TENSORRT = Form(levels=127, symmetric=True, chained=False)


def insert(
    graph: Graph, layers: Sequence[Layer], ranges: Mapping[str, Range], form: Form, by_channel: Iterable[str]
) -> None:
    """Make the graph's layers integer, and with them what lies between them.

    ranges: of every tensor. by_channel: names of the layers whose weights get a scale for each output channel.
    """
    _Insertion(graph, layers, ranges, form).insert(set(by_channel))


def between(graph: Graph, layers: Iterable[str]) -> set[str]:
    """Nodes that only integer nodes feed, and that feed one."""
    layers = set(layers)
    nodes = {node.name: node for node in graph.model.graph.node}
    writer = {name: node.name for node in nodes.values() for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in nodes.values():
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    found = {name for name, node in nodes.items() if node.op_type in PASSING} - layers
    while True:
        integer = found | layers
        kept = {
            name
            for name in found
            if all(writer.get(tensor) in integer for tensor in _data(nodes[name]))
            and any(reader in integer for reader in readers.get(nodes[name].output[0], ()))
        }
        if kept == found:
            return found
        found = kept


class _Insertion:
    def __init__(self, graph: Graph, layers: Sequence[Layer], ranges: Mapping[str, Range], form: Form) -> None:
        self._graph, self._layers, self._ranges, self._form = graph, layers, ranges, form
        names = {layer.name for layer in layers}
        self._integer = names | (between(graph, names) if form.chained else set())
        self._writer = {name: node for node in graph.model.graph.node for name in node.output}
        self._scales: dict[str, tuple[str, str, np.float32]] = {}

    def insert(self, by_channel: set[str]) -> None:
        paired = self._paired()
        for tensor in paired:
            self._parameters(tensor)
        for tensor in paired:
            self._pair(tensor)
        for layer in self._layers:
            self._weigh(layer, layer.name in by_channel)

    def _paired(self) -> list[str]:
        """The tensors that get a pair, in the graph's order."""
        nodes = [node for node in self._graph.model.graph.node if node.name in self._integer]
        wanted = [tensor for node in nodes if node.op_type not in FUSED for tensor in _data(node)]
        if self._form.chained:
            names = {layer.name for layer in self._layers}
            ends = [(node, self._end(node.output[0])) for node in nodes if node.name in names]
            # ONNX Runtime has no integer convolution, and none fused with an activation, that answers in float.
            wanted += [end for node, end in ends if node.op_type == "Conv" or end != node.output[0]]
        return list(dict.fromkeys(wanted))

    def _end(self, tensor: str) -> str:
        """The tensor behind the activation that a node is fused with."""
        readers = self._graph.readers(tensor)
        outputs = {item.name for item in self._graph.model.graph.output}
        if len(readers) == 1 and readers[0].op_type in FUSED and tensor not in outputs:
            return self._end(readers[0].output[0])
        return tensor

    def _parameters(self, tensor: str) -> tuple[str, str, np.float32]:
        """Names of scale and zero point, and the scale."""
        if tensor not in self._scales:
            writer = self._writer.get(tensor)
            if writer is not None and writer.op_type in SAME_SCALE and writer.name in self._integer:
                self._scales[tensor] = self._parameters(writer.input[0])
            else:
                scale, zero = _activation_scale(*self._range(tensor), self._form.symmetric)
                names = [self._graph.add(f"{tensor}/{kind}", value) for kind, value in (("s", scale), ("z", zero))]
                self._scales[tensor] = (names[0], names[1], np.float32(scale))
        return self._scales[tensor]

    def _range(self, tensor: str) -> Range:
        if tensor not in self._ranges:
            raise ModelError(
                f"the range of tensor '{tensor}' is not known: its shape cannot be inferred",
                hint="export the model with standard ONNX operators, or take int8-dynamic",
            )
        return self._ranges[tensor]

    def _pair(self, tensor: str) -> None:
        """Quantise and dequantise a tensor for its integer readers, and for all where integers are what is written."""
        scale, zero, _ = self._parameters(tensor)
        writer = self._writer.get(tensor)
        readers = self._graph.readers(tensor)
        source, answer = tensor, f"{tensor}/dq"
        if self._is_integer(writer):
            if tensor in {item.name for item in self._graph.model.graph.output}:
                source, answer = f"{tensor}/float", tensor
                assert writer is not None
                writer.output[list(writer.output).index(tensor)] = source
        else:
            readers = [node for node in readers if node.name in self._integer]
        for node in readers:
            for place, name in enumerate(node.input):
                if name == tensor:
                    node.input[place] = answer
        pair = [
            helper.make_node("QuantizeLinear", [source, scale, zero], [f"{tensor}/q"], f"{tensor}/quantise"),
            helper.make_node("DequantizeLinear", [f"{tensor}/q", scale, zero], [answer], f"{tensor}/dequantise"),
        ]
        self._graph.insert_after(writer.name if writer is not None else "", pair)

    def _is_integer(self, node: onnx.NodeProto | None) -> bool:
        """Whether a node writes integers, in itself or fused with what is before it."""
        if node is None:
            return False
        if node.name in self._integer:
            return True
        return node.op_type in FUSED and self._is_integer(self._writer.get(node.input[0]))

    def _weigh(self, layer: Layer, by_channel: bool) -> None:
        """int8 weights around 0, and an int32 bias in the scale that the products have."""
        graph, node, biased = self._graph, self._graph.node(layer.name), self._is_biased(layer)
        weights = graph.weights(layer)
        others = tuple(place for place in range(weights.ndim) if place != layer.axis)
        largest = np.abs(weights).max(axis=others if by_channel else None)
        scale = (np.where(largest > 0, largest, 1) / self._form.levels).astype(np.float32)
        if biased:
            scale = np.maximum(scale, self._least_scale(layer, by_channel)).astype(np.float32)
        wide = np.expand_dims(scale, others) if by_channel else scale
        levels = np.clip(np.round(weights / wide), -self._form.levels, self._form.levels).astype(np.int8)
        node.input[1] = self._constant(f"{layer.name}/weights", levels, scale, layer.axis if by_channel else None)
        if biased:
            product = (scale * self._scales[layer.data][2]).astype(np.float32)
            whole = np.round(graph.array(layer.bias).reshape(-1) / product).astype(np.int32)
            node.input[2] = self._constant(f"{layer.name}/bias", whole, product, 0 if by_channel else None)

    def _is_biased(self, layer: Layer) -> bool:
        """Whether its bias becomes int32: constant, one number for each output."""
        bias = self._graph.initializers.get(layer.bias)
        return self._form.chained and bias is not None and int(np.prod(bias.dims)) == layer.outputs

    def _least_scale(self, layer: Layer, by_channel: bool) -> NDArray[np.float32]:
        """What keeps the bias within int32 where weights and inputs are tiny."""
        bias = np.abs(self._graph.array(layer.bias)).reshape(-1)
        return np.asarray((bias if by_channel else bias.max()) / (self._scales[layer.data][2] * BIAS_LEVELS))

    def _constant(self, name: str, levels: NDArray[np.generic], scale: NDArray[np.float32], axis: int | None) -> str:
        """An integer constant with its DequantizeLinear; returns the float tensor."""
        zeros = np.zeros(scale.shape, levels.dtype)
        names = [
            self._graph.add(f"{name}/{kind}", value) for kind, value in (("q", levels), ("s", scale), ("z", zeros))
        ]
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        node = helper.make_node("DequantizeLinear", names, [f"{name}/dq"], f"{name}/dequantise", **attributes)
        self._graph.insert_after("", [node])
        return f"{name}/dq"


def _data(node: onnx.NodeProto) -> list[str]:
    """The inputs that are activations."""
    return list(node.input) if node.op_type in SEVERAL else [node.input[0]]


def _activation_scale(low: float, high: float, symmetric: bool) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    """Scale and zero point of a tensor; 0 is always a level, so that padding and Relu are exact."""
    if symmetric:
        scale = np.float32(max(abs(low), abs(high), 1e-12) / 127)
        return np.asarray(scale), np.asarray(0, np.int8)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-12) / 255)
    return np.asarray(scale), np.asarray(np.clip(np.round(-low / scale), 0, 255), np.uint8)
