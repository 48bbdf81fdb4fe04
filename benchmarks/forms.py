"""The forms that an int8 net can be written in for ONNX Runtime, made by its own quantizer; benchmarks/quantize.py."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Rows = Mapping[str, NDArray[Any]]
Writer = Callable[[Path, Path, Rows], None]
U8, S8 = QuantType.QUInt8, QuantType.QInt8


class Reader:
    """`CalibrationDataReader` over batches of 16."""

    def __init__(self, rows: Rows) -> None:
        count = len(next(iter(rows.values())))
        self._batches = iter([{name: array[i : i + 16] for name, array in rows.items()} for i in range(0, count, 16)])

    def get_next(self) -> Any:
        return next(self._batches, None)


def form(**choices: Any) -> Writer:
    def write(model: Path, out: Path, rows: Rows) -> None:
        logging.getLogger().setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
            quantize_static(str(ready), str(out), Reader(rows), **{"activation_type": U8, "weight_type": S8, **choices})

    return write


def raised(model: Path, out: Path, rows: Rows) -> None:
    """The float net with convolutions over two dimensions, one of them a height of one: ONNX Runtime has blocked
    kernels for these alone."""
    net = onnx.load(str(model))
    graph = net.graph
    weights = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        tensor = weights[node.input[1]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :, None], tensor.name))
        given = {item.name: list(item.ints) for item in node.attribute}
        del node.attribute[:]
        (kernel,), (stride,), (front, back) = given["kernel_shape"], given["strides"], given["pads"]
        wide = {"kernel_shape": [1, kernel], "strides": [1, stride], "pads": [0, front, 0, back]}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in wide.items())
    graph.initializer.append(numpy_helper.from_array(np.array([2]), "height"))
    first = graph.node[0].input[0]
    graph.node[0].input[0] = "raised"
    graph.node.insert(0, helper.make_node("Unsqueeze", [first, "height"], ["raised"], "raise"))
    del graph.value_info[:]
    onnx.save(net, str(out))


def raised_int8(model: Path, out: Path, rows: Rows) -> None:
    whole = out.with_suffix(".float.onnx")
    raised(model, whole, rows)
    form(per_channel=True, reduce_range=True)(whole, out, rows)


FORMS: dict[str, Writer] = {
    "7 bits by channel": form(per_channel=True, reduce_range=True),
    "8 bits by channel": form(per_channel=True),
    "8 bits by tensor": form(),
    "uint8 weights by tensor": form(weight_type=U8),
    "int8 activations by channel": form(activation_type=S8, per_channel=True),
    "QOperator by channel": form(per_channel=True, quant_format=QuantFormat.QOperator),
    "7 bits by channel, in two dimensions": raised_int8,
    "float32, in two dimensions": raised,
}
