"""The maker: it has ModelOpt work in a process of its own, since it brings torch and an onnx of its own.

Runs in a process of the workshop: Python 3.10, standard library, NumPy and msgspec.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millhand.errors import ModelError
from millhand.workshop.recipe import CPU, Job, Made, Recipe, Target
from millhand_plugins.quantize.cpu import int8_key

SCRIPT = Path(__file__).with_name("quantization.py")
LOOK_S = 30.0
POLL_S = 0.2
WORDS_BYTES = 4000
INSTALL = "make a venv with nvidia-modelopt[onnx] and name its bin/python (the plugin's README)"
INT8 = Recipe(
    name="modelopt-int8", precision="int8", calibrated=True, minutes=1,
    description="int8 where NVIDIA's ModelOpt puts it: for TensorRT, weights stay float in the file",
)  # fmt: skip


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What quantization.py prints last."""

    version: str
    layers: tuple[dict[str, Any], ...]
    """`name`, `operator` and `precision` of the layers that are int8 now."""
    left: tuple[str, ...]
    """The weighted layers that ModelOpt left as they were."""


class ModeloptMaker:
    """`KeyedMaker` of one recipe, for ONNX Runtime."""

    name = "modelopt"

    def __init__(self, python: str) -> None:
        self.python = python

    def recipes(self, target: Target) -> Sequence[Recipe]:
        """Raises ModelError where the interpreter or the package is not there."""
        look = "import importlib.metadata as found; print(found.version('nvidia-modelopt'))"
        try:
            done = subprocess.run([self.python, "-I", "-c", look], capture_output=True, timeout=LOOK_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(
                f"[plugins.modelopt] python = '{self.python}' does not run: {error}", hint=INSTALL
            ) from error
        if done.returncode:
            raise ModelError(f"[plugins.modelopt] python = '{self.python}' has no nvidia-modelopt", hint=INSTALL)
        return (INT8,)

    def key(self, target: Target) -> Mapping[str, str]:
        """Its weights have 8 bits, which were judged on a CPU that takes them or not."""
        return int8_key() if target.name == CPU else {}

    def make(self, recipe: Recipe, job: Job) -> Made:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(job.model.parent, folder / "model")  # ModelOpt writes into the file that it is given
            rows: dict[str, Any] = {
                name: array[: int(job.options["rows_cap"])] for name, array in job.calibration.items()
            }
            np.savez(folder / "rows.npz", **rows)
            made = folder / "made"
            made.mkdir()
            task = {
                "model": str(folder / "model" / job.model.name),
                "rows": str(folder / "rows.npz"),
                "made": str(made / "model.onnx"),
                "calibration": job.options["calibration"],
            }
            answer = self._run(task, folder, job)
            shutil.copytree(made, job.folder, dirs_exist_ok=True)
        if not answer.layers:
            raise ModelError(
                f"ModelOpt {answer.version} made no layer int8", hint="it leaves small ones; int8-static may take them"
            )
        notes = [f"made by ModelOpt {answer.version}"]
        if answer.left:
            notes.append(f"left as they were: {', '.join(answer.left)}")
        return Made(
            artifact="model.onnx",
            backend="onnxruntime",
            key=dict(self.key(job.target)),
            layers=answer.layers,
            notes=tuple(notes),
        )

    def _run(self, task: Mapping[str, str], folder: Path, job: Job) -> Answer:
        """Raises ModelError with its last word, InterruptedError where the job shall end."""
        command = [self.python, "-I", str(SCRIPT), msgspec.json.encode(task).decode()]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            # In the job's own process group: it ends with the job, whatever ends that.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder)
            try:
                while process.poll() is None:
                    job.progress(0.1, "ModelOpt works")
                    try:
                        process.wait(POLL_S)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                process.kill()
                process.wait()
        lines = (folder / "out").read_bytes().splitlines()
        if process.returncode == 0 and lines:
            return msgspec.json.decode(lines[-1], type=Answer)
        words = (folder / "err").read_bytes()[-WORDS_BYTES:].decode(errors="replace").strip().splitlines()
        raise ModelError(
            f"ModelOpt failed: {words[-1].strip() if words else f'status {process.returncode}'}",
            hint="try the recipes of plugin 'quantize'; a newer ModelOpt may know the model's operators",
        )
