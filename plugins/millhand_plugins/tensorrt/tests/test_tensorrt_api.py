"""One code path for TensorRT 10.3, 10.16, 11.4 and TensorRT-RTX: held against what each of them really has."""

from __future__ import annotations

import gc
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cuda_double import Gpu
from onnx import helper
from trt_double import SURFACES, TrtDouble
from trt_nets import ORIN, SM80, convolution, matmul, save

from millhand.errors import ModelError
from millhand.workshop.recipe import Job, Made
from millhand_plugins.tensorrt import api
from millhand_plugins.tensorrt.backend import TensorrtBackend
from millhand_plugins.tensorrt.library import FULL, LIBRARIES, RTX, installed, library_of, load_library
from millhand_plugins.tensorrt.maker import TensorrtMaker
from millhand_plugins.tensorrt.settings import TensorrtSettings

FULL_VERSIONS = ("tensorrt 10.3.0", "tensorrt 10.16.1.11", "tensorrt 11.4.0.106")
RTX_VERSION = "tensorrt-rtx 1.7.1.116"
GONE = {
    "tensorrt 10.3.0": (
        "Builder.build_engine", "Builder.max_batch_size", "IBuilderConfig.max_workspace_size",
        "ICudaEngine.num_bindings", "ICudaEngine.get_binding_shape", "IExecutionContext.execute_async_v2",
        "IExecutionContext.set_binding_shape", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "IBuilderConfig.num_compute_capabilities",
    ),
    "tensorrt 10.16.1.11": ("Builder.build_engine", "ICudaEngine.num_bindings", "IExecutionContext.execute_async_v2"),
    "tensorrt 11.4.0.106": (
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.BF16", "BuilderFlag.INT8",
        "BuilderFlag.WEIGHTLESS", "IBuilderConfig.int8_calibrator", "IBuilderConfig.algorithm_selector",
        "Builder.platform_has_fast_fp16", "ITensor.dynamic_range", "ICudaEngine.device_memory_size",
        "IBuilderConfig.set_compute_capability", "OnnxParser.supports_model",
    ),
    RTX_VERSION: ("BuilderFlag.FP16", "IBuilderConfig.int8_calibrator", "Builder.build_engine_with_config"),
}  # fmt: skip

Put = Callable[[str], TrtDouble]


def make(job: Job, **keys: Any) -> Made:
    maker = TensorrtMaker(TensorrtSettings(**keys))
    return maker.make(maker.recipes(job.target)[-1], job)


@pytest.mark.parametrize("version", SURFACES)
def test_what_we_call_is_there_in_every_version(version: str) -> None:
    classes = [kind for _, kind in inspect.getmembers(api, inspect.isclass) if kind.__module__ == api.__name__]
    assert len(classes) == 11
    for kind in classes:
        ours = {name for name in {*vars(kind), *kind.__annotations__} if not name.startswith("_")}
        missing = ours - set(SURFACES[version][kind.__name__])
        assert not missing, f"{version}: {kind.__name__}"


def test_what_we_call_takes_what_we_give() -> None:
    """As the stubs of 10.13 have it: the same parameters by the same names in the same order, and no other must be."""
    stubs = json.loads((Path(__file__).parent / "captures" / "stubs.json").read_text())
    held = 0
    for kind in (kind for _, kind in inspect.getmembers(api, inspect.isclass) if kind.__module__ == api.__name__):
        known = stubs[kind.__name__]
        for name, member in vars(kind).items():
            if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            if isinstance(member, property):
                assert known[name] == [], f"{kind.__name__}.{name} is a call"
                continue
            ours = list(inspect.signature(member).parameters)[1:]
            fits = [
                list(call)[: len(ours)] == ours and not any(must for other, must in call.items() if other not in ours)
                for call in known[name]
            ]
            assert any(fits), f"{kind.__name__}.{name}: {ours}, the stubs have {known[name]}"
            held += 1
        assert all(known[name] == [] for name in kind.__annotations__), f"{kind.__name__}: an attribute is a call"
    assert held > 30


@pytest.mark.parametrize(("version", "name"), [(version, name) for version, names in GONE.items() for name in names])
def test_the_double_refuses_what_is_gone(version: str, name: str, trt: Put) -> None:
    double = trt(version)
    kind, _, member = name.partition(".")
    found = getattr(double, kind)
    thing = found if isinstance(SURFACES[version][kind], dict) else object.__new__(found)
    with pytest.raises(AttributeError):
        getattr(thing, member)


