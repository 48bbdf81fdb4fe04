"""ONNX files: small nets, nets that must be refused, and the shipped models in each precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millhand.serving.tensors import Specs
from millhand.workshop.recipe import Job, Target
from millhand_plugins.quantize.maker import QuantizeMaker
from millhand_plugins.quantize.settings import QuantizeSettings

SM80 = Target(name="sm80", accelerator="", compute_capability="8.0", precisions=("fp16", "int8", "bf16", "fp32"))
ORIN = Target(name="sm87", accelerator="GPU-1", compute_capability="8.7", precisions=("fp16", "int8", "fp32"))
FEATURES: Specs = {"x": ("float32", (-1, 44))}
PLUGINS = Path(__file__).parents[3]
SHIPPED = sorted(PLUGINS.glob("*/models/*/*/*.onnx"))
"""Every model that the project ships."""
SOURCES = {"fp16": "fp16", "int8": "int8-qdq", "int4": "int4-qdq"}
"""Precision of an engine -> the recipe that its file comes from."""
RANDOM = np.random.default_rng(5)


def model_name(path: Path) -> str:
    return path.parts[-3]


def specs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A file's inputs as model.toml would declare them."""
    found = {}
    for info in onnx.load(path).graph.input:
        kind = info.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        found[info.name] = (dtype, tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim))
    return found


def save(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[Any] = ("batch", 44),
    out: Sequence[Any] = ("batch", 64),
    *,
    weights: dict[str, Any] | None = None,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Write a net with input `x` and output `y`."""
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in (weights or {}).items()
    ]
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", kind, out)
    graph = helper.make_graph(list(nodes), "net", [x], [y], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, **keys)
    return path


def matmul(path: Path, **keys: Any) -> Path:
    """y = x w, `x` [batch, 44]."""
    weights = {"w": RANDOM.standard_normal((44, 64)).astype(np.float32)}
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], weights=weights, **keys)


def convolution(path: Path) -> Path:
    """`x` [batch, 2, frames], free in both."""
    weights = {"k": RANDOM.standard_normal((4, 2, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "k"], ["y"], name="conv", pads=[1, 1])
    return save(path, [node], ("batch", 2, "frames"), ("batch", 4, "frames"), weights=weights)


def quantised(source: Path, folder: Path, precision: str) -> Path:
    """A shipped model as the plugin quantize gives it to engines. Its accuracy is of no matter here: the calibration
    rows are random, and the rounding of int4 is learned in one step."""
    if precision == "fp32":
        return source
    maker = QuantizeMaker()
    recipe = next(recipe for recipe in maker.recipes(SM80) if recipe.name == SOURCES[precision])
    inputs = specs(source)
    rows = {name: RANDOM.standard_normal((64, *shape[1:])).astype(dtype) for name, (dtype, shape) in inputs.items()}
    options = QuantizeSettings.model_validate({"rounding": {"steps": 1}}).model_dump(mode="json")
    folder.mkdir()
    job = Job(
        model=source,
        folder=folder,
        target=SM80,
        inputs=inputs,
        calibration=rows if recipe.calibrated else {},
        max_batch=64,
        typical_batch=8,
        options=options,
        cache=folder / "cache",
    )
    return folder / maker.make(recipe, job).artifact
