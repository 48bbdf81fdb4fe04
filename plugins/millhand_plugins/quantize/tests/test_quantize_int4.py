"""int4: the file's layout against ONNX Runtime's own, what the answers lose, learned rounding, and mixed precision."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from millhand.errors import ModelError
from millhand.workshop.recipe import Judgement
from millhand_plugins.quantize.mixed import fewest, ranked


def node_of(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_layout_is_that_of_onnx_runtimes_own_quantizer(bench_of, new_net, block, zero_point):
    inputs, outputs = 96, 40
    net = new_net((inputs,))
    model = net.model(net.node("MatMul", "x", net.weights(inputs, outputs, fan_in=inputs)), (outputs,))
    matrix = numpy_helper.to_array(model.graph.initializer[0])
    candidate = bench_of(net, model).make("int4", block=block, zero_point=zero_point, compute="float32")
    ours = node_of(candidate.model, "MatMulNBits")
    blocks = -(-inputs // block)
    levels = np.zeros((outputs, blocks, block // 2), np.uint8)
    scales, zeros = np.zeros(outputs * blocks, np.float32), np.zeros(outputs * ((blocks + 1) // 2), np.uint8)
    quantize_matmul_4bits(levels, matrix, scales, zeros, block, outputs, inputs, not zero_point)
    assert np.allclose(constant(candidate.model, ours.input[2]), scales, rtol=1e-5)
    assert len(ours.input) == (4 if zero_point else 3)
    if zero_point:
        assert constant(candidate.model, ours.input[3]).shape == zeros.shape
    # Halves may be rounded the other way, so the levels are compared by what they stand for.
    theirs = onnx.ModelProto()
    theirs.CopyFrom(candidate.model)
    for item in theirs.graph.initializer:
        values = {ours.input[1]: levels, ours.input[2]: scales}
        if zero_point:
            values[ours.input[3]] = zeros
        if item.name in values:
            item.CopyFrom(numpy_helper.from_array(values[item.name], item.name))
    other = candidate.folder / "theirs.onnx"
    onnx.save(theirs, str(other))
    rows = candidate.bench.held
    assert difference(run_file(other, rows), run_file(candidate.path, rows)) < (1e-2 if zero_point else 1e-3)


def run_file(path, rows):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": rows})[0]


def difference(one, other) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_gemm_and_matmul_become_matmulnbits(bench, name):
    candidate = bench(name).make("int4", rows={})
    count = {"mlp": 3, "sequence": 2}[name]
    assert Counter(candidate.executed())["MatMulNBits"] == count
    assert candidate.loss() < 0.05 and candidate.size < 0.4
    assert [layer["precision"] for layer in candidate.made.layers].count("int4") == count


def test_convolutions_are_left_and_named(bench):
    made = bench("cnn").make("int4", rows={}).made
    assert any("left in float32: conv0" in note and "(Conv)" in note for note in made.notes)
    assert {layer["precision"] for layer in made.layers if layer["operator"] == "Conv"} == {"fp32"}


def test_learned_rounding_loses_less_on_rows_that_it_never_saw(bench):
    plain = bench("mlp")
    nearest, learned = plain.make("int4"), plain.make("int4-annealed")
    assert learned.loss() < 0.5 * nearest.loss()
    assert learned.path.stat().st_size == nearest.path.stat().st_size
    assert all(layer["error"] < 0.05 for layer in learned.made.layers)


@pytest.mark.long
def test_another_draw_of_rows_rounds_otherwise_and_the_same_draw_alike(bench):
    plain = bench("mlp")
    first, again, other = (plain.make("int4-annealed", seed=seed, rows_cap=64) for seed in (1, 1, 2))
    assert first.path.read_bytes() == again.path.read_bytes() != other.path.read_bytes()


def test_for_tensorrt_the_block_lies_along_the_inputs(bench):
    """80 inputs do not fill blocks of 32: that layer is filled up with zeros."""
    candidate = bench("mlp").make("int4-qdq", target="sm80")
    model = candidate.model
    onnx.checker.check_model(model, full_check=True)
    assert next(item.version for item in model.opset_import if item.domain == "") == 21
    found = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(found) == 3
    for node in found:
        attributes = {item.name: item.i for item in node.attribute}
        levels = next(item for item in model.graph.initializer if item.name == node.input[0])
        scales = constant(model, node.input[1])
        assert attributes == {"axis": 0, "block_size": 32} and len(node.input) == 2
        assert levels.data_type == TensorProto.INT4 and (scales > 0).all()
        assert levels.dims[0] == scales.shape[0] * 32 and levels.dims[1] == scales.shape[1]
    assert Counter(node.op_type for node in model.graph.node)["Pad"] == 1
    assert candidate.loss() < 0.03 and candidate.size < 0.4


def test_for_tensorrt_there_are_two_blocks_at_least(bench):
    model = bench("mlp").make("int4-qdq", target="sm80", block=128).model
    scales = [constant(model, node.input[1]) for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert [len(values) for values in scales] == [2, 2, 2]  # 64, 96 and 80 inputs in blocks of 32 and 64


def test_operators_that_changed_before_opset_21_are_converted(bench_of, new_net):
    """ReduceMean took its axes as an attribute up to opset 17, Split its number of outputs from their count."""
    net = new_net((4, 64))
    flow = net.node("ReduceMean", net.node("MatMul", "x", net.weights(64, 64, fan_in=64)), axes=[1], keepdims=0)
    candidate = bench_of(net, net.model(net.gemm(flow, 64, 48), (48,))).make("int4-qdq", target="sm80")
    onnx.checker.check_model(candidate.model, full_check=True)
    assert candidate.loss() < 0.03 and Counter(candidate.executed())["MatMulNBits"] == 2


def test_a_device_needs_torch(bench, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ModelError, match="torch is not installed"):
        bench("mlp").make("int4-annealed", device="cuda")


def test_layers_that_share_their_weights_are_both_rounded(bench_of, new_net):
    net = new_net((64,))
    shared = net.weights(64, 64, fan_in=64)
    flow = net.node("Tanh", net.node("MatMul", "x", shared))
    candidate = bench_of(net, net.model(net.node("MatMul", flow, shared), (64,))).make("int4-annealed")
    assert Counter(candidate.executed())["MatMulNBits"] == 2 and candidate.loss() < 0.05


class Gate:
    """Passes what is at least so large, as a strict gate passes what has enough bits."""

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes, self.asked = least_bytes, []

    def bind(self, bench):
        def judge(made):
            folder = max(
                (path for path in bench.folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns
            )
            size = (folder / made.artifact).stat().st_size
            self.asked.append(size)
            return Judgement(value=0.0, drop_percent=0.0, passed=size >= self.least_bytes)

        return judge


def test_mixed_promotes_until_the_gate_passes(bench):
    plain = bench("mlp")
    smallest = plain.make("mixed", loss=0.9)
    assert [layer["precision"] for layer in smallest.made.layers] == ["int4", "int4", "int4", "fp32"]
    gate = Gate(int(1.3 * smallest.path.stat().st_size))
    promoted = plain.make("mixed", judge=gate.bind(plain))
    assert promoted.path.stat().st_size >= gate.least_bytes > min(gate.asked)
    precisions = [layer["precision"] for layer in promoted.made.layers]
    assert {"int8", "fp16"} & set(precisions) and promoted.loss() < smallest.loss()
    assert any("promotions were needed" in note for note in promoted.made.notes)


def test_what_wins_most_for_a_byte_is_promoted_first():
    sizes = {"small": 100, "large": 1000, "conv": 100}
    losses = {
        "small": {"int4": 0.01, "int8": 0.002},
        "large": {"int4": 0.02, "int8": 0.0001},
        "conv": {"int8": 0.0001},
    }
    order = [(promotion.layer, promotion.precision) for promotion in ranked(sizes, losses)]
    assert order == [("small", "int8"), ("large", "int8"), ("small", "fp16"), ("conv", "fp16"), ("large", "fp16")]


def test_mixed_takes_convolutions_along(bench):
    candidate = bench("cnn").make("mixed", loss=0.005)
    precisions = {layer["operator"]: layer["precision"] for layer in candidate.made.layers}
    assert precisions["Conv"] in ("int8", "fp16") and candidate.loss() < 0.02
    assert Counter(candidate.executed())["MatMulNBits"] <= 1


def test_mixed_says_where_no_mix_passes(bench):
    plain = bench("mlp")
    with pytest.raises(ModelError, match="no mix of precisions passes"):
        plain.make("mixed", judge=lambda made: Judgement(value=0.0, drop_percent=100.0, passed=False))


@pytest.mark.parametrize("wanted", [*range(9), None])
def test_the_fewest_promotions_are_found_in_few_trials(wanted):
    asked = []

    def passes(count: int) -> bool:
        asked.append(count)
        return wanted is not None and count >= wanted

    assert fewest(8, passes) == wanted
    assert len(asked) == len(set(asked)) <= 5
    assert wanted in (None, *asked)


def test_the_product_of_a_graph_that_was_int4_keeps_its_output(bench_of, new_net):
    net = new_net((64,))
    model = net.model(net.gemm("x", 64, 32), (32,))
    model.graph.node.pop()
    model.graph.node[0].output[0] = "y"
    assert bench_of(net, model).make("int4", rows={}).loss() < 0.05
