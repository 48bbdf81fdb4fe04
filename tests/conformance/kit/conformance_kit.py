"""A node with models of every datatype, for the clients of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto, helper
from serving_kit import identity, save_onnx, scale, value, write_model

from millhand.testing import Agent

TOKEN = "conformance-token"
KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
PAIR = """
name = "pair"
description = "two inputs, given back"
licence = "Apache-2.0"
inputs = [{ name = "a", shape = [-1, 2] }, { name = "b", datatype = "BYTES", shape = [-1, 1] }]
outputs = [{ name = "a_out", shape = [-1, 2] }, { name = "b_out", datatype = "BYTES", shape = [-1, 1] }]
"""
CLASSES = """
[prediction]
task = "classification"
output = "y"
labels = ["healthy", "leak", "worn_pump"]
"""


@dataclass
class Node:
    """A running agent and where it is asked."""

    agent: Agent
    http: str
    grpc: str


def write_models(root: Path) -> None:
    """`same-<datatype>` gives x [n, 4] back as y; `scale` 1 doubles and 2 triples; `pair`; `classes` with labels."""
    for datatype, kind in KINDS.items():
        folder = write_model(root, f"same-{datatype.lower()}", datatype=datatype, columns=4)
        identity(folder / "1/model.onnx", 4, kind)
    folder = write_model(root, "scale", extra='policy = "all"\nmax_batch = 16')
    for version, factor in ((1, 2.0), (2, 3.0)):
        scale(folder / f"{version}/model.onnx", factor)
    folder = write_model(root, "classes", columns=3)
    identity(folder / "1/model.onnx", 3)
    with (folder / "model.toml").open("a") as file:
        file.write(CLASSES)
    (root / "pair").mkdir()
    (root / "pair/model.toml").write_text(PAIR)
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("a", "b")]
    inputs, outputs = (
        [value(f"a{end}", ["n", 2]), value(f"b{end}", ["n", 1], TensorProto.STRING)] for end in ("", "_out")
    )
    save_onnx(root / "pair/1/model.onnx", nodes, inputs, outputs)


def config(folder: Path, http: str = "", grpc: str = "") -> str:
    """A node with these models in `folder`, HTTP, gRPC, and a token for both; `http` and `grpc` are more lines."""
    root, token = folder / "models", folder / "token"
    root.mkdir()
    write_models(root)
    token.write_text(f"{TOKEN}\n")
    return (
        f'[http]\nport = 0\nadmin_token_file = "{token}"\n{http}\n'
        f'[grpc]\nenabled = true\nport = 0\nadmin_token_file = "{token}"\n{grpc}\n'
        f'[models]\npaths = ["{root}"]\n'
    )


def ready(agent: Agent) -> Node:
    """The node, once every model is ready."""
    agent.wait(lambda: all(model["state"] == "ready" for model in agent.call("model.list")), "the models")
    state = agent.call("state")
    return Node(agent, state["http"], state["grpc"])
