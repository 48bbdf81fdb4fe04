"""The nets of the GPU benchmarks beside models.CNN, built with onnx.helper: the same bytes on every machine, untrained.

`vision` is a ResNet-18 (He et al. 2015, table 1, batch normalisation folded into the convolutions) for pictures of 64 x
64: 11.2 million parameters, 45 MB, 20 convolutions, 0.3 GFLOP a row. `integer` has a convolution that no GPU provider
of ONNX Runtime runs.
"""

from __future__ import annotations

import numpy as np
import onnx
from models import CNN, Net, cnn
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 8
OPSET = 17
VISION = Net("vision", "ResNet-18 for pictures of 64 x 64", (3, 64, 64), 10, 64)
INTEGER = Net("integer", "A convolution of 8-bit integers", (1, 2048), 4, 64)


class _Layers:
    """Nodes and seeded weights, each layer by name of the tensor that it takes."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def weigh(self, values: NDArray[np.float32]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, source: str, size_in: int, size: int, width: int, stride: int, gain: float = 1.0) -> str:
        shape = (size, size_in, width, width)
        scale = gain * np.sqrt(2 / (size_in * width * width))
        kernel = self.weigh((self._random.standard_normal(shape) * scale).astype(np.float32))
        bias = self.weigh((self._random.standard_normal(size) * 0.1).astype(np.float32))
        half = width // 2
        return self.add("Conv", source, kernel, bias, kernel_shape=[width] * 2, strides=[stride] * 2, pads=[half] * 4)

    def block(self, source: str, size_in: int, size: int, stride: int) -> str:
        """Two convolutions of 3 x 3 and the way around them."""
        inner = self.add("Relu", self.conv(source, size_in, size, 3, stride))
        outer = self.conv(inner, size, size, 3, 1, gain=0.5)
        around = source if stride == 1 else self.conv(source, size_in, size, 1, stride)
        return self.add("Relu", self.add("Add", outer, around))

    def model(self, net: Net) -> bytes:
        first = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["rows", *net.shape])
        last = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", net.classes])
        graph = helper.make_graph(self.nodes, net.name, [first], [last], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString(deterministic=True))


def vision(seed: int = 0) -> bytes:
    """The ONNX file of `VISION`."""
    layers = _Layers(seed)
    last = layers.add("Relu", layers.conv("input", 3, 64, 7, 2))
    last = layers.add("MaxPool", last, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    size_in = 64
    for size, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        last = layers.block(layers.block(last, size_in, size, stride), size, size, 1)
        size_in = size
    last = layers.add("Flatten", layers.add("GlobalAveragePool", last))
    matrix = np.random.default_rng(seed + 1).standard_normal((512, VISION.classes)) / np.sqrt(512)
    layers.add("Gemm", last, layers.weigh(matrix.astype(np.float32)), output="logits")
    return layers.model(VISION)


def integer() -> bytes:
    """The ONNX file of `INTEGER`."""
    layers = _Layers(0)
    eight = layers.add("Cast", "input", to=TensorProto.UINT8)
    kernel = layers.weigh(np.ones((INTEGER.classes, 1, 2048), dtype=np.uint8))
    whole = layers.add("ConvInteger", eight, kernel)
    layers.add("Flatten", layers.add("Cast", whole, to=TensorProto.FLOAT), output="logits")
    return layers.model(INTEGER)


ARTIFACTS = {CNN.name: cnn, VISION.name: vision}
