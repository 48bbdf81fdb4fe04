"""The proof of an accelerated session. Without a GPU its parts run on real profiles and sessions of the CPU."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from candidate_kit import Workshop, half
from onnx import TensorProto, helper, numpy_helper
from serving_kit import save_onnx, scale, until, value, write_model

from millhand.errors import AcceleratorError, ModelError
from millhand.hardware import discover
from millhand.serving.settings import WorkerDefaults
from millhand.workshop.targets import target_name
from millhand_plugins.onnxruntime import proof, trials
from millhand_plugins.onnxruntime.accelerated import AcceleratedSession
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
from millhand_plugins.onnxruntime.ladder import Ladder, batch_sizes, fastest
from millhand_plugins.onnxruntime.ways import RECORDING, Bound, Filled, OneThread, Plain

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
        session.run(None, proof.examples(X))
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
    assert nodes["conv"].accelerated and not nodes["dense"].accelerated


def test_shapes_may_be_computed_on_the_cpu_and_are_named(profile):
    nodes = proof.read_profile(profile("Conv", "MatMul", "Reshape"))
    evidence = proof.check_nodes("net.onnx", nodes, CUDA)
    assert evidence["provider"] == CUDA and evidence["gpu_nodes"] == 3 and evidence["nodes"] == len(nodes) > 3
    assert evidence["gpu_share"] == round(3 / len(nodes), 4)
    assert "rows (Shape)" in evidence["cpu_nodes"]


def test_a_heavy_node_on_the_cpu_is_an_error_with_its_name_and_a_remedy(profile):
    with pytest.raises(
        ModelError, match=r"'net\.onnx': the nodes that cost most ran on the CPU.*'dense' \(MatMul\)$"
    ) as e:
        proof.check_nodes("net.onnx", proof.read_profile(profile("Conv", "Reshape")), CUDA)
    assert "float16" in e.value.hint and "providers = ['cpu']" in e.value.hint


def test_profiles_recorded_on_a_card_are_read():
    """Of one H100 with onnxruntime-gpu 1.31.1: a float net, and a quantised one without CUDA kernels."""
    folder = Path(__file__).parent / "captures"
    evidence = proof.check_nodes("cnn", proof.read_profile(folder / "ort_profile_cuda.json"), CUDA)
    assert (evidence["nodes"], evidence["gpu_nodes"], evidence["cpu_nodes"]) == (13, 13, [])
    with pytest.raises(ModelError, match=r"the nodes that cost most ran on the CPU.*'ConvInteger_1' \(ConvInteger\)"):
        proof.check_nodes("integer", proof.read_profile(folder / "ort_profile_cuda_integer.json"), CUDA)


def test_a_model_that_never_touched_the_gpu_is_an_error():
    nodes = [proof.NodeRun(f"n{number}", "Add", "CPUExecutionProvider", False) for number in range(7)]
    named = r"'n0' \(Add\).*'n4' \(Add\) and 2 more ran on CPUExecutionProvider"
    with pytest.raises(ModelError, match=rf"none of its 7 nodes ran on {CUDA}; {named}$") as caught:
        proof.check_nodes("net.onnx", nodes, CUDA)
    assert "['cpu']" in caught.value.hint
    with pytest.raises(ModelError, match=f"none of its 0 nodes ran on {CUDA}$"):
        proof.check_nodes("net.onnx", [], CUDA)


def test_a_provider_that_left_everything_to_the_next_is_an_error():
    nodes = [proof.NodeRun("conv", "Conv", CUDA, False)]
    with pytest.raises(
        ModelError, match=f"none of its 1 nodes ran on TensorrtExecutionProvider; 'conv' .* {CUDA}$"
    ) as e:
        proof.check_nodes("net.onnx", nodes, "TensorrtExecutionProvider")
    assert "take that provider out" in e.value.hint


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
    row, again = proof.examples(specs), proof.examples(specs)
    assert row["x"].shape == (2, 3, 1) and row["x"].dtype == np.float16 and np.ptp(row["x"]) > 0
    assert set(row["ids"][0].tolist()) == {0, 1} and row["mask"].dtype == bool and row["text"][0, 0] == b"0"
    assert all(np.array_equal(row[name], again[name]) for name in specs)


# ---- the session ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cpu_stands_in(monkeypatch):
    """What runs on the CPU counts as accelerated: the same code, sessions and files, other hardware."""
    monkeypatch.setattr(proof, "CPU_PROVIDER", "none")


@pytest.fixture
def every_way(cpu_stands_in, monkeypatch):
    """Buffers are bound in the CPU's memory, and a session without graphs runs where graphs would be played."""
    monkeypatch.setattr(trials, "DEVICE", "cpu")
    monkeypatch.setattr(trials, "BIND", ("cpu",))
    monkeypatch.setattr(trials, "RECORD", ("cpu",))
    monkeypatch.setattr(trials, "SHORT_S", 60.0)  # a busy machine may take longer for one run than a graph is worth


