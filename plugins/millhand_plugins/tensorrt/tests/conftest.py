"""Nets, jobs, the real TensorRT-RTX, and doubles of what a machine without a GPU lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "kit"))

from cuda_double import Gpu, RuntimeDouble, pycuda_double
from trt_double import TrtDouble
from trt_nets import FEATURES, SM80

from millhand.serving.tensors import Specs
from millhand.workshop.recipe import Job
from millhand_plugins.tensorrt import contexts, driver, maker
from millhand_plugins.tensorrt.library import LIBRARIES, RTX, installed, load_library
from millhand_plugins.tensorrt.settings import TensorrtSettings


@pytest.fixture
def rtx() -> None:
    """The real library."""
    if not installed(RTX):
        pytest.skip("TensorRT-RTX is not installed: pip install 'millhand[tensorrt-rtx]'")


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job on a file; keys of the plugin's table as `options`."""

    def make(model: Path, inputs: Specs = FEATURES, *, options: dict[str, Any] | None = None, **keys: Any) -> Job:
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        table = TensorrtSettings.model_validate(options or {}).model_dump(mode="json")
        given = {"target": SM80, "max_batch": 64, "typical_batch": 4, "cache": tmp_path / "cache", "calibration": {}}
        return Job(model=model, folder=folder, inputs=inputs, options=table, **{**given, **keys})

    return make


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A double of pycuda and of the driver."""
    made = Gpu()
    package, module = ModuleType("pycuda"), pycuda_double(made)
    package.driver = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    found = driver.Gpu("Orin", "8.7", "540.4.0")
    for user in (maker, contexts):
        monkeypatch.setattr(user, "this_gpu", lambda: found)
    monkeypatch.setattr(contexts, "cuda_runtime", lambda: None)
    return made


@pytest.fixture
def graphs(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> RuntimeDouble:
    """A double of cuda-python."""
    runtime = RuntimeDouble(gpu)
    monkeypatch.setattr(contexts, "cuda_runtime", lambda: runtime)
    return runtime


@pytest.fixture
def trt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], TrtDouble]]:
    """Puts a double of one version in the place of its library; the other one counts as not installed."""

    def put(version: str) -> TrtDouble:
        double = TrtDouble(version, gpu)
        for traits in LIBRARIES.values():
            for name in (traits.module, traits.bindings):
                if name:
                    monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, double.__name__, double)
        load_library.cache_clear()
        return double

    yield put
    load_library.cache_clear()
