"""Small nets with seeded weights, rows for them, and a maker's call without a workshop around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand.workshop.recipe import Job, Judgement, Made, Target
from millhand_plugins.quantize.maker import QuantizeMaker
from millhand_plugins.quantize.settings import QuantizeSettings


class Net:
    """Collects nodes and seeded weights; `x` is the input."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape = shape
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: np.ndarray, name: str = "") -> str:
        name = name or f"c{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def weights(self, *shape: int, fan_in: int, name: str = "") -> str:
        values = self._random.standard_normal(shape) * np.sqrt(2 / fan_in)
        return self.constant(values.astype(np.float32), name)

    def gemm(self, data: str, inputs: int, outputs: int, transposed: bool = True, bias: bool = True) -> str:
        shape = (outputs, inputs) if transposed else (inputs, outputs)
        terms = [data, self.weights(*shape, fan_in=inputs)]
        if bias:
            terms.append(self.weights(outputs, fan_in=200))
        return self.node("Gemm", *terms, transB=int(transposed))

    def conv(self, data: str, inputs: int, outputs: int, width: int, stride: int = 1) -> str:
        terms = [data, self.weights(outputs, inputs, width, fan_in=inputs * width), self.weights(outputs, fan_in=200)]
        return self.node("Conv", *terms, kernel_shape=[width], strides=[stride], pads=[width // 2, width // 2])

    def norm(self, data: str, channels: int) -> str:
        random = self._random
        values = (random.uniform(0.5, 2, channels), random.standard_normal(channels) * 0.1,
                  random.standard_normal(channels) * 0.1, random.uniform(0.5, 2, channels))  # fmt: skip
        return self.node("BatchNormalization", data, *(self.constant(value.astype(np.float32)) for value in values))

    def silu(self, data: str) -> str:
        return self.node("Mul", data, self.node("Sigmoid", data))

    def model(self, output: str, outputs: tuple[int, ...], opset: int = 17) -> onnx.ModelProto:
        self._nodes.append(helper.make_node("Identity", [output], ["y"], name="end"))
        graph = helper.make_graph(
            self._nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *outputs])],
            self._weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    def rows(self, count: int, seed: int = 1) -> np.ndarray:
        """Correlated, with a mean: [count, *shape]."""
        random = np.random.default_rng(seed)
        size = int(np.prod(self.shape))
        mixing = np.random.default_rng(99).standard_normal((max(4, size // 8), size)) / np.sqrt(max(4, size // 8))
        values = random.standard_normal((count, len(mixing))) @ mixing + 0.2 * random.standard_normal((count, size))
        return (values + 0.3).reshape(count, *self.shape).astype(np.float32)


def mlp() -> tuple[Net, onnx.ModelProto]:
    """Gemm in each of its shapes, between a Relu and a SiLU; the last layer is a small one."""
    net = Net((64,))
    flow = net.node("Relu", net.gemm("x", 64, 96))
    flow = net.silu(net.gemm(flow, 96, 80, transposed=False))
    flow = net.node("Relu", net.gemm(flow, 80, 64, bias=False))
    return net, net.model(net.gemm(flow, 64, 5), (5,))


def cnn() -> tuple[Net, onnx.ModelProto]:
    """Convolutions with BatchNormalization, pooling, a residual Add, a Concat, and a linear head."""
    net = Net((2, 64))
    first = net.node("Relu", net.norm(net.conv("x", 2, 16, 7, 2), 16))
    flow = net.node("MaxPool", first, kernel_shape=[2], strides=[2])
    flow = net.node("Relu", net.node("Add", net.conv(flow, 16, 16, 3), flow))
    flow = net.node("Concat", net.conv(flow, 16, 16, 3), net.conv(flow, 16, 24, 5), axis=1)
    flow = net.node("Flatten", net.node("GlobalAveragePool", flow))
    flow = net.node("Relu", net.gemm(flow, 40, 48))
    return net, net.model(net.gemm(flow, 48, 4), (4,))


def sequence() -> tuple[Net, onnx.ModelProto]:
    """MatMul over three dimensions, as a transformer's feed-forward part has it."""
    net = Net((6, 48))
    flow = net.node("MatMul", "x", net.weights(48, 128, fan_in=48))
    flow = net.silu(net.node("Add", flow, net.weights(128, fan_in=300)))
    return net, net.model(net.node("MatMul", flow, net.weights(128, 48, fan_in=128)), (6, 48))


NETS = {"mlp": mlp, "cnn": cnn, "sequence": sequence}


@dataclass
class Bench:
    """A net on disk, and what makers make of it."""

    folder: Path
    net: Net
    model: onnx.ModelProto
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0))
    progress: Callable[[float, str], None] = lambda share, step: None

    def __post_init__(self) -> None:
        self.path = self.folder / "original.onnx"
        onnx.save(self.model, str(self.path))
        self.rows = self.net.rows(128)
        self.held = self.net.rows(256, seed=2)

    def make(
        self,
        recipe: str,
        target: str = "cpu",
        judge: Callable[[Made], Judgement] | None = None,
        rows: dict[str, np.ndarray] | None = None,
        **options: Any,
    ) -> Candidate:
        maker, device = QuantizeMaker(), Target(name=target, accelerator="cpu" if target == "cpu" else "")
        chosen = next(item for item in maker.recipes(device) if item.name == recipe)
        folder = self.folder / f"{recipe}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        given = {"x": self.rows} if rows is None else rows
        job = Job(
            model=self.path,
            folder=folder,
            target=device,
            inputs={"x": ("float32", (-1, *self.net.shape))},
            calibration=given if chosen.calibrated else {},
            max_batch=16,
            typical_batch=1,
            options=QuantizeSettings(**options).model_dump(mode="json"),
            cache=folder,
            progress=self.progress,
            judge=judge,
        )
        return Candidate(maker.make(chosen, job), folder, self)

    def answers(self, rows: np.ndarray) -> np.ndarray:
        return run(self.path, rows)


@dataclass
class Candidate:
    made: Made
    folder: Path
    bench: Bench

    @property
    def path(self) -> Path:
        return self.folder / self.made.artifact

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(str(self.path))

    @property
    def size(self) -> float:
        """As a share of the original's."""
        return self.path.stat().st_size / self.bench.path.stat().st_size

    def loss(self) -> float:
        """The share of the output's power that is lost on rows that nothing was fitted to."""
        whole = self.bench.answers(self.bench.held).astype(float)
        return float(((run(self.path, self.bench.held) - whole) ** 2).sum() / (whole**2).sum())

    def executed(self) -> list[str]:
        """The operators that ONNX Runtime runs in the end."""
        optimised = self.folder / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(str(optimised)).graph.node]


def run(path: Path, rows: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": rows})[0])


@pytest.fixture
def bench(tmp_path: Path) -> Callable[[str], Bench]:
    """`bench("mlp")`, `bench("cnn")` or `bench("sequence")`."""

    def made(name: str) -> Bench:
        net, model = NETS[name]()
        return Bench(tmp_path, net, model)

    return made


@pytest.fixture
def bench_of(tmp_path: Path) -> Callable[[Net, onnx.ModelProto], Bench]:
    return lambda net, model: Bench(tmp_path, net, model)


@pytest.fixture
def new_net() -> type[Net]:
    return Net
