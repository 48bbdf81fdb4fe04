"""Engines through the command line and a whole agent, on a machine without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trt_nets import SHIPPED, model_name

CONFIG = """
[plugins.quantize]
[plugins.tensorrt]
"""
MODEL = """
description = "an engine"
licence = "Apache-2.0"
backend = "tensorrt"
artifact = "model.engine"

[[inputs]]
name = "features"
shape = [-1, 44]

[[outputs]]
name = "logits"
shape = [-1, 6]
"""
NODE = """
[node]
id = "press-7"
group = "plant"
data_dir = "{folder}/data"
run_dir = "{folder}/run"
"""


@pytest.mark.usefixtures("rtx")
def test_engines_are_built_ahead_for_a_board_that_is_not_here(tmp_path: Path) -> None:
    model = tmp_path / "models" / "press"
    (model / "1").mkdir(parents=True)
    (model / "model.toml").write_text(
        'name = "press"' + MODEL.replace("tensorrt", "onnxruntime").replace("engine", "onnx")
    )
    shutil.copy(next(path for path in SHIPPED if model_name(path) == "rig-fault"), model / "1" / "model.onnx")
    path = tmp_path / "millhand.toml"
    path.write_text(NODE.format(folder=tmp_path) + CONFIG + f'[models]\npaths = ["{tmp_path / "models"}"]\n')
    command = [sys.executable, "-m", "millhand", "-c", str(path), "model", "build", "press", "--target", "a100"]
    only = ["--only", "engine-fp32", "--only", "engine-fp16", "--json"]
    done = subprocess.run([*command, *only], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    shelf = tmp_path / "data/built/press/1/sm80"
    for name in ("engine-fp32", "engine-fp16"):
        assert (shelf / name / "model.engine").read_bytes().startswith(b"vtrt")
        proof: dict[str, Any] = json.loads((shelf / name / "proof.json").read_text())
        assert proof["backend"] == "tensorrt"
        assert (proof["target"], proof["executed"], proof["passed"]) == ("sm80", False, False)
        assert set(proof["key"]) == {"tensorrt-rtx"}
    assert json.loads((shelf / "engine-fp16" / "made.json").read_text())["recipe"]["source"] == "fp16"


def test_a_node_without_a_gpu_serves_on_beside_an_engine(tmp_path: Path, millhand_agent: Callable[..., Any]) -> None:
    models = tmp_path / "models"
    (models / "press-engine" / "1").mkdir(parents=True)
    (models / "press-engine" / "model.toml").write_text('name = "press-engine"' + MODEL)
    (models / "press-engine" / "1" / "model.engine").write_bytes(b"vtrt" + bytes(64))
    shipped = next(path for path in SHIPPED if model_name(path) == "rig-fault")
    shutil.copytree(shipped.parents[1], models / "rig-fault")
    agent = millhand_agent(CONFIG + f'[models]\npaths = ["{models}"]\n')
    states = agent.wait(lambda: states_of(agent), "both models to be tried")
    state, reason = states["press-engine"]
    assert state == "failed"
    assert "runs on a GPU, and this model is placed on the CPU" in reason
    assert states["rig-fault"] == ("ready", "")


def states_of(agent: Any) -> dict[str, tuple[str, str]]:
    """Model -> state and reason, once all are settled."""
    found = {one["name"]: (one["state"], one["reason"]) for one in agent.call("model.list")}
    return found if {state for state, _ in found.values()} <= {"ready", "failed"} else {}