def accelerated(path, max_batch=20, **options):
    session = AcceleratedSession(Artifact(path, ("cpu",), options))
    session.prove(X, max_batch)
    return session


def rows(count, seed=2):
    return np.random.default_rng(seed).standard_normal((count, 2, 16)).astype(np.float32)


def check_every_size(session, path):
    plain = OnnxruntimeBackend().load(path, "cpu", {})
    for count in (*range(1, 50), 3, 20, 1):
        x = rows(count, count)
        np.testing.assert_allclose(session.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-5, atol=1e-5)


@pytest.fixture
def dense(tmp_path):
    flat = {"shape": np.array([0, -1], dtype=np.int64), "b": np.ones((32, 3), dtype=np.float32)}
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["f"]), helper.make_node("MatMul", ["f", "b"], ["y"])]
    return save(tmp_path / "dense.onnx", nodes, flat, ["n", 3])


def test_a_session_that_fell_back_to_the_cpu_is_found_out(net):
    session = AcceleratedSession(Artifact(net, ("cpu",), {}))
    with pytest.raises(ModelError, match="has not proved that it runs on 'cpu'"):
        session.run({"x": rows(1)})
    with pytest.raises(ModelError, match="ran on the CPU, not on CPUExecutionProvider: 'conv'"):
        session.prove(X, 64)
    with pytest.raises(ModelError, match="has not proved"):
        session.run({"x": rows(1)})
    session.close()


def test_a_whole_proof_leaves_nothing_behind(net, cpu_stands_in, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    session = accelerated(net)
    evidence = session.proof
    assert evidence["gpu_share"] == 1 and evidence["cpu_nodes"] == []
    assert evidence["providers"] == {"CPUExecutionProvider": evidence["nodes"]}
    assert evidence["max_difference"] <= 1e-6 < evidence["tolerance"] == proof.TOLERANCE
    assert evidence["reference"] == "CPUExecutionProvider" and evidence["batch_sizes"] == [1, 8, 20]
    assert {size: entry["way"] for size, entry in evidence["ways"].items()} == dict.fromkeys(("1", "8", "20"), "plain")
    assert evidence["left_out"] == dict.fromkeys(("bound", "graph"), "the buffers of 'cpu' are its own")
    assert 0 < evidence["proof_ms"] < 1000
    assert session.concurrent is False
    check_every_size(session, net)
    session.close()
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(ModelError, match="the session is closed"):
        session.run({"x": rows(1)})


def test_only_convolutions_need_fixed_batch_sizes(net, dense, cpu_stands_in):
    assert accelerated(dense, 64).proof["batch_sizes"] == []
    assert accelerated(net, 64, fixed_batches=False).proof["batch_sizes"] == []
    assert accelerated(net, 64).proof["batch_sizes"] == [1, 8, 64]
    assert accelerated(net, 1).proof["batch_sizes"] == [1]


def test_a_wrong_answer_fails_the_proof(net, cpu_stands_in, monkeypatch):
    right = proof.examples
    session = AcceleratedSession(Artifact(net, ("cpu",), {}))
    reference = session._reference
    monkeypatch.setattr(session, "_reference", lambda rows: reference({"x": right(X)["x"] * 1.01}))
    with pytest.raises(ModelError, match="in a batch of 1, the answer to a test input differs"):
        session.prove(X, 64)


def test_a_first_inference_that_fails_is_not_blamed_on_a_request(net):
    session = AcceleratedSession(Artifact(net, ("cpu",), {}))
    with pytest.raises(ModelError, match=r"the first inference on 'cpu': 'net\.onnx' failed") as caught:
        session.prove({"x": ("float32", (-1, 2, 3))}, 64)
    assert "cuDNN" in caught.value.hint
    session.close()


class Watched:
    """A way that remembers the batch sizes it saw."""

    def __init__(self, way):
        self.way, self.seen = way, set()

    def __call__(self, inputs):
        self.seen.add(len(inputs["x"]))
        return self.way(inputs)


def test_a_filled_way_sees_one_batch_size_and_every_row_is_right(net):
    session = Artifact(net, ("cpu",), {}).open()
    inner = {size: Watched(Plain(session, ["y"])) for size in (1, 8, 20)}
    ladder = Ladder({size: Filled(way, size, "x") for size, way in inner.items()}, "x")
    for count in range(1, 50):
        x = rows(count, 3)
        np.testing.assert_allclose(ladder({"x": x})["y"], session.run(["y"], {"x": x})[0], rtol=1e-5, atol=1e-5)
    assert {size: way.seen for size, way in inner.items()} == {1: {1}, 8: {8}, 20: {20}}


# ---- other ways to run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "bound", "graph"])
@pytest.mark.parametrize("shape", ["net", "dense"])
def test_every_way_answers_batches_of_every_size(way, shape, every_way, request, monkeypatch):
    path = request.getfixturevalue(shape)
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: (way, dict.fromkeys(ways, 1.0)))
    session = accelerated(path)
    assert {entry["way"] for entry in session.proof["ways"].values()} == {way}
    assert session.proof["left_out"] == {}
    check_every_size(session, path)
    session.close()