@pytest.mark.parametrize("version", FULL_VERSIONS)
def test_one_path_builds_with_every_version(
    version: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    double = trt(version)
    options = {
        "optimization_level": 4,
        "refit": True,
        "version_compatible": True,
        "hardware_compatibility": "ampere_plus",
    }
    made = make(make_job(matmul(tmp_path / "m.onnx"), target=ORIN, options=options))
    assert (tmp_path / "made" / made.artifact).read_bytes().startswith(b"ftrt")
    assert made.options == {"library": "tensorrt"}
    assert made.key == {"tensorrt major": double.__version__.partition(".")[0], "driver": "540.4.0"}
    # What listens, and what is pointed to, is freed last.
    order = [name for name in double.freed if name in ("OnnxParser", "INetworkDefinition", "Builder")]
    assert order == ["OnnxParser", "INetworkDefinition", "Builder"]
    calls = double.calls
    # TensorRT-RTX crashes where a parser is freed that had a recorder.
    assert calls.index("OnnxParser.parse_from_file") < calls.index("Builder.error_recorder=")
    assert calls.index("IBuilderConfig.set_timing_cache") < calls.index("Builder.build_serialized_network")


@pytest.mark.parametrize("version", FULL_VERSIONS)
def test_a_plain_engine_is_tied_to_library_driver_and_gpu(
    version: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    double = trt(version)
    made = make(make_job(matmul(tmp_path / "m.onnx"), target=ORIN))
    assert made.key == {"tensorrt": double.__version__, "driver": "540.4.0", "gpu": "Orin"}
    now = TensorrtMaker(TensorrtSettings()).key(ORIN)
    assert made.key.items() <= now.items()


def test_a_batch_of_one_has_a_profile_of_its_own_where_kernels_are_chosen_at_the_build(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    model = matmul(tmp_path / "m.onnx")
    double = trt("tensorrt 10.3.0")
    make(make_job(model, target=ORIN))
    assert (
        b'"profiles": [{"x": [[1, 44], [1, 44], [1, 44]]}, {"x": [[1, 44], [4, 44], [64, 44]]}]'
        in (tmp_path / "made" / "model.engine").read_bytes()
    )
    assert double.calls.count("IOptimizationProfile.set_shape") == 2
    double = trt(RTX_VERSION)
    made = make(make_job(model, target=SM80))
    assert double.calls.count("IOptimizationProfile.set_shape") == 1
    assert made.options["runtime_cache"] == "../cache/runtime.cache"
    assert "IBuilderConfig.create_timing_cache" not in double.calls
    assert "IBuilderConfig.set_compute_capability" in double.calls


def test_hardware_compatibility_that_came_later_is_refused_before(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    options = {"hardware_compatibility": "same_compute_capability"}
    trt("tensorrt 10.3.0")
    model = matmul(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"TensorRT 10\.3\.0 does not know .* 'same_compute_capability'") as caught:
        make(make_job(model, target=ORIN, options=options))
    assert "10.13" in caught.value.hint
    trt("tensorrt 10.16.1.11")
    assert make(make_job(model, target=ORIN, options=options)).key.keys() == {"tensorrt", "driver"}


def test_scratch_memory_is_half_of_the_accelerators_unless_the_owner_says(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    double = trt("tensorrt 10.3.0")
    limits = []
    monkeypatch.setattr(
        double.IBuilderConfig, "set_memory_pool_limit", lambda self, pool, size: limits.append((pool.name, size))
    )
    target = msgspec.structs.replace(ORIN, memory_bytes=1000)
    model = matmul(tmp_path / "m.onnx")
    for options in ({}, {"workspace_bytes_cap": 7}):
        make(make_job(model, target=target, options=options))
    make(make_job(model, target=ORIN))
    assert limits == [("WORKSPACE", 500), ("WORKSPACE", 7)]


def test_kernels_times_are_kept_for_the_next_build(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    trt("tensorrt 10.3.0")
    job, cache = make_job(matmul(tmp_path / "m.onnx"), target=ORIN), tmp_path / "cache" / "timing.cache"
    make(job)
    assert cache.read_bytes().endswith(b"\n and timed")
    make(job)
    assert cache.read_bytes().endswith(b"\n and timed and timed")
    assert not caplog.records


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data.replace(b"540.4.0", b"535.0.0"), "its driver was 535.0.0, now it is 540.4.0"),
        (lambda data: data.replace(b"TensorRT 10.3.0", b"TensorRT 8.6.1"), "its library was TensorRT 8.6.1"),
        (lambda data: data[:-3], "it is damaged"),
        (lambda data: b"\xff\xfe" * 50, "it is damaged"),
        (lambda data: b"", "it is damaged"),
    ],
    ids=["driver", "library", "cut off", "garbage", "empty"],
)
def test_a_cache_of_another_driver_or_library_is_set_aside(
    spoil: Any, why: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    trt("tensorrt 10.3.0")
    job, cache = make_job(matmul(tmp_path / "m.onnx"), target=ORIN), tmp_path / "cache" / "timing.cache"
    make(job)
    spoiled = spoil(cache.read_bytes())
    cache.write_bytes(spoiled)
    with caplog.at_level(logging.WARNING):
        make(job)
    assert why in caplog.text
    assert (tmp_path / "cache" / "timing.cache.aside").read_bytes() == spoiled
    assert cache.read_bytes().endswith(b"\n and timed")


def test_a_cache_that_the_library_refuses_is_set_aside(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    from millhand_plugins.tensorrt.cache import CacheFile

    trt("tensorrt 10.3.0")
    job, cache = make_job(matmul(tmp_path / "m.onnx"), target=ORIN), tmp_path / "cache" / "timing.cache"
    writer = {"library": "TensorRT 10.3.0", "driver": "540.4.0", "gpu": "Orin"}
    CacheFile(cache, writer).write(b"foreign")
    make(job)
    assert "the library refuses it" in caplog.text
    assert cache.read_bytes().endswith(b"\n and timed")


def test_a_cache_that_cannot_be_written_costs_the_cache_alone(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    trt("tensorrt 10.3.0")
    (tmp_path / "cache").write_text("a file where a folder should be")
    made = make(make_job(matmul(tmp_path / "m.onnx"), target=ORIN))
    assert (tmp_path / "made" / made.artifact).exists()
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("code", "text", "what", "hint"),
    [
        ("FAILED_ALLOCATION", "Requested amount of GPU memory (8589934592 bytes) could not be allocated.",
         "the memory does not suffice", "free memory"),
        ("INTERNAL_ERROR", "Could not find any implementation for node {ForeignNode[w...product]}.",
         "node {ForeignNode[w...product]}", "workspace_bytes_cap or optimization_level"),
    ],
)  # fmt: skip
def test_failures_of_a_build_have_remedies(
    code: str, text: str, what: str, hint: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    double = trt("tensorrt 10.16.1.11")
    double.build_fault = (code, text)
    with pytest.raises(ModelError) as caught:
        make(make_job(matmul(tmp_path / "m.onnx"), target=ORIN))
    assert what in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("version", FULL_VERSIONS)
def test_operators_and_ranges_are_refused_as_with_the_real_library(
    version: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    trt(version)
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain="acme")
    model = save(tmp_path / "m.onnx", [node], out=("batch", 44), domains=["acme"])
    with pytest.raises(ModelError, match=r"node 'frob' \(Frobnicate\): TensorRT .* has no operator"):
        make(make_job(model, target=ORIN))
    with pytest.raises(ModelError, match=r"free in dimension 2 \('frames'\)"):
        make(make_job(convolution(tmp_path / "c.onnx"), {"x": ("float32", (-1, 2, -1))}, target=ORIN))


def test_opsets_by_version(trt: Put, tmp_path: Path, make_job: Callable[..., Job]) -> None:
    for version, newest in (("tensorrt 10.3.0", 21), ("tensorrt 10.16.1.11", 24), ("tensorrt 11.4.0.106", 24)):
        trt(version)
        make(make_job(matmul(tmp_path / "m.onnx", opset=newest), target=ORIN))
        with pytest.raises(ModelError, match=f"up to {newest}"):
            make(make_job(matmul(tmp_path / "n.onnx", opset=newest + 1), target=ORIN))


def test_a_build_that_shall_end_ends_at_its_next_step(trt: Put, tmp_path: Path, make_job: Callable[..., Job]) -> None:
    double = trt("tensorrt 11.4.0.106")

    def progress(share: float, step: str) -> None:
        if step == "Building engine" and share > 0.4:
            raise InterruptedError("deadline")

    with pytest.raises(InterruptedError, match="deadline"):
        make(make_job(matmul(tmp_path / "m.onnx"), target=ORIN, progress=progress))
    assert double.freed.count("Builder") == 1


@pytest.mark.parametrize("version", SURFACES)
def test_an_error_keeps_none_of_the_librarys_objects(
    version: str, trt: Put, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    """Else the garbage collector frees them, perhaps inside a callback of the library, which then waits for itself."""
    double = trt(version)
    target = SM80 if version.startswith("tensorrt-rtx") else ORIN
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain="acme")
    errors = []
    gc.disable()
    try:
        for model in (save(tmp_path / "m.onnx", [node], domains=["acme"]), matmul(tmp_path / "n.onnx")):
            double.build_fault = ("INTERNAL_ERROR", "Could not find any implementation for node product.")
            with pytest.raises(ModelError) as caught:
                make(make_job(model, target=target))
            errors.append(caught.value)
        path = tmp_path / "old.engine"
        path.write_bytes(b"vtrt" if version.startswith("tensorrt-rtx") else b"ftrt")
        path.write_bytes(path.read_bytes() + b'{"version": "1"}')
        with pytest.raises(ModelError) as caught:
            TensorrtBackend().load(path, "GPU-1", {})
        errors.append(caught.value)
    finally:
        gc.enable()
    assert len(errors) == 3
    assert {name: double.freed.count(name) for name in ("Builder", "INetworkDefinition", "OnnxParser", "Runtime")} == {
        "Builder": 2,
        "INetworkDefinition": 2,
        "OnnxParser": 2,
        "Runtime": 1,
    }


# ---- which library --------------------------------------------------------------------------------------------------


def test_the_full_library_wins_on_its_own_machine_and_cannot_build_ahead(trt: Put, gpu: Gpu) -> None:
    trt("tensorrt 10.3.0")
    assert installed(FULL)
    assert not installed(RTX)
    assert TensorrtMaker(TensorrtSettings()).recipes(ORIN)
    assert not TensorrtMaker(TensorrtSettings()).recipes(SM80)
    with pytest.raises(ModelError, match="only for a GPU of the machine"):
        TensorrtMaker(TensorrtSettings(library="tensorrt")).recipes(SM80)


def test_nothing_is_made_where_nothing_is_installed(
    trt: Put, tmp_path: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    trt("tensorrt 10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    maker = TensorrtMaker(TensorrtSettings())
    assert not maker.recipes(ORIN)
    assert not maker.recipes(SM80)
    with pytest.raises(ModelError, match="TensorRT-RTX is not installed") as caught:
        load_library(RTX)
    assert "millhand[tensorrt-rtx]" in caught.value.hint


def test_an_empty_folder_of_its_name_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert not installed(FULL)


def test_a_library_that_is_too_old_is_refused(trt: Put) -> None:
    trt("tensorrt 10.3.0").__version__ = "8.6.1"
    with pytest.raises(ModelError, match=r"TensorRT 8\.6\.1 is too old: 10\.3 is the oldest"):
        load_library(FULL)


def test_of_two_libraries_only_the_one_that_is_needed_is_imported(trt: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """They export the same symbols."""
    import sys

    from millhand_plugins.tensorrt import backend, maker

    rtx = trt(RTX_VERSION)
    trt("tensorrt 10.3.0")
    monkeypatch.setitem(sys.modules, rtx.__name__, rtx)
    imported = []
    for user in (backend, maker):
        monkeypatch.setattr(user, "load_library", lambda name: imported.append(name) or load_library(name))
    TensorrtBackend().prepare()
    assert not imported
    key = TensorrtMaker(TensorrtSettings()).key(ORIN)
    assert (key["tensorrt"], key["gpu"]) == ("10.3.0", "Orin")
    assert imported == [FULL]
    assert "tensorrt" not in TensorrtMaker(TensorrtSettings()).key(SM80)
    assert imported == [FULL, RTX]


def test_an_engine_tells_its_library() -> None:
    assert library_of(b"vtrt....") == RTX
    assert library_of(b"ftrt....") == FULL
    assert library_of(b"vtrt....", "tensorrt") == FULL
    assert set(LIBRARIES) == {FULL, RTX}
