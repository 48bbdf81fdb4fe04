"""ModelOpt in its own interpreter, where MILLHAND_MODELOPT_PYTHON names one that has it; and what is said elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import millhand_plugins.rig as rig
from millhand.errors import ModelError
from millhand.workshop.recipe import Job, Target
from millhand_plugins.modelopt.maker import INT8, ModeloptMaker
from millhand_plugins.modelopt.settings import ModeloptSettings

MODELS = Path(rig.__file__).parent / "models"
PYTHON = os.environ.get("MILLHAND_MODELOPT_PYTHON", "")
needs_modelopt = pytest.mark.skipif(not PYTHON, reason="MILLHAND_MODELOPT_PYTHON names no interpreter with ModelOpt")


def stands_in(folder: Path, what: str) -> str:
    """An interpreter that says it has the package, and then does something else than ModelOpt."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$2" = -c ] && exec echo 0.0\n{what}\n')
    path.chmod(0o755)
    return str(path)


def job_of(folder: Path, python: str, model: str = "rig-fault", shape: tuple[int, ...] = (44,), **changes: Any) -> Job:
    source = folder / "source"
    source.mkdir()
    (source / "model.onnx").write_bytes((MODELS / model / "1/model.onnx").read_bytes())
    made = folder / "made"
    made.mkdir()
    (name,) = (value.name for value in onnx.load(source / "model.onnx").graph.input)
    rows = np.random.default_rng(3).normal(size=(100, *shape)).astype(np.float32)
    job = Job(
        model=source / "model.onnx",
        folder=made,
        target=Target(),
        inputs={name: ("float32", (-1, *shape))},
        calibration={name: rows},
        max_batch=16,
        typical_batch=1,
        options=ModeloptSettings(python=Path(python)).model_dump(mode="json"),
        cache=folder,
    )
    return Job(**{**vars(job), **changes})


def outputs(path: Path, rows: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, rows)[0]


@pytest.mark.slow
@needs_modelopt
@pytest.mark.parametrize(("model", "shape"), [("rig-fault", (44,)), ("rig-wave", (2, 2048))])
def test_modelopt_makes_a_candidate_of_a_shipped_model(tmp_path: Path, model: str, shape: tuple[int, ...]) -> None:
    maker = ModeloptMaker(PYTHON)
    assert maker.recipes(Target()) == (INT8,)
    job = job_of(tmp_path, PYTHON, model, shape)
    before = job.model.read_bytes()
    made = maker.make(INT8, job)
    assert job.model.read_bytes() == before, "ModelOpt worked on a copy"
    assert made.layers and all(layer["precision"] == "int8" for layer in made.layers)
    assert made.notes[0].startswith("made by ModelOpt 0.")
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(job.folder / "model.onnx").graph.node)
    expected, found = outputs(job.model, job.calibration), outputs(job.folder / "model.onnx", job.calibration)
    assert not np.array_equal(expected, found)
    assert np.mean(expected.argmax(1) == found.argmax(1)) > 0.9
    assert sorted(path.name for path in job.folder.iterdir()) == ["model.onnx"]


@needs_modelopt
def test_what_modelopt_cannot_read_is_told(tmp_path: Path) -> None:
    job = job_of(tmp_path, PYTHON)
    job.model.write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"ModelOpt failed: .*Error"):
        ModeloptMaker(PYTHON).make(INT8, job)


@pytest.mark.parametrize(
    ("python", "message"),
    [("/nowhere/bin/python", "does not run: .*No such file"), (sys.executable, "has no nvidia-modelopt$")],
)
def test_without_the_interpreter_or_the_package_it_has_no_recipe(python: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ModeloptMaker(python).recipes(Target())
    assert "nvidia-modelopt[onnx]" in caught.value.hint


def test_a_process_that_dies_is_the_candidates_failure(tmp_path: Path) -> None:
    python = stands_in(tmp_path, "echo 'ImportError: libtorch.so' >&2; kill -9 $$")
    assert ModeloptMaker(python).recipes(Target()) == (INT8,)
    with pytest.raises(ModelError, match=r"ModelOpt failed: ImportError: libtorch\.so"):
        ModeloptMaker(python).make(INT8, job_of(tmp_path, python))


def test_a_model_of_which_nothing_becomes_int8_is_no_candidate(tmp_path: Path) -> None:
    python = stands_in(tmp_path, """echo '{"version": "0.0", "layers": [], "left": ["a"]}'""")
    with pytest.raises(ModelError, match=r"ModelOpt 0\.0 made no layer int8"):
        ModeloptMaker(python).make(INT8, job_of(tmp_path, python))


def test_it_ends_when_the_job_shall_end(tmp_path: Path) -> None:
    python = stands_in(tmp_path, f'echo $$ > "{tmp_path}/pid"; exec sleep 600')

    def progress(share: float, step: str) -> None:
        if (tmp_path / "pid").exists():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ModeloptMaker(python).make(INT8, job_of(tmp_path, python, progress=progress))
    pid = (tmp_path / "pid").read_text().strip()
    assert not pid or not Path("/proc", pid).exists()
