"""int8: what ONNX Runtime makes of the pairs, what the answers lose, and what TensorRT needs."""

import re
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from millhand.errors import ModelError

FLOAT_WORK = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def pairs(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


@pytest.mark.parametrize(("name", "loss"), [("mlp", 0.003), ("cnn", 0.01), ("sequence", 0.003)])
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_answers_stay_close_and_the_file_is_small(bench, name, loss, calibration):
    candidate = bench(name).make("int8-static", calibration=calibration, min_weights=256)
    assert candidate.loss() < loss if calibration == "minmax" else candidate.loss() < 0.05
    assert candidate.size < {"mlp": 0.4, "cnn": 0.8, "sequence": 0.4}[name]  # the smallest nets are mostly names
    onnx.checker.check_model(candidate.model, full_check=True)


def test_convolutions_and_what_lies_between_run_on_integers(bench):
    candidate = bench("cnn").make("int8-static")
    executed = Counter(candidate.executed())
    assert executed["QLinearConv"] == 4
    assert executed["QLinearAdd"] == executed["QLinearConcat"] == executed["QLinearGlobalAveragePool"] == 1
    assert executed["QGemm"] == 1  # the head of 48 x 4 is too small to pay
    assert sum(executed[name] for name in FLOAT_WORK) == 1
    assert executed["QuantizeLinear"] == 1 and executed["DequantizeLinear"] == 1
    assert any("gemm" in note and "left in float32" in note for note in candidate.made.notes)


def test_linear_layers_answer_in_float_where_a_float_operator_follows(bench):
    candidate = bench("mlp").make("int8-static")
    executed = Counter(candidate.executed())
    assert executed["QGemm"] + executed["MatMulIntegerToFloat"] + executed["QLinearMatMul"] == 3
    # The input, and the SiLU's result: nothing is quantised for the SiLU.
    assert executed["QuantizeLinear"] == 2


def test_linear_layers_over_three_dimensions_run_on_integers(bench):
    executed = Counter(bench("sequence").make("int8-static").executed())
    assert executed["MatMulIntegerToFloat"] == 2 and not any(executed[name] for name in FLOAT_WORK)


@pytest.mark.parametrize(("bits", "most"), [("7", 63), ("8", 127)])
def test_weights_have_the_bits_that_the_cpu_takes(bench, bits, most):
    candidate = bench("cnn").make("int8-static", weight_bits=bits)
    levels = [
        np.abs(value).max() for name, value in constants(candidate.model).items() if re.search("weights/q$", name)
    ]
    assert levels and max(levels) == most


@pytest.mark.parametrize(("wish", "scales"), [("each", {96, 80, 64}), ("all", {1})])
def test_one_scale_for_each_channel_or_for_all(bench, wish, scales):
    model = bench("mlp").make("int8-static", channels=wish).model
    assert {value.size for name, value in constants(model).items() if name.endswith("weights/s")} == scales


def test_a_column_that_reaches_far_is_levelled_out(bench):
    plain = bench("mlp")
    plain.rows[:, 3] *= 60
    plain.held[:, 3] *= 60
    weights = next(item for item in plain.model.graph.initializer if item.dims == [96, 64])
    values = numpy_helper.to_array(weights).copy()
    values[:, 3] /= 60
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(plain.model, str(plain.path))
    rough, smooth = (plain.make("int8-static", smoothing=wish) for wish in (False, True))
    assert smooth.loss() < 0.3 * rough.loss()
    assert any("levels out the columns of x" in note for note in smooth.made.notes)
    assert len(pairs(smooth.model, "Mul")) == len(pairs(rough.model, "Mul")) + 1


def test_layers_say_what_they_lost(bench):
    made = bench("cnn").make("int8-static").made
    by_precision = {precision: [layer for layer in made.layers if layer["precision"] == precision]
                    for precision in ("int8", "fp32")}  # fmt: skip
    assert len(by_precision["int8"]) == 5 and len(by_precision["fp32"]) == 1
    assert {layer["operator"] for layer in made.layers} == {"Conv", "Gemm"}
    assert all(0 < layer["error"] < 0.05 for layer in made.layers)


@pytest.mark.parametrize("name", ["mlp", "cnn", "sequence"])
def test_for_tensorrt_everything_is_symmetric(bench, name):
    candidate = bench(name).make("int8-qdq", target="sm80")
    model, values = candidate.model, None
    values = constants(model)
    layers = [
        node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and "/dq" in node.input[1]
    ]
    assert layers
    for node in [*pairs(model, "QuantizeLinear"), *pairs(model, "DequantizeLinear")]:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any() and (values[node.input[1]] > 0).all()
    for node in layers:
        assert node.input[0].endswith("/dq") and not (len(node.input) > 2 and node.input[2].endswith("/dq"))
    for node in pairs(model, "QuantizeLinear"):
        assert values[node.input[1]].shape == ()
    for node in pairs(model, "DequantizeLinear"):
        if node.input[0] in values:
            assert values[node.input[0]].dtype == np.int8 and values[node.input[1]].ndim == 1
    assert candidate.loss() < 0.02
    onnx.checker.check_model(model, full_check=True)


def test_dynamic_int8_needs_no_rows(bench):
    candidate = bench("mlp").make("int8-dynamic", rows={})
    executed = Counter(candidate.executed())
    assert executed["DynamicQuantizeMatMul"] + executed["MatMulIntegerToFloat"] == 3
    assert candidate.loss() < 0.01 and candidate.size < 0.45
    assert all(layer["error"] is None for layer in candidate.made.layers)


def test_float16_keeps_inputs_and_outputs(bench):
    candidate = bench("cnn").make("fp16", rows={})
    assert candidate.loss() < 1e-4 and candidate.size < 0.75
    graph = candidate.model.graph
    assert {item.type.tensor_type.elem_type for item in [*graph.input, *graph.output]} == {TensorProto.FLOAT}


def test_numbers_that_float16_has_not_are_refused(bench):
    plain = bench("mlp")
    plain.model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.full((96, 64), 7e4, np.float32), plain.model.graph.initializer[0].name)
    )
    onnx.save(plain.model, str(plain.path))
    with pytest.raises(ModelError, match="'c0' holds numbers beyond 65504"):
        plain.make("fp16", rows={})


def test_a_bias_that_dwarfs_its_layer_does_not_overflow(bench):
    plain = bench("cnn")
    for item in plain.model.graph.initializer:
        if item.dims == [16, 16, 3]:
            values = numpy_helper.to_array(item) * np.float32(1e-12)
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    onnx.save(plain.model, str(plain.path))
    assert plain.make("int8-static").loss() < 0.02


def test_an_output_that_a_convolution_writes_keeps_its_name(bench_of, new_net):
    net = new_net((4, 32))
    model = net.model(net.conv("x", 4, 16, 3), (16, 32))
    end = model.graph.node.pop()
    model.graph.node[0].output[0] = "y"
    assert end.op_type == "Identity"
    candidate = bench_of(net, model).make("int8-static")
    assert candidate.loss() < 0.01 and Counter(candidate.executed())["QLinearConv"] == 1
