"""Models that come and change under a running agent, and the assets that they judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from live_kit import HTTP_OFF, file_asset, state_of, write_rows
from onnx import TensorProto, checker, helper, save

from millhand.cli.state import state_lines
from millhand.errors import ModelError
from millhand.testing import Agent

MODEL_TOML = """
name = "level"
description = "gives back what it is given"
licence = "Apache-2.0"

[[inputs]]
name = "input"
shape = [-1, 1, 1]

[[outputs]]
name = "value"
shape = [-1, 1]

[window]
length = 1
step = 1
signals = ["sequence"]

[prediction]
task = "regression"
output = "value"
scale = {scale}
"""


def write_identity(path: Path) -> None:
    """An ONNX file whose output is its input, [n, 1]."""
    shape = helper.make_node("Flatten", ["input"], ["value"])
    first = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 1])
    last = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n", 1])
    model = helper.make_model(
        helper.make_graph([shape], "g", [first], [last]), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )
    checker.check_model(model)
    path.parent.mkdir(parents=True)
    save(model, path)


def values(agent: Agent) -> list[float]:
    """What the model said, oldest first."""
    found = agent.call("prediction.list", asset="press", model="level")
    return [one["values"]["value"] for one in sorted(found, key=lambda one: one["window_end_ns"])]


def test_an_asset_takes_a_model_that_comes_and_what_its_model_toml_says_later(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    models, rows = tmp_path / "models", write_rows(tmp_path / "press.csv", 10)
    models.mkdir()
    asset = file_asset(rows, "press", models=["level"], more="follow = true\npoll_ms = 20")
    agent = millhand_agent(HTTP_OFF + f'[models]\npaths = ["{models}"]\n' + asset)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 20, "the first rows")
    assert "model 'level' is not known" in state_of(agent, "press")["error"]

    write_identity(models / "level/1/model.onnx")
    (models / "level/model.toml").write_text(MODEL_TOML.format(scale="1.0"))
    agent.call("model.load", model="level")
    write_rows(rows, 5, first=10)
    agent.wait(lambda: len(values(agent)) == 5, "predictions of the model that came")
    assert values(agent) == [10, 11, 12, 13, 14]
    assert state_of(agent, "press")["error"] == ""

    toml = models / "level/model.toml"
    toml.write_text(toml.read_text().replace("scale = 1.0", "scale = 2.0"))
    agent.call("model.load", model="level")
    write_rows(rows, 2, first=15)
    agent.wait(lambda: len(values(agent)) == 7, "predictions with the new scale")
    assert values(agent)[5:] == [30, 32]

    # One that cannot be loaded changes nothing: the asset goes on with what serves.
    toml.write_text(toml.read_text().replace("scale = 2.0", "scale = 3.0").replace("[-1, 1, 1]", "[-1, 2, 1]"))
    with pytest.raises(ModelError, match="input 'input' has shape"):
        agent.call("model.load", model="level")
    agent.reload()
    write_rows(rows, 1, first=17)
    agent.wait(lambda: len(values(agent)) == 8, "a prediction after the failed load")
    assert values(agent)[7:] == [34]


def test_the_state_names_a_provider_that_does_not_work(tmp_path: Path, millhand_agent: Callable[..., Agent]) -> None:
    write_identity(tmp_path / "models/level/1/model.onnx")
    toml = MODEL_TOML.format(scale="1.0") + '[options]\nproviders = ["tensorrt", "cpu"]\n'
    (tmp_path / "models/level/model.toml").write_text(toml)
    agent = millhand_agent(HTTP_OFF + f'[models]\npaths = ["{tmp_path / "models"}"]\n')
    tried = agent.wait(lambda: agent.call("state")["self_test"], "the self-test")
    assert {one["part"]: one["works"] for one in tried} == {"tensorrt": False, "cpu": True}
    shown = "\n".join(state_lines(agent.call("state")))
    assert "onnxruntime 'tensorrt' does not work on the CPU" in shown
