"""Lists of providers and plugin libraries, on the real ONNX Runtime.

`make providers` installs real plugin libraries beside the project (build/providers): one that computes on the CPU, one
that wants an NVIDIA GPU. Without them the tests that need one are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand.errors import ConfigError, ModelError
from millhand.validation import validate
from millhand_plugins.onnxruntime import providers
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.providers import Library, Provider, read_providers
from millhand_plugins.onnxruntime.settings import OnnxruntimeSettings

FOLDER = Path(__file__).parents[2] / "build" / "providers"
GGML = FOLDER / "onnxruntime_ggml" / "lib" / "libonnxruntime_ggml.so"
RTX = "onnxruntime_ep_nv_tensorrt_rtx"
CAPI = Path(onnxruntime.__file__).parent / "capi"


@pytest.fixture
def dense(tmp_path):
    """y = relu(x @ w), 4 to 3 columns."""
    value = helper.make_tensor_value_info
    weight = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"], name="m"), helper.make_node("Relu", ["m"], ["y"], name="r")],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "dense.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_a_list_may_name_built_in_providers_onnx_runtimes_own_names_and_libraries():
    options = {
        "libraries": {"rtx": {"path": "/l.so", "package": None, "device": "gpu", "vendor": ""}},
        "provider_options": {"cuda": {"use_tf32": True, "gpu_mem_limit": 5}, "rtx": {"a": "b"}},
    }
    rtx, cuda, dnnl, cpu = read_providers(["rtx", "cuda", "DnnlExecutionProvider", "cpu"], options)
    assert rtx == Provider("rtx", "", {"a": "b"}, Library("rtx", "/l.so", "", "gpu", ""))
    assert cuda == Provider("cuda", "CUDAExecutionProvider", {"use_tf32": "1", "gpu_mem_limit": "5"})
    assert (dnnl.label, cpu.label) == ("DnnlExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(("names", "options", "message"), [
    ("cuda", {}, "key 'providers' = 'cuda' is no list of names"),
    ([], {}, r"key 'providers' = \[\] is no list"),
    ([1], {}, r"key 'providers' = \[1\] is no list"),
    (["cudaa"], {}, "provider 'cudaa' is not known; did you mean 'cuda'"),
    (["cpu", "cuda"], {}, "what follows 'cpu' would never be used"),
    (["cuda", "cuda"], {}, "each may stand once"),
    (["cpu"], {"provider_options": {"rtx": {}}}, "provider 'rtx' is not known"),
    (["cpu"], {"provider_options": "x"}, "key 'provider_options' = 'x' is no table of tables"),
    (["cpu"], {"libraries": {"rtx": 3}}, "key 'libraries' = .* is no table of tables"),
    (["rtx"], {"libraries": {"rtx": {"paht": "/l.so"}}}, "library 'rtx' .*: key 'paht' .*; did you mean 'path'"),
])  # fmt: skip
def test_a_list_that_cannot_be_is_refused_by_name(names, options, message):
    with pytest.raises(ModelError, match=message):
        read_providers(names, options)


@pytest.mark.parametrize(("table", "message"), [
    ({"providers": ["cudaa"]}, "did you mean 'cuda'"),
    ({"libraries": {"rtx": {}}}, "give either path or package"),
    ({"libraries": {"rtx": {"path": "/a", "package": "b"}}}, "give either path or package"),
    ({"libraries": {"cuda": {"path": "/a"}}}, "library 'cuda' of the providers has the name of a built-in"),
    ({"libraries": {"rtx": {"path": "/a", "device": "tpu"}}}, "device = 'tpu' is not known"),
    ({"provider_options": {"rtx": {}}}, "provider 'rtx' is not known"),
])  # fmt: skip
def test_a_table_that_cannot_be_is_refused_at_the_start(table, message):
    with pytest.raises(ConfigError, match=message):
        validate(OnnxruntimeSettings, table, "config [plugins.onnxruntime]")


def test_the_memory_that_models_may_take_caps_cudas_arena(dense, monkeypatch):
    asked = []

    def note(path, made, **arguments):
        asked.append(dict(arguments["providers"])["CUDAExecutionProvider"])
        raise RuntimeError("CUDA failure 100")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(providers.BUILT_IN.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", note)
    for options in (
        {"memory_bytes_cap": 7 << 30},
        {"memory_bytes_cap": 7 << 30, "gpu_bytes_cap": 1 << 30},
        {"provider_options": {"cuda": {"gpu_mem_limit": 3, "arena_extend_strategy": "kNextPowerOfTwo"}}},
        {},
    ):
        with pytest.raises(ModelError, match="CUDA failure 100"):
            Artifact(dense, ("cuda", "cpu"), options).open()
    assert [one.get("gpu_mem_limit") for one in asked] == [str(7 << 30), str(1 << 30), "3", None]
    assert [one["arena_extend_strategy"] for one in asked] == [
        "kSameAsRequested", "kSameAsRequested", "kNextPowerOfTwo", "kSameAsRequested",
    ]  # fmt: skip
    assert {one["device_id"] for one in asked} == {"0"}


# ---- plugin libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "message", "hint"), [
    ({"path": "/no/such.so"}, "library '/no/such.so' does not exist", "mend path"),
    ({"path": __file__}, "its library cannot be loaded: .*invalid ELF header", "made for this version"),
    ({"path": str(CAPI / "libonnxruntime_providers_shared.so")}, "CreateEpFactories", "made for this version"),
    ({"package": "no_such_package"}, "package 'no_such_package' brings no library: ModuleNotFoundError", "install it"),
    ({"package": "json"}, "package 'json' brings no library: it tells no path", "give the library's path"),
])  # fmt: skip
def test_a_library_that_is_none_is_named(dense, table, message, hint):
    with pytest.raises(ModelError, match=message) as caught:
        Artifact(dense, ("bad", "cpu"), {"libraries": {"bad": table}}).open()
    assert "provider 'bad'" in caught.value.message and hint in caught.value.hint


def test_an_older_onnx_runtime_says_that_it_takes_no_libraries(dense, monkeypatch):
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(ModelError, match=r"ONNX Runtime [\d.]+ takes no plugin libraries") as caught:
        Artifact(dense, ("new", "cpu"), {"libraries": {"new": {"path": __file__}}}).open()
    assert "1.22" in caught.value.hint


def test_a_library_that_lists_no_device_says_so(dense, monkeypatch):
    """As TensorRT-RTX's does on a card of another generation, and OpenVINO's beside another maker's CPU."""
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
    monkeypatch.setattr(providers, "_registered", {})
    with pytest.raises(ModelError, match=r"provider 'rtx': its library '.*' is loaded, but lists no device") as caught:
        Artifact(dense, ("rtx", "cpu"), {"libraries": {"rtx": {"path": __file__}}}).open()
    assert "nvidia-smi" in caught.value.hint


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from millhand.errors import MillhandError
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
path, accelerator, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
try:
    session = OnnxruntimeBackend().load(path, accelerator, options)
    if hasattr(session, "prove"):
        session.prove({"x": ("float32", (-1, 4))}, 8)
    y = session.run({"x": np.arange(12, dtype=np.float32).reshape(3, 4)})["y"]
    print(json.dumps({"y": y.tolist(), "proof": getattr(session, "proof", {})}))
    session.close()
