"""The maker: its recipes, and how each is made. Runs in a process of its own: Python 3.10, heavy imports in `make`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from millhand.workshop.recipe import CPU, Job, Made, Recipe, Target
from millhand_plugins.quantize.cpu import int8_key

NEEDED = ("onnx", "onnxruntime")

INT8_STATIC = Recipe(
    name="int8-static", precision="int8", calibrated=True, minutes=0.5,
    description="weights and activations in int8, ranges from recorded rows: the fastest on most CPUs",
)  # fmt: skip
INT8_DYNAMIC = Recipe(
    name="int8-dynamic", precision="int8", minutes=0.2,
    description="weights in int8, ranges found at each inference: needs no recorded rows",
)  # fmt: skip
HALF = Recipe(name="fp16", precision="fp16", minutes=0.1, description="float16: half the size")
INT4 = Recipe(
    name="int4", precision="int4", minutes=0.2,
    description="weights of Gemm and MatMul in int4, rounded to nearest: an eighth of the size",
)  # fmt: skip
INT4_ANNEALED = Recipe(
    name="int4-annealed", precision="int4", calibrated=True, minutes=5,
    description="as int4, with rounding learned on recorded rows: far smaller errors",
)  # fmt: skip
MIXED = Recipe(
    name="mixed", precision="mixed", calibrated=True, minutes=10,
    description="each layer in int4, int8 or float16: the fewest bits that pass the gate",
)  # fmt: skip
INT8_QDQ = Recipe(
    name="int8-qdq", precision="int8", calibrated=True, minutes=0.5,
    description="int8 as TensorRT reads it: symmetric, weights by channel",
)  # fmt: skip
INT4_QDQ = Recipe(
    name="int4-qdq", precision="int4", calibrated=True, minutes=5,
    description="int4 weights as TensorRT reads them, by blocks, with learned rounding",
)  # fmt: skip

ON_CPU = (INT8_STATIC, INT8_DYNAMIC, HALF, INT4, INT4_ANNEALED, MIXED)
ON_GPU = (HALF, INT4, INT4_ANNEALED, INT8_QDQ, INT4_QDQ)


class QuantizeMaker:
    """`KeyedMaker` of files of a lower precision, for ONNX Runtime and for builders of engines."""

    name = "quantize"

    def recipes(self, target: Target) -> Sequence[Recipe]:
        if any(importlib.util.find_spec(module) is None for module in NEEDED):
            return ()
        return ON_CPU if target.name == CPU else ON_GPU

    def key(self, target: Target) -> Mapping[str, str]:
        """Whether int8 weights may have 8 bits here."""
        return int8_key() if target.name == CPU else {}

    def make(self, recipe: Recipe, job: Job) -> Made:
        from millhand_plugins.quantize.workbench import Workbench

        return Workbench(job).make(recipe.name)
