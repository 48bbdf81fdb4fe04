"""The backend on real files and a real ONNX Runtime."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from millhand.errors import ModelError
from millhand_plugins import onnxruntime as plugin
from millhand_plugins.onnxruntime.artifact import why_not_loaded
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
from millhand_plugins.onnxruntime.providers import BUILT_IN
from millhand_plugins.onnxruntime.settings import OnnxruntimeSettings

FOLDER = Path(plugin.__file__).parent


@pytest.fixture
def artifact(tmp_path):
    """y = x + x, columns fixed at 3."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_it_loads_runs_and_describes(artifact):
    session = OnnxruntimeBackend().load(artifact, "cpu", {})
    assert session.inputs == {"x": ("float32", (-1, 3))} and session.outputs == {"y": ("float32", (-1, 3))}
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)
    session.close()


@pytest.mark.parametrize("options", [
    {"arena": True}, {"memory_pattern": False}, {"optimization": "none"}, {"prepacking": False},
    {"spinning": True, "threads": 2}, {"providers": ["cpu"]},
])  # fmt: skip
def test_every_option_is_taken(artifact, options):
    validated = OnnxruntimeSettings(**options).model_dump(mode="json")
    session = OnnxruntimeBackend().load(artifact, "cpu", validated)
    assert session.run({"x": np.ones((1, 3), dtype=np.float32)})["y"][0, 0] == 2


def test_a_missing_a_damaged_and_a_cut_file_are_named(artifact, tmp_path):
    backend = OnnxruntimeBackend()
    with pytest.raises(ModelError, match=r"nothing\.onnx' does not exist"):
        backend.load(tmp_path / "nothing.onnx", "cpu", {})
    for content in (b"", b"not a model", artifact.read_bytes()[:-20]):
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match=r"damaged\.onnx' cannot be loaded") as caught:
            backend.load(damaged, "cpu", {})
        assert "complete" in caught.value.hint


@pytest.mark.parametrize("accelerator", ["GPU-123", "cpu"])
@pytest.mark.parametrize("options", [{"providers": ["cuda", "cpu"]}, {"providers": ["tensorrt", "cpu"]}])
def test_a_provider_that_is_not_there_is_an_error_not_the_cpu(artifact, accelerator, options):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(ModelError, match="has no provider") as caught:
        OnnxruntimeBackend().load(artifact, accelerator, options)
    assert "onnxruntime-gpu" in caught.value.hint


def test_the_cpu_computes_where_nobody_asked_for_what_the_build_has_not(artifact, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    session = OnnxruntimeBackend().load(artifact, "GPU-123", {})
    x = np.ones((2, 3), np.float32)
    assert session.run({"x": x})


def test_a_silent_fall_back_is_an_error(artifact, monkeypatch):
    """The build offers a provider, the session leaves it out: what a machine without a driver does."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, made, **_: real(path, made, ["CPUExecutionProvider"])
    )
    with pytest.raises(
        ModelError, match="left out the provider 'cuda' and would run on CPUExecutionProvider"
    ) as caught:
        OnnxruntimeBackend().load(artifact, "GPU-123", {})
    assert "nvidia-smi" in caught.value.hint and "providers = ['cpu']" in caught.value.hint


def test_the_library_that_a_provider_misses_is_named():
    import onnxruntime

    assert why_not_loaded(onnxruntime, "absent").endswith(
        "libonnxruntime_providers_absent.so: cannot open shared object file: No such file or directory"
    )


def test_a_worker_without_a_gpu_says_so_before_cuda_is_tried(artifact, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ModelError, match="asks for the provider 'cuda', but this worker sees no GPU") as caught:
        OnnxruntimeBackend().load(artifact, "cpu", {"providers": ["cuda"]})
    assert "millhand profile match" in caught.value.hint


def test_an_error_of_cuda_is_not_blamed_on_the_file(artifact, monkeypatch):
    import onnxruntime

    def fail(*_, **__):
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected ; GPU=0\nstack")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(BUILT_IN.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ModelError, match=r"cannot be loaded: CUDA failure 100.*GPU=0$") as caught:
        OnnxruntimeBackend().load(artifact, "GPU-123", {})
    assert "driver" in caught.value.hint


def test_a_cpu_session_may_run_several_batches_at_once(artifact):
    assert OnnxruntimeBackend().load(artifact, "cpu", {}).concurrent is True


def test_sample_readme_and_settings_agree():
    keys = list(OnnxruntimeSettings.model_fields)
    sample = (FOLDER / "sample.toml").read_text()
    assert re.findall(r"^# (\w+) = ", sample, re.M) == keys
    uncommented = re.sub(r"^# (?=\w+ = )", "", sample, flags=re.M)
    table = tomllib.loads(uncommented)["plugins"]["onnxruntime"]
    assert OnnxruntimeSettings(**table) == OnnxruntimeSettings()
    assert re.findall(r"^\| `(\w+)`", (FOLDER / "README.md").read_text(), re.M) == keys
