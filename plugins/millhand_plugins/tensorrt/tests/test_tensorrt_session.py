"""Sessions on doubles of TensorRT, pycuda and cuda-python: order of calls, lifetimes, answers, threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_double import Gpu, RuntimeDouble
from trt_double import TrtDouble
from trt_nets import ORIN, SM80, convolution, matmul

from millhand.errors import AcceleratorError, InputError, ModelError
from millhand.hookspecs import ProvingSession
from millhand.serving.tensors import Specs
from millhand.workshop.recipe import Job
from millhand_plugins.tensorrt.backend import TensorrtBackend
from millhand_plugins.tensorrt.maker import TensorrtMaker
from millhand_plugins.tensorrt.session import TensorrtSession
from millhand_plugins.tensorrt.settings import TensorrtSettings

VERSIONS = ("tensorrt 10.3.0", "tensorrt 10.16.1.11", "tensorrt 11.4.0.106", "tensorrt-rtx 1.7.1.116")
INPUTS: Specs = {"x": ("float32", (-1, 44))}
RANDOM = np.random.default_rng(3)


def rows(count: int) -> dict[str, np.ndarray]:
    return {"x": RANDOM.standard_normal((count, 44)).astype(np.float32)}


def expected(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return 2 * inputs["x"] + 1


@pytest.fixture
def build(
    trt: Callable[[str], TrtDouble], tmp_path: Path, make_job: Callable[..., Job]
) -> Callable[..., tuple[TrtDouble, Path, dict[str, Any]]]:
    """Builds with a double; gives it, the engine and the backend's options."""

    def build(version: str, **keys: Any) -> tuple[TrtDouble, Path, dict[str, Any]]:
        double = trt(version)
        target = SM80 if version.startswith("tensorrt-rtx") else ORIN
        job = make_job(matmul(tmp_path / "m.onnx", out=("batch", 44)), target=target, **keys)
        maker = TensorrtMaker(TensorrtSettings())
        made = maker.make(maker.recipes(target)[-1], job)
        return double, job.folder / made.artifact, dict(made.options)

    return build


def open_session(path: Path, options: dict[str, Any], *, prove: bool = True, max_batch: int = 64) -> TensorrtSession:
    session = TensorrtBackend().load(path, "GPU-1", {**TensorrtSettings().model_dump(mode="json"), **options})
    if prove:
        session.prove(INPUTS, max_batch)
    return session


def assert_nothing_left(gpu: Gpu, double: TrtDouble) -> None:
    gc.collect()
    assert gpu.allocations == {}
    assert (gpu.pinned, gpu.retained, gpu.stack) == (0, 0, [])
    contexts, engine = double.freed.count("IExecutionContext"), double.freed.index("ICudaEngine")
    assert contexts
    assert "IExecutionContext" not in double.freed[engine:]
    assert double.freed.index("ICudaEngine") < double.freed.index("Runtime")


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_right_for_every_batch_and_nothing_is_left(version: str, build: Any, gpu: Gpu) -> None:
    double, path, options = build(version)
    session = open_session(path, options)
    assert isinstance(session, ProvingSession)
    assert session.inputs == {"x": ("float32", (-1, 44))}
    assert session.outputs == {"y": ("float32", (-1, 44))}
    for count in (1, 3, 64, 1, 2, 64):
        inputs = rows(count)
        answer = session.run(inputs)["y"]
        assert np.array_equal(answer, expected(inputs))
        assert answer.flags.owndata
    session.close()
    session.close()
    assert_nothing_left(gpu, double)


def test_the_proof_says_what_ran(build: Any) -> None:
    double, path, options = build("tensorrt 10.16.1.11")
    session = open_session(path, options)
    proof = dict(session.proof)
    assert proof.pop("first_run_ms") >= 0
    assert proof.pop("proof_ms") >= 0
    assert proof == {
        "provider": "TensorRT 10.16.1.11",
        "library": "tensorrt",
        "nodes": 3,
        "gpu_nodes": 3,
        "gpu_share": 1.0,
        "cpu_nodes": [],
        "max_difference": None,
        "reference": "none: an engine runs on its GPU alone",
        "batch_difference": 0.0,
        "graphs": False,
        "streams": 2,
    }
    session.close()
    assert double.freed.count("IExecutionContext") == 2


def test_nothing_runs_before_the_proof(build: Any) -> None:
    _, path, options = build("tensorrt 10.3.0")
    session = open_session(path, options, prove=False)
    with pytest.raises(ModelError, match="has not proved"):
        session.run(rows(1))
    session.close()


