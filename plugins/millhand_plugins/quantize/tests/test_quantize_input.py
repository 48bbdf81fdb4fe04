"""Models and rows that cannot be quantised: the error names what is wrong, and a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand.errors import ModelError
from millhand.workshop.recipe import CPU, Target
from millhand_plugins.quantize import graph as graph_module
from millhand_plugins.quantize.cpu import is_exact
from millhand_plugins.quantize.graph import Graph
from millhand_plugins.quantize.maker import QuantizeMaker
from millhand_plugins.quantize.options import Options
from millhand_plugins.quantize.settings import QuantizeSettings


def refused(bench, match: str, recipe: str = "int8-static", **keys) -> ModelError:
    with pytest.raises(ModelError, match=match) as caught:
        bench.make(recipe, **keys)
    assert caught.value.hint
    return caught.value


def saved(bench) -> None:
    onnx.save(bench.model, str(bench.path))


@pytest.mark.parametrize("opset", [11, 99])
def test_an_opset_that_is_too_old_or_too_new(bench, opset):
    plain = bench("mlp")
    plain.model.opset_import[0].version = opset
    saved(plain)
    error = refused(plain, f"uses ONNX opset {opset}; 13 to ")
    assert "opset 17" in error.hint


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model", b"\x08\x08\x12\x04"])
def test_a_file_that_is_no_model(bench, content):
    plain = bench("mlp")
    plain.path.write_bytes(content)
    refused(plain, "is not an ONNX model")


def test_a_file_that_is_not_there(bench):
    plain = bench("mlp")
    plain.path.unlink()
    refused(plain, "original.onnx' cannot be read: No such file")


def test_a_truncated_file(bench):
    plain = bench("mlp")
    plain.path.write_bytes(plain.path.read_bytes()[:-1000])
    refused(plain, "original.onnx' is not an ONNX model")


def test_external_data_that_is_missing(bench):
    plain = bench("mlp")
    onnx.save(plain.model, str(plain.path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert plain.make("int4", rows={}).loss() < 0.05
    (plain.folder / "weights.bin").unlink()
    refused(plain, "the data of tensor 'c0' should lie in 'weights.bin', which does not exist")


def test_external_data_that_is_cut_off(bench):
    plain = bench("mlp")
    onnx.save(plain.model, str(plain.path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = plain.folder / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    refused(plain, "its external data cannot be read|is not an ONNX model")


def test_external_data_outside_the_folder(bench):
    plain = bench("mlp")
    onnx.save(plain.model, str(plain.path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(str(plain.path), load_external_data=False)
    for item in model.graph.initializer:
        item.external_data[0].value = "../../../../etc/hostname"
    plain.path.write_bytes(model.SerializeToString())
    refused(plain, "external data|should lie in")


def test_a_model_that_is_quantised_already(bench):
    plain = bench("mlp")
    once = plain.make("int8-static")
    plain.path.write_bytes(once.path.read_bytes())
    error = refused(plain, "is quantised already")
    assert "float32" in error.hint


def test_a_model_without_a_layer_to_quantise(bench_of, new_net):
    net = new_net((8,))
    plain = bench_of(net, net.model(net.silu("x"), (8,)))
    refused(plain, "has no Conv, Gemm or MatMul with 1024 constant float32 weights")
    refused(plain, "has no Gemm or MatMul with 1024", recipe="int4")


def test_an_operator_that_onnx_runtime_does_not_know(bench):
    plain = bench("mlp")
    plain.model.graph.node[1].op_type, plain.model.graph.node[1].domain = "Mystery", "com.example"
    plain.model.opset_import.append(helper.make_opsetid("com.example", 1))
    saved(plain)
    refused(plain, "ONNX Runtime cannot load the model: .*Mystery")
    assert plain.make("int4", rows={}).made.artifact  # weights alone need no kernel for it


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({}, "there are no calibration rows"),
        ({"z": np.zeros((64, 64), np.float32)}, "lack the input 'x'; they have z"),
        ({"x": np.zeros((64, 32), np.float32)}, r"input 'x' have the shape \[64, 32\], the model takes \[n, 64\]"),
        ({"x": np.zeros(64, np.float32)}, r"have the shape \[64\]"),
        ({"x": np.zeros((3, 64), np.float32)}, "there are 3 calibration rows that can be used, at least 32"),
        ({"x": np.zeros((64, 64), np.complex64)}, "rows of input 'x' are complex64, the model takes float32"),
    ],
)
@pytest.mark.parametrize("recipe", ["int8-static", "int4-annealed", "mixed"])
def test_rows_that_do_not_fit(bench, recipe, rows, match):
    refused(bench("mlp"), match, recipe=recipe, rows=rows)


def test_rows_with_gaps_are_left_out_and_counted(bench):
    plain = bench("mlp")
    plain.rows[:5, 0] = np.nan
    plain.rows[5, 1] = np.inf
    assert "6 calibration rows with NaN or infinity were left out" in plain.make("int8-static").made.notes
    plain.rows[:100] = np.nan
    refused(plain, "there are 28 calibration rows that can be used")


def test_rows_that_model_toml_declares_otherwise_than_the_artifact(bench_of, new_net):
    net = new_net((64,))
    plain = bench_of(net, net.model(net.gemm("x", 64, 32), (32,)))
    net.shape = (63,)
    plain.rows = net.rows(64)
    refused(plain, "ranges of the model's tensors cannot be found|does not run on the calibration rows")


def test_layers_in_inner_graphs_and_recurrent_ones_are_named(bench_of, new_net):
    net = new_net((6, 32))
    flow = net.node("Transpose", net.node("MatMul", "x", net.weights(32, 64, fan_in=32)), perm=[1, 0, 2])
    weights = [net.weights(1, 128, 64, fan_in=64), net.weights(1, 128, 32, fan_in=32)]
    flow = net.node("LSTM", flow, *weights, hidden_size=32)
    model = net.model(net.node("ReduceSum", flow, net.constant(np.array([0, 1], np.int64)), keepdims=0), (32,))
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["y0", "w"], ["z"], "inside")], "then", [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(32, dtype=np.float32), "w")],
    )  # fmt: skip
    model.graph.node[-1].output[0] = "y0"
    model.graph.node.append(helper.make_node("If", ["always"], ["y"], "choice", then_branch=inner, else_branch=inner))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    made = bench_of(net, model).make("int4", rows={}).made
    note = next(note for note in made.notes if note.startswith("not quantised by any recipe"))
    assert "lstm" in note and "inside (MatMul)" in note


def test_the_deadline_ends_the_work(bench):
    plain = bench("mlp")

    def stop(share: float, step: str) -> None:
        if step.startswith("rounding"):
            raise InterruptedError

    plain.progress = stop
    with pytest.raises(InterruptedError):
        plain.make("int4-annealed")


def test_progress_only_grows(bench):
    for recipe in ("int8-static", "int4-annealed", "mixed"):
        plain, shares = bench("mlp"), []
        plain.progress = lambda share, step, shares=shares: shares.append(share)
        plain.make(recipe)
        assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.long
def test_large_models_keep_their_tensors_beside_the_file(bench, monkeypatch):
    monkeypatch.setattr(graph_module, "INLINE_BYTES", 1000)
    monkeypatch.setattr("millhand_plugins.quantize.calibration.INLINE_BYTES", 1000)
    for recipe in ("int8-static", "int8-dynamic", "int4-annealed", "mixed"):
        candidate = bench("mlp").make(recipe)
        assert (candidate.folder / "model.onnx.data").exists() and candidate.loss() < 0.05


def test_nothing_is_offered_without_its_libraries(monkeypatch):
    maker = QuantizeMaker()
    assert {recipe.name for recipe in maker.recipes(Target())} >= {"int8-static", "int4-annealed", "mixed"}
    assert {recipe.name for recipe in maker.recipes(Target(name="sm80"))} >= {"int8-qdq", "int4-qdq", "fp16"}
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else found(name))
    assert maker.recipes(Target()) == ()


def test_a_table_that_nobody_checked_is_refused():
    keys = QuantizeSettings().model_dump(mode="json")
    assert Options.read(keys).block == 32
    for wrong in ({}, {**keys, "block": "many"}):
        with pytest.raises(ModelError, match=r"\[plugins.quantize\]"):
            Options.read(wrong)


CPUS = {
    "flags\t\t: fpu avx2 fma": ("x86_64", False),
    "flags\t\t: fpu avx2 avx512f avx512_vnni": ("x86_64", True),
    "flags\t\t: fpu avx2 avx_vnni": ("x86_64", True),
    "Features\t: fp asimd": ("aarch64", True),
    "": ("x86_64", False),
}


@pytest.mark.parametrize(("text", "answer"), CPUS.items())
def test_the_cpu_says_whether_8_bits_overflow(tmp_path: Path, text, answer):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}\n")
    assert is_exact(tmp_path / "cpuinfo", answer[0]) == answer[1]
    assert set(QuantizeMaker().key(Target(name=CPU))) == ({"int8"} if is_exact() else set())


def test_names_are_given_where_a_model_has_none(bench):
    plain = bench("mlp")
    for node in plain.model.graph.node:
        node.name = ""
    saved(plain)
    names = [layer.name for layer in Graph.read(plain.path).layers()]
    assert len(set(names)) == 4 and all(names)
    assert plain.make("int8-static").loss() < 0.003
