"""What ONNX Runtime's own tools make without further ado: dynamic int8, float16, and a graph without detours."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from millhand.errors import ModelError
from millhand_plugins.quantize.calibration import first_line
from millhand_plugins.quantize.graph import Graph, Layer
from millhand_plugins.quantize.silence import silenced

LARGEST_HALF = 65504.0


def simplified(graph: Graph) -> Graph:
    """Constants folded, BatchNormalization inside the convolution before it: what int8 needs to find its layers.

    Only the optimisations that keep to ONNX's own operators. Raises ModelError where ONNX Runtime cannot load it.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        graph.write(before)
        options.optimized_model_filepath = str(after)
        if graph.large:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "after.data")
        try:
            onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime cannot load the model: {first_line(error)}",
                hint="check that the artifact serves as it is",
            ) from error
        return Graph.read(after)


def dynamic(graph: Graph, layers: Sequence[Layer], seven_bits: bool) -> Graph:
    """int8 weights, and inputs whose range is found at each inference: for layers with few rows and many weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    chosen = {layer.name for layer in layers}
    left = [layer.name for layer in graph.layers() if layer.name not in chosen]
    with tempfile.TemporaryDirectory() as folder, silenced():
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        graph.write(before)
        try:
            quantize_dynamic(
                before,
                after,
                op_types_to_quantize=["MatMul", "LSTM"],
                per_channel=True,
                reduce_range=seven_bits,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*left, *(f"{name}_MatMul" for name in left)],
                use_external_data_format=graph.large,
            )
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime cannot quantise the model: {first_line(error)}",
                hint="check that the artifact serves as it is",
            ) from error
        return Graph(onnx.load(str(after)))


def half(graph: Graph) -> Graph:
    """float16 inside, inputs and outputs as they were. Raises ModelError naming a tensor that does not fit."""
    from onnxruntime.transformers import float16  # type: ignore[import-untyped]

    for tensor in graph.model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.abs(graph.array(tensor.name)).max(initial=0) > LARGEST_HALF:
            raise ModelError(
                f"tensor '{tensor.name}' holds numbers beyond {LARGEST_HALF:g}, which float16 does not have",
                hint="scale it when the model is exported, or take int8",
            )
    copy = graph.copy()
    try:
        return Graph(float16.convert_float_to_float16(copy.model, keep_io_types=True))
    except Exception as error:
        raise ModelError(
            f"the model cannot be converted to float16: {first_line(error)}", hint="check that it serves as it is"
        ) from error