def test_an_output_that_is_not_written_fails_the_proof(build: Any, gpu: Gpu) -> None:
    double, path, options = build("tensorrt 10.3.0")
    double.poison = {"y"}
    session = open_session(path, options, prove=False)
    with pytest.raises(ModelError, match="output 'y' is not finite, or was not written"):
        session.prove(INPUTS, 64)
    session.close()
    assert_nothing_left(gpu, double)


def test_rows_that_touch_each_other_fail_the_proof(build: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import trt_running

    plain = trt_running.compute

    def mixed(work: Any) -> None:
        plain(work)
        y = trt_running._array(gpu, work, work.engine._tensor("y"))
        y[:] += len(y)

    _, path, options = build("tensorrt 10.3.0")
    monkeypatch.setattr(trt_running, "compute", mixed)
    session = open_session(path, options, prove=False)
    with pytest.raises(ModelError, match="another answer in a batch of 64 than alone"):
        session.prove(INPUTS, 64)
    session.close()


def test_more_rows_than_the_engine_takes_run_in_parts(build: Any) -> None:
    _, path, options = build("tensorrt 10.3.0", max_batch=16)
    session = open_session(path, options, max_batch=64)
    inputs = rows(41)
    assert np.array_equal(session.run(inputs)["y"], expected(inputs))
    session.close()


def test_a_size_that_it_was_not_built_for_is_refused(
    trt: Callable[[str], TrtDouble], tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    trt("tensorrt 10.3.0")
    inputs: Specs = {"x": ("float32", (-1, 2, -1))}
    job = make_job(convolution(tmp_path / "m.onnx"), inputs, target=ORIN, options={"ranges": {"frames": [16, 32, 64]}})
    maker = TensorrtMaker(TensorrtSettings())
    maker.make(maker.recipes(ORIN)[-1], job)
    session = open_session(job.folder / "model.engine", {}, prove=False)
    session.prove(inputs, 8)
    assert session.run({"x": np.zeros((3, 2, 20), np.float32)})["y"].shape == (3, 4, 20)
    with pytest.raises(InputError, match=r"shape \[1, 2, 80\], .* was built for \[1, 2, 16\] to \[64, 2, 64\]"):
        session.run({"x": np.zeros((1, 2, 80), np.float32)})
    assert session.run({"x": np.zeros((1, 2, 64), np.float32)})["y"].shape == (1, 4, 64)
    session.close()


def test_many_threads_share_the_streams(build: Any, gpu: Gpu) -> None:
    double, path, options = build("tensorrt 10.16.1.11")
    session = open_session(path, {**options, "streams": 3})
    barrier = threading.Barrier(6)

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(40):
            inputs = {"x": random.standard_normal((int(random.integers(1, 65)), 44)).astype(np.float32)}
            assert np.array_equal(session.run(inputs)["y"], expected(inputs))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert 1 <= len(gpu.streams) <= 3
    closer = threading.Thread(target=session.close)  # an unload has a thread of its own
    closer.start()
    closer.join()
    assert_nothing_left(gpu, double)


def test_graphs_are_captured_at_the_second_batch_of_a_shape(build: Any, gpu: Gpu, graphs: RuntimeDouble) -> None:
    double, path, options = build("tensorrt 10.16.1.11")
    session = open_session(path, options)
    assert session.proof["graphs"] is True
    launched = gpu.launches
    for count in (8, 8, 8, 1, 8):
        inputs = rows(count)
        assert np.array_equal(session.run(inputs)["y"], expected(inputs))
    # 8 is set up, captured, launched again; 1 was captured by the proof; 8 once more.
    assert gpu.launches - launched == 4
    for count in range(9, 30):
        for _ in range(2):
            inputs = rows(count)
            assert np.array_equal(session.run(inputs)["y"], expected(inputs))
    assert graphs.executables == graphs.graphs == 8, "the oldest make room"
    session.close()
    assert graphs.executables == graphs.graphs == 0
    assert_nothing_left(gpu, double)


def test_a_network_that_cannot_be_captured_runs_without_graphs(
    build: Any, gpu: Gpu, graphs: RuntimeDouble, caplog: pytest.LogCaptureFixture
) -> None:
    _, path, options = build("tensorrt 10.16.1.11")
    graphs.refused = True
    session = open_session(path, options)
    assert "runs without CUDA graphs: CUDA graphs: cudaStreamEndCapture gives 901" in caplog.text
    assert session.proof["graphs"] is False
    for count in (8, 8, 8):
        inputs = rows(count)
        assert np.array_equal(session.run(inputs)["y"], expected(inputs))
    assert gpu.launches == 0
    session.close()


def test_graphs_can_be_switched_off(build: Any, gpu: Gpu, graphs: RuntimeDouble) -> None:
    _, path, options = build("tensorrt 10.16.1.11")
    session = open_session(path, {**options, "cuda_graphs": False})
    assert session.proof["graphs"] is False
    assert gpu.launches == 0
    session.close()


def test_memory_that_does_not_suffice_is_said_and_nothing_is_left(build: Any, gpu: Gpu) -> None:
    double, path, options = build("tensorrt 10.3.0")
    gpu.bytes_cap = 64 * 44 * 4 + 512  # room for the inputs alone
    session = open_session(path, options, prove=False)
    with pytest.raises(ModelError, match=r"the GPU or the host has no 0\.0 MiB left") as caught:
        session.prove(INPUTS, 64)
    assert "streams = 1" in caught.value.hint
    session.close()
    assert_nothing_left(gpu, double)


def test_a_batch_that_fails_is_told_from_a_gpu_that_fails(build: Any, gpu: Gpu) -> None:
    double, path, options = build("tensorrt 10.3.0")
    session = open_session(path, options)
    gpu.faults = 1
    with pytest.raises(ModelError, match=r"'model\.engine' failed on the GPU: .* illegal memory access"):
        session.run(rows(2))
    inputs = rows(2)
    assert np.array_equal(session.run(inputs)["y"], expected(inputs))
    gpu.faults = -1
    with pytest.raises(AcceleratorError, match="the GPU fails with every input since"):
        session.run(rows(2))
    session.close()
    assert_nothing_left(gpu, double)


def test_a_gpu_that_fails_in_the_proof_is_said_and_nothing_is_left(build: Any, gpu: Gpu) -> None:
    double, path, options = build("tensorrt 10.3.0")
    session = open_session(path, options, prove=False)
    gpu.faults = -1
    with pytest.raises(ModelError, match="illegal memory access"):
        session.prove(INPUTS, 64)
    session.close()
    assert_nothing_left(gpu, double)


def test_an_engine_of_another_version_is_refused(build: Any, trt: Callable[[str], TrtDouble], gpu: Gpu) -> None:
    _, path, options = build("tensorrt 10.3.0")
    trt("tensorrt 11.4.0.106")
    with pytest.raises(ModelError, match=r"another library or version.*expecting library version 11\.4") as caught:
        open_session(path, options)
    assert "millhand model build" in caught.value.hint
    assert gpu.retained == 0


def test_what_the_library_says_goes_before_its_flags(build: Any) -> None:
    """As on an H100: the head of an engine that is cut off still says for which GPU it is."""
    double, path, options = build("tensorrt-rtx 1.7.1.116")
    double.flags = 2  # UNSUPPORTED_CC
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ModelError, match=r"is damaged or cut off .*blobSize"):
        open_session(path, options)
    path.write_bytes(whole.replace(b"1.7.1.116", b"1.7.1.115"))
    double.silent = True
    with pytest.raises(ModelError, match=r"was built for another GPU .*UNSUPPORTED_CC"):
        open_session(path, options)


def test_the_owner_decides_whether_engines_may_bring_code(build: Any) -> None:
    double, path, options = build("tensorrt 10.3.0")
    open_session(path, options).close()
    assert "Runtime.engine_host_code_allowed=" not in double.calls
    open_session(path, {**options, "host_code": True}).close()
    assert "Runtime.engine_host_code_allowed=" in double.calls


def test_rtx_keeps_what_it_has_compiled_and_captures_graphs_itself(
    build: Any, gpu: Gpu, graphs: RuntimeDouble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    double, path, options = build("tensorrt-rtx 1.7.1.116")
    kept = tmp_path / "cache" / "runtime.cache"
    session = open_session(path, options)
    assert session.proof["graphs"] is True
    session.close()
    assert kept.read_bytes().endswith(b"\ncompiled")
    assert "IRuntimeCache.deserialize" not in double.calls
    open_session(path, options).close()
    assert "IRuntimeCache.deserialize" in double.calls
    assert gpu.launches == 0
    assert "IRuntimeConfig.cuda_graph_strategy=" in double.calls
    kept.write_bytes(kept.read_bytes().replace(b"1.7.1.116", b"1.5.0.114"))
    open_session(path, options).close()
    assert "its library was TensorRT-RTX 1.5.0.114" in caplog.text
    assert kept.read_bytes().endswith(b"\ncompiled")
    assert (tmp_path / "cache" / "runtime.cache.aside").exists()


def test_pycuda_that_is_missing_is_said(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    _, path, options = build("tensorrt 10.3.0")
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(ModelError, match="pycuda cannot be imported") as caught:
        open_session(path, options)
    assert "millhand[pycuda]" in caught.value.hint
