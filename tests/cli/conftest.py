"""One agent with small models of every kind, for the tests of `model` and `predict`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from millhand.testing import Agent, millhand_agents

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "serving" / "kit"))

from cli_kit import Done, run
from serving_kit import KIT, identity, save_onnx, scale, value, write_faulty, write_model

PAIR = """
name = "pair"
description = "two inputs, given back"
licence = "Apache-2.0"
inputs = [
  { name = "speed", shape = [-1, 1], unit = "rpm" },
  { name = "counts", datatype = "INT16", shape = [-1, 3] },
]
outputs = [
  { name = "speed_out", shape = [-1, 1] },
  { name = "counts_out", datatype = "INT16", shape = [-1, 3] },
]
"""
FAULT = """
[prediction]
task = "classification"
output = "y"
labels = ["healthy", "bearing_outer", "imbalance"]
softmax = true
"""
LIFE = """
[prediction]
task = "regression"
output = "y"
value = "rul"
unit = "cycle"
high = 125
"""


class Node:
    """An agent, and the command line to it: in this process, which is as real and quicker."""

    def __init__(self, agent: Agent, root: Path) -> None:
        self.agent = agent
        self.root = root

    def millhand(self, *words: str | Path, stdin: bytes = b"") -> Done:
        return run(self.agent.config_path, *words, stdin=stdin)


def write_models(root: Path) -> None:
    for version, factor in ((1, 2.0), (2, 3.0)):
        scale(write_model(root, "scale") / f"{version}/model.onnx", factor)
    (root / "pair").mkdir()
    (root / "pair/model.toml").write_text(PAIR)
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("speed", "counts")]
    shapes = {"": [value("speed", ["n", 1]), value("counts", ["n", 3], TensorProto.INT16)]}
    shapes["_out"] = [value("speed_out", ["n", 1]), value("counts_out", ["n", 3], TensorProto.INT16)]
    save_onnx(root / "pair/1/model.onnx", nodes, shapes[""], shapes["_out"])
    for name, columns, reading in (("fault", 3, FAULT), ("life", 1, LIFE)):
        folder = write_model(root, name, columns=columns)
        identity(folder / "1/model.onnx", columns)
        with (folder / "model.toml").open("a") as file:
            file.write(reading)
    for name, datatype, kind in (("words", "BYTES", TensorProto.STRING), ("flags", "BOOL", TensorProto.BOOL)):
        identity(write_model(root, name, datatype=datatype) / "1/model.onnx", 2, kind)
    write_faulty(root, "faulty")
    rows = {"y": ("FP32", 2), "rows": ("INT64", 1)}
    folder = write_model(root, "rows", backend="rows", outputs=rows, extra="max_batch = 8")
    (folder / "1").mkdir()
    (folder / "1/model.json").write_text("{}")


@pytest.fixture(scope="package")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    root, site = folder / "models", folder / "site"
    root.mkdir()
    write_models(root)
    information = site / "faulty-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[millhand]\nfaulty = millhand_faulty\n")
    path = os.pathsep.join(filter(None, [str(site), str(KIT), os.environ.get("PYTHONPATH", "")]))
    config = (
        f'[http]\nport = 0\n[plugins.faulty]\n[models]\npaths = ["{root}"]\nrestart_delay_ms = 20\ndeaths_cap = 99\n'
    )
    with millhand_agents(folder) as start:
        yield Node(start(config, environment={"PYTHONPATH": path}), root)
