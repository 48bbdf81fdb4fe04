"""Writes probe.onnx, the small net that providers are tried with: `python -m millhand_plugins.onnxruntime.probe_net`.

Needs onnx. A convolution and a matrix product, 1,515 weights from a seed: the same bytes on every machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from millhand_plugins.onnxruntime.probe import NET

IR_VERSION = 8
OPSET = 17


def probe_net() -> bytes:
    """The ONNX file."""
    random = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> TensorProto:
        values = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], name="convolution", pads=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"], name="rectifier"),
        helper.make_node("Flatten", ["r"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "matrix"], ["y"], name="product", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 5])
    graph = helper.make_graph(nodes, "probe", [x], [y], [weights("kernel", 9, 3, 5), weights("matrix", 5, 288)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    Path(NET).write_bytes(probe_net())
