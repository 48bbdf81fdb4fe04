"""A plugin of the tests: makers that make real ONNX files of a real net, and makers that go wrong in every way.

The net is two matrices one after the other, x -> x A B. Folding them into one is really faster and smaller.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from millhand.errors import ModelError
from millhand.hookspecs import Evaluation, Examples, Maker, hookimpl
from millhand.workshop.recipe import Job, Made, Recipe, Target

MINUTES = {"slow": 30.0}
SOURCES = {"again": "folded", "orphan": "nothing", "after-crash": "crash", "egg": "hen", "hen": "egg"}
PRECISIONS = {"folded": "int8", "half": "fp16", "again": "int4"}
CALIBRATED = {"damaged", "fitted"}
ENGINES = {"engine"}
MIB = 1 << 20


def weights(model: Path) -> dict[str, Any]:
    import onnx
    from onnx import numpy_helper

    return {item.name: numpy_helper.to_array(item) for item in onnx.load(model).graph.initializer}


def write(path: Path, matrices: Sequence[Any]) -> None:
    """x -> x M1 M2 ...; a float16 matrix is cast up, which ONNX Runtime folds at the load."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, items, value = [], [], "x"
    for number, matrix in enumerate(matrices):
        name, output = f"w{number}", "y" if number == len(matrices) - 1 else f"h{number}"
        items.append(numpy_helper.from_array(matrix, name))
        if matrix.dtype == np.float16:
            nodes.append(helper.make_node("Cast", [name], [f"{name}c"], to=TensorProto.FLOAT))
            name = f"{name}c"
        nodes.append(helper.make_node("MatMul", [value, name], [output]))
        value = output
    shapes = [("x", len(matrices[0])), ("y", matrices[-1].shape[1])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in shapes)
    graph = helper.make_graph(nodes, "g", [x], [y], items)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)


class Workbench:
    """The maker."""

    name = "workbench"

    def __init__(self, config: Any) -> None:
        self.config = config

    def recipes(self, target: Target) -> Sequence[Recipe]:
        if "refuses" in self.config.recipes:
            raise ModelError("the table [plugins.workbench] names no library", hint="name one")
        return [
            Recipe(
                name=name,
                precision=PRECISIONS.get(name, "int8"),
                description="made by a test",
                source=SOURCES.get(name, ""),
                calibrated=name in CALIBRATED,
                engine=name in ENGINES,
                minutes=MINUTES.get(name, 0.1),
            )
            for name in self.config.recipes
        ]

    def key(self, target: Target) -> Mapping[str, str]:
        return {"library": self.config.key}

    def make(self, recipe: Recipe, job: Job) -> Made:
        if job.options["log"]:
            with Path(job.options["log"]).open("a") as file:
                file.write(f"{recipe.name}\n")
        job.progress(0.1, "reading")
        matrices = list(weights(job.model).values())
        notes = getattr(self, recipe.name.replace("-", "_"), self.folded)(job, matrices) or ()
        job.progress(1.0, "written")
        key = {"library": self.config.key} if self.config.key else {}
        return Made(artifact="model.onnx", backend="onnxruntime", key=key, notes=tuple(notes))

    def folded(self, job: Job, matrices: list[Any]) -> None:
        product = np.linalg.multi_dot(matrices) if len(matrices) > 1 else matrices[0]
        write(job.folder / "model.onnx", [np.asarray(product, np.float32)])

    def half(self, job: Job, matrices: list[Any]) -> None:
        write(job.folder / "model.onnx", [matrix.astype(np.float16) for matrix in matrices])

    def damaged(self, job: Job, matrices: list[Any]) -> None:
        """As quick and small as `folded`, and wrong: a scale that was fitted badly clips the weights."""
        product = np.linalg.multi_dot(matrices)
        spread = np.quantile(np.abs(product), 0.2)
        write(job.folder / "model.onnx", [np.asarray(np.clip(product, -spread, spread).round(2), np.float32)])

    def judged(self, job: Job, matrices: list[Any]) -> list[str]:
        """Tries the damaged one first, as a maker that promotes layers until the gate passes."""
        assert job.judge is not None
        made = Made(artifact="model.onnx", backend="onnxruntime")
        self.damaged(job, matrices)
        first = job.judge(made)
        self.folded(job, matrices)
        second = job.judge(made)
        return [f"first {first.passed} {first.drop_percent:.3f}", f"second {second.passed} {second.drop_percent:.3f}"]

    def fitted(self, job: Job, matrices: list[Any]) -> list[str]:
        self.folded(job, matrices)
        rows = job.calibration["x"]
        return [f"{len(rows)} rows, mean {rows.mean():.6f}, batch {job.typical_batch} of {job.max_batch}"]

    def nan(self, job: Job, matrices: list[Any]) -> None:
        write(job.folder / "model.onnx", [np.full((len(matrices[0]), matrices[-1].shape[1]), np.nan, np.float32)])

    def narrow(self, job: Job, matrices: list[Any]) -> None:
        write(job.folder / "model.onnx", [np.linalg.multi_dot(matrices)[:, :1].astype(np.float32)])

    def nothing_written(self, job: Job, matrices: list[Any]) -> None:
        return

    def crash(self, job: Job, matrices: list[Any]) -> None:
        print("about to crash", file=sys.stderr, flush=True)
        ctypes.string_at(0)

    def raises(self, job: Job, matrices: list[Any]) -> None:
        raise ValueError("node 'conv1' has 3 inputs")

    def hungry(self, job: Job, matrices: list[Any]) -> None:
        held = []
        while True:
            held.append(np.ones(16 * MIB // 8))
            job.progress(0.5, f"{16 * len(held)} MiB")
            time.sleep(0.02)

    def no_memory(self, job: Job, matrices: list[Any]) -> None:
        np.ones(1 << 50)

    def hang(self, job: Job, matrices: list[Any]) -> None:
        """Holds the interpreter in native code, with a child of its own that ignores every plea."""
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
        )
        (job.folder.parent.parent.parent.parent / "hanging").write_text(f"{os.getpid()} {child.pid}")
        ctypes.PyDLL(None).sleep(600)

    def polite(self, job: Job, matrices: list[Any]) -> None:
        """Looks at `progress`, and tidies up when it is told to end."""
        try:
            while True:
                job.progress(0.5, "going on")
                time.sleep(0.05)
        except InterruptedError:
            (Path(job.options["log"]).parent / "tidied").write_text("")
            raise

    def noisy(self, job: Job, matrices: list[Any]) -> None:
        """A library that writes to standard output, where jobs speak."""
        os.write(1, b'{"done": {"artifact": "false.onnx"}}\n' * 3)
        self.folded(job, matrices)

    def slow(self, job: Job, matrices: list[Any]) -> None:
        for step in range(20):
            job.progress(step / 20, "working")
            time.sleep(0.02)
        self.folded(job, matrices)


class Known:
    """The evaluation."""

    model = "known"
    metric = "accuracy"

    def __init__(self, path: str) -> None:
        self.path = path

    def examples(self, data: Path | None) -> Examples:
        with np.load(data or self.path) as file:
            rows, truth = file["x"], file["truth"]
        return Examples({"x": rows[:100]}, {"x": rows[100:]}, truth[100:], "rows of the plugin")


@hookimpl
def millhand_config() -> Any:
    from millhand_workbench_options import Options  # pydantic, which jobs have no need of

    return Options


@hookimpl
def millhand_makers(config: Any) -> Sequence[Maker]:
    return [Workbench(config)]


@hookimpl
def millhand_evaluations(config: Any) -> Sequence[Evaluation]:
    return [Known(config.examples)] if config.examples else []