def test_ways_may_differ_by_batch_size(net, every_way, monkeypatch):
    chosen = iter(["graph", "bound", "plain"])
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: (next(chosen), {}))
    session = accelerated(net)
    assert {size: entry["way"] for size, entry in session.proof["ways"].items()} == {
        "1": "graph",
        "8": "bound",
        "20": "plain",
    }
    check_every_size(session, net)
    session.close()


def test_answers_that_were_handed_out_stay_as_they_are(dense, every_way, monkeypatch):
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: ("bound", {}))
    session = accelerated(dense)
    first = session.run({"x": rows(8)})["y"]
    kept = first.copy()
    session.run({"x": rows(8, 9)})
    np.testing.assert_array_equal(first, kept)


def test_ways_are_tried_only_where_the_owner_lets_them(net, every_way):
    assert set(accelerated(net).proof["ways"]["1"]["us"]) == {"plain", "bound", "graph"}
    assert set(accelerated(net, io_binding=False).proof["ways"]["1"]["us"]) == {"plain", "graph"}
    assert set(accelerated(net, cuda_graph=False).proof["ways"]["1"]["us"]) == {"plain", "bound"}
    assert accelerated(net, cuda_graph=False, io_binding=False).proof["ways"]["1"] == {"way": "plain", "us": {}}


def test_a_way_that_fails_or_lies_is_left_out(net, every_way, monkeypatch):
    class Stale(Bound):
        """Reads its first answer for ever, as a graph over the wrong buffers would."""

        def __call__(self, inputs):
            self._told = getattr(self, "_told", None) or super().__call__(inputs)
            return self._told

    def no_graphs(*_):
        raise RuntimeError("This session cannot use the graph capture feature\nmore")

    monkeypatch.setattr(trials, "Bound", Stale)
    monkeypatch.setattr(trials, "CudaGraph", no_graphs)
    session = accelerated(net)
    assert {entry["way"] for entry in session.proof["ways"].values()} == {"plain"}
    assert "the answer to a test input differs" in session.proof["left_out"]["bound"]
    assert session.proof["left_out"]["graph"] == "batch of 1: This session cannot use the graph capture feature"
    check_every_size(session, net)


def test_graphs_are_asked_for_as_onnx_runtime_documents_them(net):
    options = {"provider_options": {"cuda": {"cudnn_conv_use_max_workspace": "0"}, "ggml": {"a": "b"}}, "tf32": True}
    told = Artifact(net, ("cuda", "cpu"), options).with_cuda_graphs().options
    assert told["provider_options"]["cuda"] == {"cudnn_conv_use_max_workspace": "0", "enable_cuda_graph": "1"}
    assert told["provider_options"]["ggml"] == {"a": "b"} and told["tf32"] is True


def test_what_is_slower_is_freed(net, every_way, monkeypatch):
    opened = []
    with_graphs = Artifact.with_cuda_graphs

    def watched(artifact):
        made = with_graphs(artifact)
        opened.append(made)
        return made

    monkeypatch.setattr(Artifact, "with_cuda_graphs", watched)
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: ("plain", {}))
    session = accelerated(net)
    assert len(opened) == 3 and session._kept == []
    assert not [one for one in threading.enumerate() if one.name == "cuda graphs"]
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: ("graph" if len(batch["x"]) == 8 else "bound", {}))
    session = accelerated(net)
    assert sorted(type(one).__name__ for one in session._kept) == ["Bound", "Bound", "CudaGraph", "OneThread"]
    session.close()
    assert not [one for one in threading.enumerate() if one.name == "cuda graphs"]


