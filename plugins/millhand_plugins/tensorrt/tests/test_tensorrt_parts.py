"""Parts that need no library: settings, ranges, progress, texts of faults, the driver, the plugin's hooks."""

from __future__ import annotations

import ast
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millhand.errors import ConfigError, ModelError
from millhand.hookspecs import KeyedMaker
from millhand.validation import validate
from millhand_plugins import tensorrt
from millhand_plugins.tensorrt import driver
from millhand_plugins.tensorrt.faults import brief, remedy
from millhand_plugins.tensorrt.listeners import Phases
from millhand_plugins.tensorrt.settings import TensorrtSettings
from millhand_plugins.tensorrt.shapes import NetworkInput, Traffic, make_profiles


@pytest.mark.parametrize("sizes", [[4, 2, 8], [0, 1, 2], [1, 9, 8]])
def test_ranges_must_ascend(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"'ranges\.frames' = \[.*\] is not lowest, usual, highest"):
        validate(TensorrtSettings, {"ranges": {"frames": sizes}}, "millhand.toml")


def test_the_typical_batch_is_kept_within_the_engine() -> None:
    x = NetworkInput("x", (-1, 4), ("n", ""))
    for typical, tuned in ((0, 1), (7, 7), (100, 16)):
        (profile,) = make_profiles([x], {}, Traffic(16, typical, {}), profile_of_one=False)
        assert (profile["x"].lowest, profile["x"].usual, profile["x"].highest) == ((1, 4), (tuned, 4), (16, 4))


def test_a_batch_of_one_alone_has_one_profile() -> None:
    x = NetworkInput("x", (-1, 4), ("n", ""))
    assert len(make_profiles([x], {}, Traffic(1, 1, {}), profile_of_one=True)) == 1
    assert len(make_profiles([x], {}, Traffic(8, 1, {}), profile_of_one=True)) == 2


def test_a_dimension_without_a_name_is_named_by_its_place() -> None:
    x = NetworkInput("x", (-1, 4, -1), ("n", "", ""))
    with pytest.raises(ModelError) as caught:
        make_profiles([x], {}, Traffic(8, 1, {}), profile_of_one=False)
    assert 'ranges] "x.2" = ' in caught.value.hint


def test_nested_phases_make_one_share_that_never_falls() -> None:
    phases, shares = Phases(), []

    def step(name: str, number: int) -> None:
        phases.step(name, number)
        shares.append(round(phases.share, 4))

    phases.start("all", "", 4)
    step("all", 0)
    phases.start("half of it", "all", 2)
    step("half of it", 0)
    step("half of it", 1)
    phases.finish("half of it")
    step("all", 1)
    phases.start("again", "all", 10)
    step("again", 0)
    phases.finish("again")
    phases.start("a stranger", "gone", 1)
    step("a stranger", 0)
    assert shares == [0.25, 0.375, 0.5, 0.5, 0.525, 1.0]


def test_messages_are_brief() -> None:
    text = (
        "Invalid Node - product\n"
        "ITensor::getDimensions: Error Code 4: API Usage Error (product: last dimension of input0 = 45 and second to "
        "last dimension of input1 = 44 but must match. In validate at /_src/optimizer/api/layers/product.cpp:192)\n"
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is "
        "insufficient for CUDA runtime version)"
    )
    assert brief(text) == (
        "product: last dimension of input0 = 45 and second to last dimension of input1 = 44 but must match."
    )
    assert "driver" not in remedy(text)
    assert brief("Error Code 2: wD: ScaleMode is illegal.") == "wD: ScaleMode is illegal."
    assert brief("Plugin not found") == "Plugin not found"
    assert brief("") == ""


def test_hooks_bring_a_backend_and_a_keyed_maker() -> None:
    assert [backend.name for backend in tensorrt.millhand_backends()] == ["tensorrt"]
    (maker,) = tensorrt.millhand_makers(TensorrtSettings())
    assert isinstance(maker, KeyedMaker)


def test_what_workers_and_builds_import_is_python_3_10_and_light() -> None:
    modules = ["backend", "maker", "settings"]
    script = (
        "import sys, json\n"
        + "".join(f"import millhand_plugins.tensorrt.{name}\n" for name in modules[:2])
        + "print(json.dumps([[n, getattr(m, '__file__', None)] for n, m in sys.modules.items()]))"
    )
    loaded = dict(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout))
    own = {name: path for name, path in loaded.items() if name.startswith("millhand_plugins.tensorrt") and path}
    assert len(own) >= 15
    assert not {"pydantic", "onnx", "tensorrt", "tensorrt_rtx_bindings", "pycuda", "tomllib", "asyncio"} & set(loaded)
    for path in own.values():
        tree = ast.parse(Path(path).read_text(), feature_version=(3, 10))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {"StrEnum", "Self", "override", "assert_never", "UTC"}, path


# ---- the driver -----------------------------------------------------------------------------------------------------


class CudaDouble:
    """libcuda.so.1, as ctypes calls it."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> int:
            if function == self._fails:
                return 100  # CUDA_ERROR_NO_DEVICE
            if function == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA A30"
            if function == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 0}[arguments[1]]
            if function == "cuDriverGetVersion":
                arguments[0]._obj.value = 12060
            return 0

        return call


class NvmlDouble:
    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.95.05"
        return 0


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts libraries in the place of the driver's."""

    def put(**found: Any) -> None:
        def open_library(name: str) -> Any:
            key = "cuda" if "cuda" in name else "nvml"
            if key not in found:
                raise OSError(f"{name}: cannot open shared object file")
            return found[key]

        fake = SimpleNamespace(**{**vars(ctypes), "CDLL": open_library})
        monkeypatch.setattr(driver, "ctypes", fake)
        driver.this_gpu.cache_clear()

    yield put
    driver.this_gpu.cache_clear()


def test_the_driver_names_the_gpu(libraries: Any) -> None:
    libraries(cuda=CudaDouble(), nvml=NvmlDouble())
    assert driver.this_gpu() == driver.Gpu("NVIDIA A30", "8.0", "580.95.05")


def test_without_nvml_the_cuda_version_stands_for_the_driver(libraries: Any) -> None:
    libraries(cuda=CudaDouble())
    assert driver.this_gpu().driver == "CUDA 12.6"


def test_no_driver_and_no_gpu_are_said(libraries: Any) -> None:
    libraries()
    with pytest.raises(ModelError, match="there is no NVIDIA driver here"):
        driver.this_gpu()
    libraries(cuda=CudaDouble("cuDeviceGet"))
    with pytest.raises(ModelError, match="cuDeviceGet with error 100"):
        driver.this_gpu()
