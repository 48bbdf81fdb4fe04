"""An ONNX model in memory: every node named, its weighted layers found. Imported by makers alone: it needs onnx."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper, version_converter

from millhand.errors import ModelError

OLDEST_OPSET, NEWEST_OPSET = 13, 24
"""13: QuantizeLinear by channel. 24: the newest that ONNX Runtime 1.32 has kernels for on the CPU."""
LINEAR, CONVOLUTION = ("Gemm", "MatMul"), ("Conv",)
RECURRENT = ("LSTM", "GRU", "RNN", "ConvTranspose", "Attention")
"""Operators with weights that no recipe touches; they are named in a candidate's notes."""
INLINE_BYTES = 1 << 30
"""Larger files keep their tensors beside them: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Layer:
    """A node with constant float32 weights that a recipe may make smaller."""

    name: str
    operator: str
    data: str
    """The tensor that comes in."""
    weight: str
    """The initializer."""
    bias: str
    """The bias's tensor; empty without one."""
    output: str
    outputs: int
    """Output channels."""
    size: int
    """Number of weights."""
    axis: int
    """Of the weights: the output channels."""

    @property
    def linear(self) -> bool:
        return self.operator in LINEAR


class Graph:
    """A model to be changed in place. The file that it was read from is never written to."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        _name_nodes(model.graph)
        _lift_constants(model.graph)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Raises ModelError naming the file and what of it cannot be quantised."""
        try:
            model = onnx.load(str(path), load_external_data=False)
        except OSError as error:
            raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="check path and permissions") from error
        except (DecodeError, ValueError) as error:
            raise ModelError(f"'{path}' is not an ONNX model: {error}", hint="export it again") from error
        _check_opset(model, path)
        _load_external(model, path)
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "QLinearConv", "QLinearMatMul"):
                raise ModelError(
                    f"'{path}': node '{node.name or node.output[0]}' ({node.op_type}) is quantised already",
                    hint="begin from the float32 model",
                )
        return cls(model)

    @property
    def opset(self) -> int:
        return next(int(item.version) for item in self.model.opset_import if item.domain in ("", "ai.onnx"))

    def copy(self) -> Graph:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model)

    def upgraded(self, opset: int) -> Graph:
        """This graph, or one with the operators of a newer opset. Raises ModelError where ONNX cannot convert it."""
        if self.opset >= opset:
            return self
        try:
            model = version_converter.convert_version(self.model, opset)
            model.ir_version = max(model.ir_version, helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])
            return Graph(model)
        except Exception as error:
            raise ModelError(
                f"the model cannot be converted from ONNX opset {self.opset} to {opset}: {str(error)[:300]}",
                hint=f"export it with opset {opset}",
            ) from error

    def layers(self) -> list[Layer]:
        """The weighted layers of the main graph, in its order."""
        found = (self._layer(node) for node in self.model.graph.node)
        return [layer for layer in found if layer is not None]

    def untouched(self) -> list[str]:
        """`name (operator)` of nodes with weights that are no layers here, those of inner graphs among them."""
        known = {layer.name for layer in self.layers()}
        constants = {tensor.name for graph in _all_graphs(self.model.graph) for tensor in graph.initializer}
        weighted = (*LINEAR, *CONVOLUTION, *RECURRENT)
        names = [
            f"{node.name or node.output[0]} ({node.op_type})"
            for node in _all_nodes(self.model.graph)
            if node.op_type in weighted and node.name not in known and constants & set(node.input[1:])
        ]
        return sorted(set(names))

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if node.name == name)

    def weights(self, layer: Layer) -> NDArray[np.float32]:
        """As the file holds them."""
        return self.array(layer.weight)

    def matrix(self, layer: Layer) -> NDArray[np.float32]:
        """[outputs, inputs]; a convolution's inputs are channels and kernel places together."""
        weights = self.weights(layer)
        return np.ascontiguousarray(weights.T if layer.axis else weights).reshape(layer.outputs, -1)

    def set_matrix(self, layer: Layer, matrix: NDArray[np.float32]) -> None:
        """Put other weights in the place of a linear layer's; other nodes that share them keep the old ones."""
        weights = np.ascontiguousarray(matrix.T if layer.axis else matrix).astype(np.float32)
        node = self.node(layer.name)
        node.input[1] = self.add(f"{layer.name}/weights", weights)

    def add(self, name: str, array: NDArray[Any] | TensorProto) -> str:
        """Add an initializer; returns the name that it got."""
        while name in self.initializers:
            name += "_"
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(array, name)
        tensor.name = name
        self.model.graph.initializer.append(tensor)
        self.initializers[name] = self.model.graph.initializer[-1]
        return name

    def replace(self, name: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes in the place of one."""
        kept: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            kept.extend(nodes if node.name == name else [node])
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)

    def insert_before(self, name: str, node: onnx.NodeProto) -> None:
        """Put a node before another, and with it before all that follow."""
        self.model.graph.node.insert(self._place(name), node)

    def insert_after(self, name: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes after another, or first of all where `name` is empty."""
        place = self._place(name) + 1 if name else 0
        for node in reversed(nodes):
            self.model.graph.node.insert(place, node)

    def array(self, name: str) -> NDArray[Any]:
        """An initializer's numbers."""
        return np.asarray(numpy_helper.to_array(self.initializers[name]))

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if tensor in node.input]

    def needs(self, domain: str, version: int) -> None:
        """Import an operator set, at least in this version."""
        for item in self.model.opset_import:
            if item.domain == domain or (domain == "" and item.domain == "ai.onnx"):
                item.version = max(item.version, version)
                return
        self.model.opset_import.append(helper.make_opsetid(domain, version))

    def write(self, path: Path) -> None:
        """Drop what no node uses and write the file; large tensors go beside it. Raises ModelError if it is damaged."""
        self._tidy()
        try:
            if self.large:
                onnx.save(self.model, str(path), save_as_external_data=True, location=f"{path.name}.data")
                external_data_helper.load_external_data_for_model(self.model, str(path.parent))  # it was taken out
            else:
                path.write_bytes(self.model.SerializeToString())
        except (OSError, EncodeError, ValueError) as error:
            raise ModelError(f"'{path}' cannot be written: {error}", hint="make room on the disk") from error

    def _place(self, name: str) -> int:
        return next(place for place, node in enumerate(self.model.graph.node) if node.name == name)

    @property
    def large(self) -> bool:
        """Whether its tensors lie beside the file."""
        return sum(tensor.ByteSize() for tensor in self.model.graph.initializer) > INLINE_BYTES

    def _tidy(self) -> None:
        graph = self.model.graph
        used = {name for node in _all_nodes(graph) for name in node.input} | {item.name for item in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [item for item in graph.input if item.name in used or item.name not in self.initializers]
        del graph.input[:]
        graph.input.extend(inputs)
        del graph.value_info[:]
        domains = {node.domain.removeprefix("ai.onnx") for node in _all_nodes(graph)} | {""}
        imports = [item for item in self.model.opset_import if item.domain.removeprefix("ai.onnx") in domains]
        del self.model.opset_import[:]
        self.model.opset_import.extend(imports)

    def _layer(self, node: onnx.NodeProto) -> Layer | None:
        if node.op_type not in (*LINEAR, *CONVOLUTION) or node.domain not in ("", "ai.onnx"):
            return None
        tensor = self.initializers.get(node.input[1])
        if tensor is None or tensor.data_type != TensorProto.FLOAT or node.input[0] in self.initializers:
            return None
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Gemm" and (
            attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0)
        ):
            return None
        if node.op_type in LINEAR and len(tensor.dims) != 2:
            return None
        axis = 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB", 0)) else 0
        return Layer(
            name=node.name,
            operator=node.op_type,
            data=node.input[0],
            weight=node.input[1],
            bias=node.input[2] if len(node.input) > 2 else "",
            output=node.output[0],
            outputs=int(tensor.dims[axis]),
            size=int(np.prod(tensor.dims)),
            axis=axis,
        )


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    if not versions or not model.graph.node:
        raise ModelError(f"'{path}' is not an ONNX model: it has no graph", hint="export it again")
    if not OLDEST_OPSET <= versions[0] <= NEWEST_OPSET:
        raise ModelError(
            f"'{path}' uses ONNX opset {versions[0]}; {OLDEST_OPSET} to {NEWEST_OPSET} can be quantised",
            hint="export it again with opset 17, or convert it with onnx.version_converter",
        )


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    for tensor in model.graph.initializer:
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = external_data_helper.ExternalDataInfo(tensor).location
        if not (path.parent / location).is_file():
            raise ModelError(
                f"'{path}': the data of tensor '{tensor.name}' should lie in '{location}', which does not exist",
                hint="copy the model's data files into the version's folder, beside the .onnx file",
            )
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"'{path}': its external data cannot be read: {error}", hint="copy its files again") from error


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give each node of the main graph a name of its own."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        name = node.name or (node.output[0] if node.output else f"{node.op_type}_{number}")
        while name in taken:
            name += "_"
        node.name = name
        taken.add(name)


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes with a tensor become initializers."""
    kept = []
    for node in graph.node:
        value = next((item.t for item in node.attribute if item.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in _all_graphs(graph):
        yield from one.node


def _all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside it: the branches and bodies of If, Loop and Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _all_graphs(inner)