def test_no_graph_is_tried_where_it_cannot_pay(net, every_way, monkeypatch):
    monkeypatch.setattr(trials, "SHORT_S", 0.0)
    assert set(accelerated(net).proof["ways"]["1"]["us"]) == {"plain", "bound"}


def test_a_recording_and_a_run_that_serves_keep_out_of_each_others_way(dense, cpu_stands_in):
    session = accelerated(dense)
    with RECORDING:
        waiting = threading.Thread(target=session.run, args=({"x": rows(1)},))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive()


def test_one_thread_runs_everything_and_hands_errors_over():
    thread = OneThread("test")
    names = {thread.call(threading.get_ident) for _ in range(3)}
    assert len(names) == 1 and threading.get_ident() not in names
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda a, b: a + b, 1, 2) == 3
    thread.close()


def test_a_large_difference_pays_and_noise_does_not():
    def taking(ms):
        return lambda batch: time.sleep(ms / 1e3)

    best, times = fastest({"plain": taking(4), "bound": taking(2), "graph": taking(2.1)}, {})
    assert best == "bound" and times["plain"] > times["bound"] >= 2000
    assert fastest({"plain": taking(2), "bound": taking(2)}, {})[0] == "plain"


def test_batch_sizes_reach_the_largest():
    assert [batch_sizes(largest) for largest in (1, 2, 8, 9, 64, 256)] == [
        (1,), (1, 2), (1, 8), (1, 8, 9), (1, 8, 64), (1, 8, 64, 256),
    ]  # fmt: skip


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_request_that_fails_is_told_from_an_accelerator_that_does(dense, cpu_stands_in, monkeypatch):
    session = accelerated(dense)
    with pytest.raises(ModelError, match=r"'dense\.onnx' failed"):
        session.run({"x": np.zeros((1, 3, 16), dtype=np.float32)})
    np.testing.assert_array_equal(session.run({"x": np.ones((1, 2, 16), dtype=np.float32)})["y"], [[32, 32, 32]])

    def lost(inputs):
        raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0")

    monkeypatch.setattr(session, "_way", lost)
    with pytest.raises(AcceleratorError, match="'cpu' fails with every input since: CUDA failure 719") as caught:
        session.run({"x": rows(1)})
    assert caught.value.retriable and "nvidia-smi" in caught.value.hint


# ---- on a card ------------------------------------------------------------------------------------------------------


@pytest.fixture
def card():
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not Path("/dev/nvidia0").exists():
        pytest.skip("no NVIDIA GPU here, or no onnxruntime-gpu")


def on_card(path, max_batch=64, **options):
    session = OnnxruntimeBackend().load(path, "GPU", options)
    session.prove(X, max_batch)
    return session


def check_on_card(session, path, counts):
    plain = OnnxruntimeBackend().load(path, "cpu", {})
    for count in counts:
        x = rows(count, count)
        np.testing.assert_allclose(session.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_proof_on_a_card(net, tmp_path, card):
    session = on_card(net)
    evidence = session.proof
    assert evidence["provider"] == CUDA and evidence["max_difference"] < 1e-5 and evidence["batch_sizes"] == [1, 8, 64]
    assert evidence["proof_ms"] < 1000
    print(evidence)
    check_on_card(session, net, (11,))
    session.close()
    weights = {"w": np.ones((4, 2, 5), dtype=np.uint8)}
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.UINT8),
        helper.make_node("ConvInteger", ["i", "w"], ["c"], name="slow"),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    slow = OnnxruntimeBackend().load(save(tmp_path / "slow.onnx", nodes, weights, ["n", 4, 12]), "GPU", {})
    with pytest.raises(ModelError, match=rf"ran on the CPU, not on {CUDA}: 'slow' \(ConvInteger\)"):
        slow.prove(X, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["plain", "bound", "graph"])
@pytest.mark.parametrize("shape", ["net", "dense"])
def test_every_way_on_a_card(way, shape, request, monkeypatch, card):
    path = request.getfixturevalue(shape)
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: (way if way in ways else "plain", {}))
    session = on_card(path)
    left_out = session.proof["left_out"]
    assert shape != "dense" or left_out == {}
    assert {entry["way"] for entry in session.proof["ways"].values()} == {"plain" if way in left_out else way}
    assert session.proof["pinned"] == (way == "bound")
    check_on_card(session, path, (*range(1, 80), 3, 64, 1))
    session.close()


