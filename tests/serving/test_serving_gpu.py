"""The proof of a GPU session. Without a GPU its parts run on real profiles and sessions of the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand.errors import ModelError
from millhand_plugins.onnxruntime import proof
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
from millhand_plugins.onnxruntime.gpu import FixedBatches, GpuSession

CUDA = "CUDAExecutionProvider"
X = {"x": ("float32", (-1, 2, 16))}


def save(path, nodes, weights, y_shape):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 2, 16])],
        [value("y", TensorProto.FLOAT, y_shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def net(tmp_path):
    """A convolution, a node that wants to know a shape, and a matrix product: y = [n, 3]."""
    random = np.random.default_rng(1)
    weights = {
        "w": random.standard_normal((4, 2, 5)).astype(np.float32),
        "b": random.standard_normal((48, 3)).astype(np.float32),
        "columns": np.array([48], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Shape", ["x"], ["rows"], name="rows", start=0, end=1),
        helper.make_node("Concat", ["rows", "columns"], ["shape"], name="shape", axis=0),
        helper.make_node("Reshape", ["c", "shape"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "b"], ["y"], name="dense"),
    ]
    return save(tmp_path / "net.onnx", nodes, weights, ["n", 3])


@pytest.fixture
def profile(net, tmp_path):
    """Profile one run of `net` on the CPU; with arguments, say that nodes of these operators ran on CUDA."""

    def record(*moved: str):
        session = Artifact(net, ("cpu",), {"optimization": "none"}).open(profile=tmp_path / "run")
        session.run(None, proof.example(X))
        path = Path(session.end_profiling())
        events = json.loads(path.read_text())
        for event in events:
            if event["args"].get("op_name") in moved:
                event["args"]["provider"] = CUDA
        path.write_text(json.dumps(events))
        return path

    return record


# ---- what ran where -------------------------------------------------------------------------------------------------


def test_a_profile_names_every_node_with_its_operator_and_provider(profile):
    nodes = {node.name: node for node in proof.read_profile(profile("Conv"))}
    assert nodes["conv"] == proof.NodeRun("conv", "Conv", CUDA, half=False)
    assert nodes["dense"].operator == "MatMul" and nodes["dense"].provider == "CPUExecutionProvider"
    assert nodes["conv"].on_gpu and not nodes["dense"].on_gpu


def test_shapes_may_be_computed_on_the_cpu_and_are_named(profile):
    nodes = proof.read_profile(profile("Conv", "MatMul", "Reshape"))
    evidence = proof.check_nodes("net.onnx", nodes)
    assert evidence["provider"] == CUDA and evidence["gpu_nodes"] == 3 and evidence["nodes"] == len(nodes) > 3
    assert evidence["gpu_share"] == round(3 / len(nodes), 4)
    assert "rows (Shape)" in evidence["cpu_nodes"]


def test_a_heavy_node_on_the_cpu_is_an_error_with_its_name_and_a_remedy(profile):
    with pytest.raises(
        ModelError, match=r"'net\.onnx': the nodes that cost most ran on the CPU.*'dense' \(MatMul\)$"
    ) as e:
        proof.check_nodes("net.onnx", proof.read_profile(profile("Conv", "Reshape")))
    assert "float16" in e.value.hint and "providers = ['cpu']" in e.value.hint


def test_profiles_recorded_on_a_card_are_read():
    """Of one H100 with onnxruntime-gpu 1.31.1: a float net, and a quantised one without CUDA kernels."""
    folder = Path(__file__).parent / "captures"
    evidence = proof.check_nodes("cnn", proof.read_profile(folder / "ort_profile_cuda.json"))
    assert (evidence["nodes"], evidence["gpu_nodes"], evidence["cpu_nodes"]) == (13, 13, [])
    with pytest.raises(ModelError, match=r"the nodes that cost most ran on the CPU.*'ConvInteger_1' \(ConvInteger\)"):
        proof.check_nodes("integer", proof.read_profile(folder / "ort_profile_cuda_integer.json"))


def test_a_model_that_never_touched_the_gpu_is_an_error():
    nodes = [proof.NodeRun(f"n{number}", "Add", "CPUExecutionProvider", False) for number in range(7)]
    with pytest.raises(ModelError, match=r"none of its 7 nodes ran on the GPU: 'n0' \(Add\).*'n4' \(Add\) and 2 more"):
        proof.check_nodes("net.onnx", nodes)
    with pytest.raises(ModelError, match="none of its 0 nodes ran on the GPU"):
        proof.check_nodes("net.onnx", [])


def test_copies_are_not_counted_and_float16_is_seen(tmp_path):
    def event(name, operator, kind):
        arguments = {"op_name": operator, "provider": CUDA, "input_type_shape": [{kind: [1, 3]}]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": arguments}

    path = tmp_path / "run.json"
    path.write_text(json.dumps([
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "conv_fence_before", "args": {"op_name": "Conv"}},
        event("copy", "MemcpyFromHost", "float"),
        event("conv", "Conv", "float16"),
    ]))  # fmt: skip
    assert proof.read_profile(path) == [proof.NodeRun("conv", "Conv", CUDA, half=True)]


@pytest.mark.parametrize(
    "text", ["", "[{", '{"a": 1}', '[{"cat": "Node"}]', '[{"cat": "Node", "name": "a_kernel_time"}]']
)
def test_a_profile_that_cannot_be_read_is_an_error(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"profile .* cannot be read") as caught:
        proof.read_profile(path)
    assert "temporary folder" in caught.value.hint
    with pytest.raises(ModelError, match="No such file"):
        proof.read_profile(tmp_path / "absent.json")


# ---- the answer -----------------------------------------------------------------------------------------------------


def test_differences_are_shares_of_the_largest_value():
    expected = {"y": np.array([[1.0, -200.0]], dtype=np.float32), "label": np.array([1])}
    assert proof.difference(expected, {"y": expected["y"], "label": np.array([0])}) == 0
    assert proof.difference(expected, {"y": np.array([[1.0, -198.0]], dtype=np.float32)}) == pytest.approx(0.01)
    assert proof.difference(expected, {"y": np.array([[np.nan, -200.0]], dtype=np.float32)}) == np.inf
    assert proof.difference(expected, {"y": np.zeros((1, 3), dtype=np.float32)}) == np.inf
    label = {"label": np.array([1])}
    assert proof.difference(label, label) == 0
    assert proof.difference(label, {"label": np.array([0])}) == np.inf
    same = {"y": np.array([[np.nan, np.inf]], dtype=np.float32)}
    assert proof.difference(same, same) == 0


def test_an_answer_beyond_the_tolerance_names_both():
    expected, found = {"y": np.ones((1, 2))}, {"y": np.full((1, 2), 1.5)}
    with pytest.raises(ModelError, match=r"batch of 8.*by 0\.5 of the largest value, allowed is 0\.001"):
        proof.check_answer("net.onnx", expected, found, 1e-3, 8)
    assert proof.check_answer("net.onnx", expected, expected, 1e-3, 1) == 0
    with pytest.raises(ModelError, match="output 'y' is not finite"):
        proof.check_finite("net.onnx", {"y": np.array([np.inf])})


def test_the_example_is_valid_for_any_input():
    specs = {"x": ("float16", (-1, 3, -1)), "ids": ("int64", (-1, 50)), "mask": ("bool", (-1, 50))}
    specs["text"] = ("object", (-1, 2))
    row, again = proof.example(specs), proof.example(specs)
    assert row["x"].shape == (1, 3, 1) and row["x"].dtype == np.float16 and np.ptp(row["x"]) > 0
    assert set(row["ids"][0].tolist()) == {0, 1} and row["mask"].dtype == bool and row["text"][0, 0] == b"0"
    assert all(np.array_equal(row[name], again[name]) for name in specs)


# ---- the session ----------------------------------------------------------------------------------------------------


def test_a_session_that_fell_back_to_the_cpu_is_found_out(net):
    session = GpuSession(Artifact(net, ("cpu",), {}))
    with pytest.raises(ModelError, match="has not proved that it runs on the GPU"):
        session.run(proof.example(X))
    with pytest.raises(ModelError, match="ran on the CPU, not on the GPU: 'conv'"):
        session.prove(X, 64)
    with pytest.raises(ModelError, match="has not proved"):
        session.run(proof.example(X))
    session.close()


def test_a_whole_proof_leaves_nothing_behind(net, monkeypatch, tmp_path):
    """The CPU plays the GPU: the same code, sessions and files."""
    monkeypatch.setattr(proof, "GPU_PROVIDERS", ("CPUExecutionProvider",))
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    session = GpuSession(Artifact(net, ("cpu",), {}))
    session.prove(X, 20)
    evidence = session.proof
    assert evidence["gpu_share"] == 1 and evidence["cpu_nodes"] == []
    assert evidence["max_difference"] <= 1e-6 < evidence["tolerance"] == proof.TOLERANCE
    assert evidence["reference"] == "CPUExecutionProvider" and evidence["batch_sizes"] == [1, 8, 20]
    assert 0 < evidence["proof_ms"] < 1000
    assert session.concurrent is False
    x = np.random.default_rng(2).standard_normal((11, 2, 16)).astype(np.float32)
    plain = OnnxruntimeBackend().load(net, "cpu", {})
    np.testing.assert_allclose(session.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-5, atol=1e-5)
    session.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def batch_sizes(path, options, max_batch):
    session = GpuSession(Artifact(path, ("cpu",), options))
    session.prove(X, max_batch)
    return session.proof["batch_sizes"]


def test_only_convolutions_need_fixed_batch_sizes(net, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "GPU_PROVIDERS", ("CPUExecutionProvider",))
    flat = {"shape": np.array([0, -1], dtype=np.int64), "b": np.ones((32, 3), dtype=np.float32)}
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["f"]), helper.make_node("MatMul", ["f", "b"], ["y"])]
    dense = save(tmp_path / "dense.onnx", nodes, flat, ["n", 3])
    assert batch_sizes(dense, {}, 64) == []
    assert batch_sizes(net, {"fixed_batches": False}, 64) == []
    assert batch_sizes(net, {}, 64) == [1, 8, 64]
    assert batch_sizes(net, {}, 1) == [1]


def test_a_wrong_answer_of_the_gpu_fails_the_proof(net, monkeypatch):
    monkeypatch.setattr(proof, "GPU_PROVIDERS", ("CPUExecutionProvider",))
    right = proof.example
    session = GpuSession(Artifact(net, ("cpu",), {}))
    reference = session._reference
    monkeypatch.setattr(session, "_reference", lambda row: reference({"x": right(X)["x"] * 1.01}))
    with pytest.raises(ModelError, match="in a batch of 1, the GPU's answer to a test input differs"):
        session.prove(X, 64)


def test_a_first_inference_that_fails_is_not_blamed_on_a_request(net):
    session = GpuSession(Artifact(net, ("cpu",), {}))
    with pytest.raises(ModelError, match=r"the first inference on the GPU: 'net\.onnx' failed") as caught:
        session.prove({"x": ("float32", (-1, 2, 3))}, 64)
    assert "cuDNN" in caught.value.hint
    session.close()


class Watched:
    """A session that remembers the batch sizes it saw."""

    def __init__(self, session):
        self.session, self.seen = session, set()

    def run(self, outputs, inputs):
        self.seen.add(len(inputs["x"]))
        return self.session.run(outputs, inputs)


def test_each_inner_session_sees_one_batch_size_and_every_row_is_right(net):
    artifact = Artifact(net, ("cpu",), {})
    batches = FixedBatches(artifact.open(), artifact, (1, 8, 20))
    batches._sessions = {size: Watched(session) for size, session in batches._sessions.items()}
    plain, random = artifact.open(), np.random.default_rng(3)
    for rows in range(1, 50):
        x = random.standard_normal((rows, 2, 16)).astype(np.float32)
        (y,) = batches.run(["y"], {"x": x})
        np.testing.assert_allclose(y, plain.run(["y"], {"x": x})[0], rtol=1e-5, atol=1e-5)
    assert {size: session.seen for size, session in batches._sessions.items()} == {1: {1}, 8: {8}, 20: {20}}


@pytest.mark.gpu
def test_the_proof_on_a_card(net, tmp_path):
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not Path("/dev/nvidia0").exists():
        pytest.skip("no NVIDIA GPU here, or no onnxruntime-gpu")
    session = OnnxruntimeBackend().load(net, "GPU", {})
    session.prove(X, 64)
    evidence = session.proof
    assert evidence["provider"] == CUDA and evidence["max_difference"] < 1e-5 and evidence["batch_sizes"] == [1, 8, 64]
    assert evidence["proof_ms"] < 1000
    x = np.random.default_rng(4).standard_normal((11, 2, 16)).astype(np.float32)
    plain = OnnxruntimeBackend().load(net, "cpu", {})
    np.testing.assert_allclose(session.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-4, atol=1e-4)
    session.close()
    weights = {"w": np.ones((4, 2, 5), dtype=np.uint8)}
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.UINT8),
        helper.make_node("ConvInteger", ["i", "w"], ["c"], name="slow"),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    slow = OnnxruntimeBackend().load(save(tmp_path / "slow.onnx", nodes, weights, ["n", 4, 12]), "GPU", {})
    with pytest.raises(ModelError, match=r"ran on the CPU, not on the GPU: 'slow' \(ConvInteger\)"):
        slow.prove(X, 64)