except MillhandError as error:
    print(json.dumps({"error": error.message, "hint": error.hint}))
"""


def in_a_process(path, options, accelerator="cpu", site=FOLDER, **environment):
    """Load, prove and run in a process of its own: a library stays registered for good."""
    places = os.pathsep.join([os.fspath(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.fspath(path), accelerator, json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": places, "ORT_DISABLE_TELEMETRY": "1", "ORT_GGML_LOG": "error", **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


needs_ggml = pytest.mark.skipif(not GGML.exists(), reason="make providers installs the plugin library")
needs_rtx = pytest.mark.skipif(not (FOLDER / RTX).exists(), reason="make providers installs TensorRT-RTX's library")


@needs_ggml
@pytest.mark.parametrize("names", [["ggml", "cpu"], ["ggml"]])
def test_a_plugin_library_runs_a_model_and_is_proved(dense, names):
    table = {"path": str(GGML), "device": "cpu"}
    found = in_a_process(dense, {"providers": names, "libraries": {"ggml": table}})
    weight = numpy_helper.to_array(onnx.load(dense).graph.initializer[0])
    expected = np.maximum(np.arange(12, dtype=np.float32).reshape(3, 4) @ weight, 0)
    np.testing.assert_allclose(found["y"], expected, rtol=2e-3, atol=2e-3)
    assert found["proof"]["provider"] == "ggml" and found["proof"]["gpu_share"] == 1
    assert 0 < found["proof"]["max_difference"] < 1e-3  # its weights are float16
    assert found["proof"]["left_out"]["bound"] == "the buffers of 'ggml' are its own"


@needs_ggml
@pytest.mark.parametrize(("choice", "wanted"), [
    ({"device": "npu"}, "no device is a npu"),
    ({"vendor": "0x10de"}, "no device is a device of 0x10de"),
    ({"device": "gpu", "vendor": "nvidia"}, "no device is a gpu of nvidia"),
])  # fmt: skip
def test_a_library_without_the_device_that_is_asked_for_says_what_it_lists(dense, choice, wanted):
    options = {"providers": ["ggml", "cpu"], "libraries": {"ggml": {"path": str(GGML), **choice}}}
    found = in_a_process(dense, options)
    assert wanted in found["error"] and "its library lists a cpu of" in found["error"]
    assert "libraries.ggml" in found["hint"]


@needs_ggml
def test_a_device_is_found_by_its_vendors_name(dense):
    vendor = next(one.device.vendor for one in onnxruntime.get_ep_devices())
    table = {"path": str(GGML), "vendor": vendor[:3].lower()}
    assert in_a_process(dense, {"providers": ["ggml", "cpu"], "libraries": {"ggml": table}})["y"]


@needs_rtx
def test_tensorrt_rtx_on_a_machine_without_a_driver_says_so(dense):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    options = {"providers": ["rtx", "cuda", "cpu"], "libraries": {"rtx": {"package": RTX, "device": "gpu"}}}
    found = in_a_process(dense, {**options, "providers": ["rtx", "cpu"]})
    assert "provider 'rtx': its library cannot be loaded" in found["error"] and "libcuda.so.1" in found["error"]
    assert "no NVIDIA driver" in found["hint"] and "nvidia-smi" in found["hint"]


@pytest.mark.skipif(not (FOLDER / "gpu").exists(), reason="make providers GPU=1 installs onnxruntime-gpu")
@pytest.mark.parametrize(("names", "message"), [
    (["cuda", "cpu"], r"left out the provider 'cuda' and would run on CPUExecutionProvider: libcublasLt"),
    (["tensorrt", "cpu"], "Please install TensorRT libraries.*: libcublas"),
])  # fmt: skip
def test_the_gpu_build_without_cuda_names_the_library_that_it_misses(dense, names, message):
    import re

    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    found = in_a_process(dense, {"providers": names}, "GPU-1", FOLDER / "gpu", CUDA_VISIBLE_DEVICES="GPU-1")
    assert re.search(message, found["error"]), found
    assert "nvidia-smi" in found["hint"] and "onnxruntime-gpu[cuda,cudnn]" in found["hint"]