@pytest.mark.gpu
def test_a_model_that_loads_disturbs_none_that_serves(net, dense, monkeypatch, card):
    """Graphs are recorded for one session while another answers from another thread."""
    serving, stop, failures = on_card(dense), threading.Event(), []

    def serve():
        while not stop.is_set():
            try:
                check_on_card(serving, dense, (1, 8, 50))
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setattr(trials, "fastest", lambda ways, batch: ("graph" if "graph" in ways else "plain", {}))
    for path in (dense, net, dense):
        on_card(path).close()
    stop.set()
    thread.join()
    assert not failures


# ---- candidates on a card -------------------------------------------------------------------------------------------


def triple(path):
    """Three times x, in half precision."""
    half(path, 3)


def triple_on_the_cpu(path):
    """Three times x, by an operator that CUDA has no kernel for."""
    weight = np.zeros((2, 2, 1), dtype=np.uint8)
    weight[0, 0], weight[1, 1] = 3, 3
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.UINT8),
        helper.make_node("Unsqueeze", ["i", "axis"], ["columns"]),
        helper.make_node("ConvInteger", ["columns", "w"], ["c"], name="slow"),
        helper.make_node("Squeeze", ["c", "axis"], ["s"]),
        helper.make_node("Cast", ["s"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([2]), "axis")]
    save_onnx(path, nodes, [value("x", ["n", 2])], [value("y", ["n", 2])], weights)


class Bench:
    """A model that doubles, on the first card; candidates triple."""

    def __init__(self, root, data_dir, make_pool, accelerator, target):
        self.workshop = Workshop(root, data_dir)
        self.make_pool, self.accelerator, self.target = make_pool, accelerator, target
        scale(write_model(root, "scale") / "1/model.onnx", 2)

    def serve(self, write, name="half"):
        return self.workshop.serve("scale", write, name=name, target=self.target)

    async def start(self):
        hosts = [WorkerDefaults(accelerator=self.accelerator)]
        return await self.make_pool(hosts=hosts, targets={self.accelerator: self.target})


async def factors(pool):
    """What a row and a batch are multiplied by."""
    found = set()
    for count in (1, 40):
        outputs, _ = await pool.infer("scale", {"x": np.full((count, 2), 7, np.float32)}, deadline_ms=30000)
        found |= set((outputs["y"] / 7).ravel().tolist())
    return found


def standing(pool):
    """(Candidates that serve, the provider that the session proved, why the chosen one does not serve)."""
    found = pool.metadata("scale")
    (detail,), (choice,) = found["details"], found["choices"]
    return detail["candidates"], found["accelerator"].get("1", {}).get("provider"), choice["reason"]


@pytest.fixture
def bench(card, root, tmp_path, make_pool):
    gpu = discover().accelerators[0]
    return Bench(root, tmp_path / "data", make_pool, gpu.uuid, target_name(gpu.compute_capability))


@pytest.mark.gpu
async def test_a_chosen_candidate_serves_on_a_card_and_proves_itself_there(bench):
    bench.serve(triple)
    pool = await bench.start()
    assert (await factors(pool), standing(pool)) == ({3.0}, (["half"], CUDA, ""))
    bench.workshop.choose("scale", "", target=bench.target, why="the original was the fastest")
    await pool.load("scale")
    assert (await factors(pool), standing(pool)) == ({2.0}, ([], CUDA, "the original was the fastest"))


@pytest.mark.gpu
async def test_a_candidate_for_another_chip_does_not_serve_on_a_card(bench):
    bench.workshop.serve("scale", triple, target="cpu")
    pool = await bench.start()
    assert (await factors(pool), pool.metadata("scale")["choices"]) == ({2.0}, [])


@pytest.mark.gpu
async def test_a_candidate_that_falls_back_to_the_cpu_makes_way_for_the_original_on_a_card(bench):
    bench.serve(triple_on_the_cpu, "slow")
    pool = await bench.start()
    assert await factors(pool) == {2.0}
    candidates, provider, reason = standing(pool)
    assert (candidates, provider) == ([], CUDA)
    assert "ran on the CPU" in reason and "'slow' (ConvInteger)" in reason
    bench.serve(triple, "half")
    await pool.load("scale")
    assert (await factors(pool), standing(pool)) == ({3.0}, (["half"], CUDA, ""))


@pytest.mark.gpu
async def test_a_worker_that_dies_comes_back_with_its_candidate_on_a_card(bench):
    bench.serve(triple)
    pool = await bench.start()
    assert await factors(pool) == {3.0}
    (worker,) = pool._served["scale"].workers
    before = worker.restarts
    os.kill(worker.process.pid, 9)
    await until(lambda: worker.restarts > before and pool.metadata("scale")["versions"] == [1])
    assert (await factors(pool), standing(pool)) == ({3.0}, (["half"], CUDA, ""))
