"""Real engines by the real TensorRT-RTX, for compute capability 8.0, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from trt_nets import FEATURES, SHIPPED, SM80, SOURCES, convolution, matmul, model_name, quantised, save, specs

from millhand.errors import ModelError
from millhand.workshop.recipe import Job, Target
from millhand_plugins.quantize.maker import QuantizeMaker
from millhand_plugins.tensorrt.backend import TensorrtBackend
from millhand_plugins.tensorrt.library import RTX, load_library
from millhand_plugins.tensorrt.maker import TensorrtMaker
from millhand_plugins.tensorrt.settings import TensorrtSettings

pytestmark = pytest.mark.usefixtures("rtx")
MAGIC = b"vtrt"


def make(job: Job, precision: str = "fp32", **keys: Any) -> Any:
    maker = TensorrtMaker(TensorrtSettings(**keys))
    recipe = next(recipe for recipe in maker.recipes(job.target) if recipe.precision == precision)
    return maker.make(recipe, job)


def refused(job: Job) -> ModelError:
    with pytest.raises(ModelError) as caught:
        make(job)
    assert not list(job.folder.iterdir())
    return caught.value


@pytest.mark.parametrize("precision", ["fp32", *SOURCES])
@pytest.mark.parametrize("source", SHIPPED, ids=model_name)
def test_every_shipped_model_in_every_precision(
    source: Path, precision: str, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    model = quantised(source, tmp_path / "quantised", precision)
    told: list[tuple[float, str]] = []
    job = make_job(model, specs(source), progress=lambda share, step: told.append((share, step)))
    made = make(job, precision)
    engine = (job.folder / made.artifact).read_bytes()
    assert engine.startswith(MAGIC)
    assert b"sm80" in engine
    version = load_library(RTX).version
    assert made.backend == "tensorrt"
    assert made.key == {"tensorrt-rtx": version}
    assert made.options["library"] == RTX
    assert "tuned for [4" in " ".join(made.notes)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len({step for _, step in told}) > 5


def test_precisions_come_in_the_profiles_order_and_begin_where_quantize_ends() -> None:
    recipes = TensorrtMaker(TensorrtSettings()).recipes(SM80)
    assert [recipe.name for recipe in recipes] == ["engine-fp16", "engine-int8", "engine-fp32", "engine-int4"]
    assert {recipe.precision: recipe.source for recipe in recipes} == {"fp32": "", **SOURCES}
    made = {recipe.name for recipe in QuantizeMaker().recipes(SM80)}
    assert made >= set(SOURCES.values())


@pytest.mark.parametrize("capability", ["8.7", "9.0", "7.0", ""])
def test_targets_that_it_cannot_build_for_have_no_recipes(capability: str) -> None:
    target = Target(name="sm", accelerator="", compute_capability=capability)
    assert not TensorrtMaker(TensorrtSettings()).recipes(target)


def test_a_library_that_the_owner_names_must_fit_the_target() -> None:
    maker = TensorrtMaker(TensorrtSettings(library="tensorrt-rtx"))
    with pytest.raises(ModelError, match=r"library = 'tensorrt-rtx' builds nothing for target 'sm87'.*7\.5, 8\.0"):
        maker.recipes(Target(name="sm87", accelerator="GPU-1", compute_capability="8.7"))


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain="acme")
    error = refused(make_job(save(tmp_path / "m.onnx", [node], out=("batch", 44), domains=["acme"])))
    assert "node 'frob' (Frobnicate)" in error.message
    assert "has no operator 'Frobnicate'" in error.message
    assert "export the model without Frobnicate" in error.hint


def test_an_operator_of_onnx_that_it_lacks_is_named(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="first"), helper.make_node("NonZero", ["h"], ["y"], name="nz")]
    error = refused(make_job(save(tmp_path / "m.onnx", nodes, out=(2, "n"))))
    assert "node 'nz' (NonZero)" in error.message
    assert "has no operator 'NonZero'" in error.message


def test_shapes_that_do_not_fit_name_the_node(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    error = refused(make_job(matmul(tmp_path / "m.onnx", shape=("batch", 45)), {"x": ("float32", (-1, 45))}))
    assert "node 'product' (MatMul)" in error.message
    assert "input0 = 45" in error.message
    assert "the shapes in the file do not fit together" in error.hint


def test_mixed_types_name_the_node_and_the_remedy(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mixed")
    weights = {"w": np.ones((44, 64), np.float16)}
    error = refused(make_job(save(tmp_path / "m.onnx", [node], weights=weights)))
    assert "node 'mixed' (MatMul)" in error.message
    assert "insert Cast nodes" in error.hint


def test_zero_points_that_are_not_zero_have_a_remedy(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequantise"),
    ]
    weights = {"s": np.float32(0.1), "z": np.uint8(128)}
    error = refused(make_job(save(tmp_path / "m.onnx", nodes, out=("batch", 44), weights=weights)))
    assert "node 'quantise' (QuantizeLinear)" in error.message
    assert "zero points of 0" in error.hint


def test_blocks_that_do_not_divide_the_rows_have_a_remedy(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    codes = helper.make_tensor("q", TensorProto.INT4, (44, 64), [1] * 44 * 64)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="weights", axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    weights = {"q": codes, "s": np.ones((3, 64), np.float32)}
    error = refused(make_job(save(tmp_path / "m.onnx", nodes, weights=weights, opset=21)))
    assert "node 'weights' (DequantizeLinear)" in error.message
    assert "blocks that divide the rows" in error.hint


def test_external_data_that_are_missing_are_named(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    data = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    model = matmul(tmp_path / "m.onnx", **data)
    make(make_job(model))
    (tmp_path / "made" / "model.engine").unlink()
    (tmp_path / "weights.bin").unlink()
    error = refused(make_job(model))
    assert "external data of initializer 'w'" in error.message
    assert str(tmp_path / "weights.bin") in error.message


def test_an_opset_that_is_too_new_is_refused_before_it_is_misread(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    error = refused(make_job(matmul(tmp_path / "m.onnx", opset=99)))
    assert "uses opset 99" in error.message
    assert "at most 24" in error.hint


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "no graph"), (b"\x08\x0a", "no graph"), (bytes(range(255, 0, -1)) * 9, "no ONNX model"), (None, "cut off")],
    ids=["empty", "head alone", "garbage", "cut off"],
)
def test_files_that_are_no_models(
    content: bytes | None, why: str, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    model = matmul(tmp_path / "m.onnx")
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2] if content is None else content)
    error = refused(make_job(model))
    assert why in error.message
    assert "'m.onnx'" in error.message


def test_a_file_with_a_damaged_graph_is_refused_by_the_parser(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    model = matmul(tmp_path / "m.onnx")
    whole = model.read_bytes()
    begin = whole.index(b"MatMul") - 8
    model.write_bytes(whole[:begin] + b"\xff" * 8 + whole[begin + 8 :])
    assert "'m.onnx'" in refused(make_job(model)).message


def test_a_free_dimension_without_a_range_is_named_and_with_one_is_built(
    tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    model, inputs = convolution(tmp_path / "m.onnx"), {"x": ("float32", (-1, 2, -1))}
    error = refused(make_job(model, inputs))
    assert "input 'x' is free in dimension 2 ('frames')" in error.message
    assert "[plugins.tensorrt.ranges] frames = [lowest, usual, highest]" in error.hint
    for key in ("frames", "x.2"):
        made = make(make_job(model, inputs, options={"ranges": {key: [16, 64, 256]}}))
        assert "'x' [1, 2, 16] to [64, 2, 256], tuned for [4, 2, 64]" in made.notes
    made = make(make_job(model, {"x": ("float32", (-1, 2, 60))}))
    assert "'x' [1, 2, 60] to [64, 2, 60], tuned for [4, 2, 60]" in made.notes


def test_a_fixed_batch_is_refused(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    error = refused(make_job(matmul(tmp_path / "m.onnx", shape=(8, 44), out=(8, 64))))
    assert "input 'x' has shape [8, 44]" in error.message


def test_inputs_must_be_those_of_model_toml(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    model = matmul(tmp_path / "m.onnx")
    assert "needs input 'x'" in refused(make_job(model, {"other": ("float32", (-1, 44))})).message
    both = {**FEATURES, "second": ("float32", (-1, 4))}
    assert "has no input 'second'" in refused(make_job(model, both)).message
    wide = save(
        tmp_path / "d.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"], name="sum")],
        out=("batch", 44),
        kind=TensorProto.DOUBLE,
    )
    error = refused(make_job(wide, {"x": ("float64", (-1, 44))}))
    assert "takes input 'x' as float32, model.toml declares float64" in error.message


def test_texts_cannot_be_built(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    model = save(tmp_path / "m.onnx", [node], ("batch", 1), ("batch", 1), kind=TensorProto.STRING)
    error = refused(make_job(model, {"x": ("object", (-1, 1))}))
    assert "input 'x'" in error.message
    assert "TensorRT knows float" in error.hint


def test_a_build_ends_cleanly_where_it_shall_end(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    told: list[str] = []

    def progress(share: float, step: str) -> None:
        told.append(step)
        if share > 0.3:
            raise InterruptedError("enough")

    model = matmul(tmp_path / "m.onnx")
    with pytest.raises(InterruptedError, match="enough"):
        make(make_job(model, progress=progress))
    assert len(told) < 60
    assert not (tmp_path / "made" / "model.engine").exists()
    make(make_job(model))


def test_scratch_memory_that_does_not_suffice_is_named(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    error = refused(make_job(matmul(tmp_path / "m.onnx"), options={"workspace_bytes_cap": 64}))
    assert "within workspace limit" in error.message
    assert "raise [plugins.tensorrt] workspace_bytes_cap" in error.hint


def test_a_build_without_memory_says_so(tmp_path: Path) -> None:
    """In a process of its own, with so little address space that the library's own allocations fail. At some places it
    bears that badly and aborts or hangs, which is what the workshop's deadline is for; at most it says so."""
    script = """
        import resource, sys
        from pathlib import Path
        from millhand.errors import ModelError
        from millhand.workshop.recipe import Job, Target
        from millhand_plugins.tensorrt.library import load_library
        from millhand_plugins.tensorrt.maker import TensorrtMaker
        from millhand_plugins.tensorrt.settings import TensorrtSettings
        load_library("tensorrt-rtx")
        source, folder, spare = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        maker = TensorrtMaker(TensorrtSettings())
        target = Target(name="sm80", accelerator="", compute_capability="8.0")
        job = Job(model=source, folder=folder, target=target, inputs={"features": ("float32", (-1, 86))},
                  calibration={}, max_batch=64, typical_batch=4, options={}, cache=folder)
        try:
            maker.make(maker.recipes(target)[0], job)
            print("built")
        except ModelError as error:
            print(error.message, "|", error.hint)
    """
    source = next(path for path in SHIPPED if model_name(path) == "turbofan-rul")
    said = []
    for spare in (4, 2, 1, 64):
        command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(tmp_path), str(spare << 20)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            said.append(run.stdout.strip() or run.stderr.strip())
            if "the memory does not suffice" in run.stdout:
                assert "free memory" in run.stdout
                return
    pytest.fail(f"no message about memory: {said}")


