"""The models of the serving benchmarks, built with onnx.helper and NumPy: the same bytes on every machine.

`cnn` is a small vibration classifier: convolutions over 2,048 samples, 362,692 parameters, 1.4 MB, a third of a
millisecond a row on one core. `mlp` is bound by its weights (19 MB): one row reads them all, 32 rows hardly more often,
so that batching pays. Neither is trained: a load needs arithmetic, not sense.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 8
OPSET = 17
MODEL_TOML = """\
name = "{name}"
description = "{description}"
licence = "Apache-2.0"
max_batch = {max_batch}
{extra}
[[inputs]]
name = "input"
shape = [-1, {shape}]

[[outputs]]
name = "logits"
shape = [-1, {classes}]
"""


@dataclass(frozen=True)
class Net:
    """What a benchmark must know of a model: `shape` is one row's, float32; the output is `logits` [rows, classes]."""

    name: str
    description: str
    shape: tuple[int, ...]
    classes: int
    max_batch: int

    def rows(self, count: int, seed: int = 1) -> NDArray[np.float32]:
        """Input rows [count, *shape], standard normal, rounded to 6 decimals as a client's JSON would hold them."""
        rows = np.random.default_rng(seed).standard_normal((count, *self.shape))
        return rows.round(6).astype(np.float32)


CNN = Net("cnn", "1D convolutions over a vibration snapshot", (1, 2048), 4, 64)
MLP = Net("mlp", "Three wide layers, bound by their weights", (64,), 16, 32)


class Graph:
    """Collects nodes and seeded weights; each layer takes the last one's output."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._last = "input"

    def conv(self, channels_in: int, channels: int, width: int, stride: int) -> None:
        weights = self._weigh((channels, channels_in, width), channels_in * width)
        self._add("Conv", weights, kernel_shape=[width], strides=[stride], pads=[width // 2, width // 2])
        self._add("Relu", [])

    def gemm(self, size_in: int, size: int, output: str = "") -> None:
        self._add("Gemm", self._weigh((size_in, size), size_in), output)

    def plain(self, operator: str) -> None:
        self._add(operator, [])

    def model(self, net: Net) -> bytes:
        first = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["rows", *net.shape])
        last = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", net.classes])
        graph = helper.make_graph(self._nodes, net.name, [first], [last], self._weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString(deterministic=True))

    def _weigh(self, shape: tuple[int, ...], fan_in: int) -> list[str]:
        """Weights by He's rule, so that values keep their size through the layers, and small biases."""
        bias = shape[0] if len(shape) == 3 else shape[1]
        names = []
        for kind, size, scale in (("w", shape, np.sqrt(2 / fan_in)), ("b", (bias,), 0.1)):
            values = (self._random.standard_normal(size) * scale).astype(np.float32)
            names.append(f"{kind}{len(self._weights)}")
            self._weights.append(numpy_helper.from_array(values, names[-1]))
        return names

    def _add(self, operator: str, weights: list[str], output: str = "", **attributes: list[int]) -> None:
        output = output or f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, [self._last, *weights], [output], **attributes))
        self._last = output


def cnn(seed: int = 0) -> bytes:
    """The ONNX file of `CNN`; another seed gives a version with other answers."""
    graph = Graph(seed)
    channels_in = 1
    for channels, width, stride in ((64, 15, 8), (128, 7, 4), (192, 5, 2), (256, 3, 2)):
        graph.conv(channels_in, channels, width, stride)
        channels_in = channels
    graph.plain("GlobalAveragePool")
    graph.plain("Flatten")
    graph.gemm(256, 128)
    graph.plain("Relu")
    graph.gemm(128, CNN.classes, "logits")
    return graph.model(CNN)


def mlp(seed: int = 0) -> bytes:
    """The ONNX file of `MLP`."""
    graph = Graph(seed)
    for size_in, size in ((64, 1536), (1536, 1536), (1536, 1472)):
        graph.gemm(size_in, size)
        graph.plain("Relu")
    graph.gemm(1472, MLP.classes, "logits")
    return graph.model(MLP)


def write_model(
    root: Path, net: Net, artifact: bytes, *, name: str = "", max_batch: int = 0, version: int = 1, extra: str = ""
) -> Path:
    """Put a model into a repository; returns its folder. `extra` is more TOML of the top level."""
    folder = root / (name or net.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(
        MODEL_TOML.format(
            name=folder.name,
            description=net.description,
            max_batch=max_batch or net.max_batch,
            extra=extra,
            shape=", ".join(map(str, net.shape)),
            classes=net.classes,
        )
    )
    write_version(folder, version, artifact)
    return folder


def write_version(folder: Path, version: int, artifact: bytes) -> None:
    """Put a version in place in one step: a reader sees all of it or nothing."""
    hidden = folder / f".{version}.new"
    hidden.mkdir()
    (hidden / "model.onnx").write_bytes(artifact)
    hidden.rename(folder / str(version))


def expected(artifact: bytes, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The right answers [count, classes], from ONNX Runtime alone, one row at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": rows[i : i + 1]})[0] for i in range(len(rows))])
