"""Loads that must fail, and what ONNX Runtime does on its own in such a case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import BenchAgent
from models import CNN, write_model
from node import config

from millhand.errors import MillhandError

BARE = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
onnxruntime.preload_dlls()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
print(session.get_providers())
"""
BACKEND = """
import sys
from pathlib import Path
from millhand.errors import MillhandError
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
try:
    OnnxruntimeBackend().load(Path(sys.argv[1]), "GPU", {})
except MillhandError as error:
    print(error.message, error.hint, sep="\\n")
else:
    print("", "", sep="\\n")
"""
PROFILE = """
import sys
from pathlib import Path
from millhand_plugins.onnxruntime import proof
from millhand_plugins.onnxruntime.artifact import Artifact
artifact, folder, providers = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
session = Artifact(artifact, providers, {}).open(profile=folder / artifact.parents[1].name)
(name,) = [node.name for node in session.get_inputs()]
session.run(None, proof.examples({name: ("float32", (-1, *session.get_inputs()[0].shape[1:]))}))
session.end_profiling()
"""


def python(code: str, *arguments: str, visible: str | None = None) -> str:
    """The last two lines that a program prints on stdout."""
    added = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **added})
    if done.returncode:
        raise SystemExit(f"a program ended with {done.returncode}: {done.stderr[-1000:]}")
    return "\n".join(done.stdout.strip().splitlines()[-2:])


def refused(agent: BenchAgent, name: str) -> str:
    """The error of a load that must fail; empty where it did not."""
    try:
        agent.call("model.load", model=name)
    except MillhandError as error:
        return f"{error.message}\n{error.hint}"
    return ""


def refusals(agent: BenchAgent, folder: Path, added: dict[str, str]) -> dict[str, str]:
    """Case -> what millhand says; empty where it wrongly served. `bare` says what ONNX Runtime does on its own."""
    artifact = folder / "repository" / "cnn-single" / "1" / "model.onnx"
    found = {"no kernel for the convolution": refused(agent, "integer")}
    hidden = folder / "hidden"
    hidden.mkdir()
    with BenchAgent(config(hidden), environment={**added, "CUDA_VISIBLE_DEVICES": ""}) as other:
        write_model(hidden, CNN, artifact.read_bytes(), extra='[options]\nproviders = ["cuda", "cpu"]')
        found["GPU hidden from the agent"] = refused(other, "cnn")
    found["a GPU that is not there"] = python(BACKEND, str(artifact), visible="99")
    found["bare: GPU hidden"] = python(BARE, str(artifact), visible="")
    return found