def test_refit_needs_the_gpu_and_version_compatibility_does_not(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    model = matmul(tmp_path / "m.onnx")
    assert "refitted only where the GPU is" in refused(make_job(model, options={"refit": True})).message
    made = make(make_job(model, options={"version_compatible": True, "hardware_compatibility": "ampere_plus"}))
    assert made.key == {"tensorrt-rtx major": "1"}
    assert "hardware_compatibility has no effect with TensorRT-RTX" in made.notes


def test_the_key_names_what_is_installed() -> None:
    key = TensorrtMaker(TensorrtSettings()).key(SM80)
    version = load_library(RTX).version
    assert key["tensorrt-rtx"] == version
    assert key["tensorrt-rtx major"] == version.partition(".")[0]
    assert "gpu" not in key


def test_builds_one_after_another_leave_nothing(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    model, broken = matmul(tmp_path / "m.onnx"), matmul(tmp_path / "b.onnx", shape=("batch", 45))
    resident = []
    for number in range(24):
        make(make_job(model))
        (tmp_path / "made" / "model.engine").unlink()
        refused(make_job(broken, {"x": ("float32", (-1, 45))}))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        if number in (7, 23):
            resident.append(pages)
    assert resident[1] - resident[0] < 4096, "16 more builds took more than 16 MiB"


# ---- engines that this machine must refuse --------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path, make_job: Callable[..., Job]) -> Path:
    job = make_job(matmul(tmp_path / "m.onnx"))
    return job.folder / str(make(job).artifact)


def load_refused(path: Path, accelerator: str = "GPU-1", **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        TensorrtBackend().load(path, accelerator, options)
    assert path.name in caught.value.message or "not installed" in caught.value.message
    return caught.value


def no_gpu() -> bool:
    return not Path("/dev/nvidiactl").exists() and not Path("/dev/nvhost-gpu").exists()


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU here")
def test_without_a_driver_an_engine_is_refused_by_name(engine: Path) -> None:
    error = load_refused(engine)
    assert "engine 'model.engine' needs an NVIDIA GPU with a driver that is new enough" in error.message
    assert "cudaError 35" in error.message
    assert "nvidia-smi" in error.hint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: b"ftrt" + data[4:], "another library or version"),
        (lambda data: data[: len(data) // 2], "damaged or cut off"),
        (lambda data: data[:40], "damaged or cut off"),
        (lambda data: b"", "is empty"),
        (lambda data: b"no engine at all" * 99, "another library or version, or is damaged"),
    ],
    ids=["of another library", "half", "head alone", "empty", "garbage"],
)
def test_files_that_are_no_engine_of_this_library(engine: Path, change: Any, what: str) -> None:
    engine.write_bytes(change(engine.read_bytes()))
    error = load_refused(engine, library=RTX)
    assert what in error.message
    assert "millhand model build" in error.hint


def test_an_engine_of_tensorrt_needs_tensorrt(tmp_path: Path) -> None:
    path = tmp_path / "old.engine"
    path.write_bytes(b"ftrt" + b"\0" * 99)
    assert "TensorRT is not installed" in load_refused(path).message


def test_an_engine_does_not_run_on_the_cpu(engine: Path) -> None:
    error = load_refused(engine, "cpu")
    assert "placed on the CPU" in error.message


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in load_refused(tmp_path / "none.engine").message


def test_loading_leaves_nothing(engine: Path) -> None:
    if not no_gpu():
        pytest.skip("there is a GPU here")
    before = time.monotonic()
    for _ in range(20):
        load_refused(engine)
    assert time.monotonic() - before < 30
